/**
 * A zstd stream that arrives in pieces, each ending with a flush, as a multifd channel carries it.
 * Uses the bundled decoder on every Node: the one of `node:zlib` has no synchronous stream.
 */
import { Decompress } from 'fzstd'

/** One zstd stream, decompressed piece by piece. */
export class ZstdStream {
  #target: Uint8Array = new Uint8Array(0)
  #filled = 0
  readonly #decoder = new Decompress((block) => {
    if (this.#filled + block.length > this.#target.length) throw new Error(`more than ${this.#target.length} bytes`)
    this.#target.set(block, this.#filled)
    this.#filled += block.length
  })

  /**
   * Decompresses the next piece, which must give exactly `target.length` bytes.
   * @returns Why it does not, or `undefined` if `target` is filled.
   */
  next(source: Uint8Array, target: Uint8Array): string | undefined {
    this.#target = target
    this.#filled = 0
    try {
      this.#decoder.push(source)
    } catch (error) {
      return `zstd: ${error instanceof Error ? error.message : String(error)}`
    }
    return this.#filled === target.length ? undefined : `zstd: the piece holds ${this.#filled} bytes, expected ${target.length}`
  }
}
