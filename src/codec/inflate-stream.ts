/**
 * zlib streams (RFC 1950) as a migration stream carries them: one for each compressed page, or one
 * for a whole multifd channel, flushed at the end of each packet. Knows nothing of pages or packets.
 */
import { constants, inflateRawSync, inflateSync } from 'node:zlib'

/** How far back deflate refers at most. */
const windowSize = 32_768

/**
 * Inflates a whole zlib stream that must give exactly `target.length` bytes.
 * @returns Why it does not, or `undefined` if `target` is filled.
 */
export function inflateZlib(source: Uint8Array, target: Uint8Array): string | undefined {
  let bytes: Uint8Array
  try {
    bytes = inflateSync(source, { chunkSize: target.length + 128, maxOutputLength: target.length + 1 })
  } catch (error) {
    return `zlib: ${(error as Error).message}`
  }
  if (bytes.length !== target.length) return `zlib: the stream holds ${bytes.length} bytes, expected ${target.length}`
  target.set(bytes)
  return undefined
}

/**
 * One zlib stream that arrives in pieces, each ending with a flush. A piece is inflated on its own,
 * with what came before as dictionary, so no state of zlib is kept open.
 */
export class InflateStream {
  #begun = false
  #window: Uint8Array = new Uint8Array(0)

  /**
   * Inflates the next piece, which must give exactly `target.length` bytes.
   * @returns Why it does not, or `undefined` if `target` is filled.
   */
  next(source: Uint8Array, target: Uint8Array): string | undefined {
    if (!this.#begun) {
      const header = ((source[0] ?? 0) << 8) | (source[1] ?? 0)
      if (source.length < 2 || header % 31 !== 0 || (header & 0x0f20) !== 0x0800) return 'zlib: no valid stream header'
      source = source.subarray(2)
      this.#begun = true
    }
    let bytes: Uint8Array
    try {
      bytes = inflateRawSync(source, {
        chunkSize: target.length + 128,
        maxOutputLength: target.length + 1,
        finishFlush: constants.Z_SYNC_FLUSH,
        ...(this.#window.length > 0 && { dictionary: this.#window }),
      })
    } catch (error) {
      return `zlib: ${(error as Error).message}`
    }
    if (bytes.length !== target.length) return `zlib: the piece holds ${bytes.length} bytes, expected ${target.length}`
    target.set(bytes)
    this.#remember(bytes)
    return undefined
  }

  #remember(bytes: Uint8Array): void {
    if (bytes.length >= windowSize) {
      this.#window = bytes.slice(bytes.length - windowSize)
      return
    }
    const joined = new Uint8Array(Math.min(windowSize, this.#window.length + bytes.length))
    const kept = joined.length - bytes.length
    joined.set(this.#window.subarray(this.#window.length - kept))
    joined.set(bytes, kept)
    this.#window = joined
  }
}
