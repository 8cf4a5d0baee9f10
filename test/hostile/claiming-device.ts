/** A sparse file in memory that may claim any size: some bytes, then a hole. What is written is kept by pages, and what is read is counted. */
import { anyRequest, BaseDevice, type BlockLimits } from '../../src/block/device.ts'

const pageBytes = 4096
/** Written pages that are kept: a task that writes more than this claims space, not content. */
const mostPages = 64 << 10

export class ClaimingDevice extends BaseDevice {
  readonly readOnly: boolean
  readonly limits: BlockLimits = anyRequest
  readonly #parts: readonly { readonly at: number; readonly bytes: Uint8Array }[]
  readonly #written = new Map<number, Uint8Array>()
  #size: number
  /** Bytes read so far. */
  bytesRead = 0

  /** `parts` lie one after the other; they are not changed. */
  constructor(parts: readonly Uint8Array[], options: { size?: number | undefined; readOnly?: boolean } = {}) {
    super()
    let end = 0
    this.#parts = parts.map((bytes) => {
      const at = end
      end += bytes.length
      return { at, bytes }
    })
    this.#size = options.size ?? end
    this.readOnly = options.readOnly ?? false
  }

  get size(): number {
    return this.#size
  }

  override get growable(): boolean {
    return true
  }

  protected onRead(offset: number, target: Uint8Array): Promise<void> {
    this.bytesRead += target.length
    target.fill(0)
    const end = offset + target.length
    for (const { at, bytes } of this.#parts) {
      const [from, to] = [Math.max(at, offset), Math.min(at + bytes.length, end)]
      if (from < to) target.set(bytes.subarray(from - at, to - at), from - offset)
    }
    if (this.#written.size > 0) this.#each(offset, target.length, (page, from, to) => target.set(page.subarray(from % pageBytes, from % pageBytes + to - from), from - offset))
    return done
  }

  protected async onWrite(offset: number, source: Uint8Array): Promise<void> {
    for (let at = offset; at < offset + source.length; ) {
      const start = at - (at % pageBytes)
      const to = Math.min(start + pageBytes, offset + source.length)
      await this.#own(start)
      this.#written.get(start)!.set(source.subarray(at - offset, to - offset), at - start)
      at = to
    }
    this.#size = Math.max(this.#size, offset + source.length)
  }

  protected onFlush(): Promise<void> {
    return done
  }

  protected override onResize(size: number): Promise<void> {
    this.#size = size
    return done
  }

  protected onClose(): Promise<void> {
    return done
  }

  async #own(start: number): Promise<void> {
    if (this.#written.has(start)) return
    if (this.#written.size >= mostPages) throw new Error(`more than ${mostPages} pages were written`)
    const page = new Uint8Array(pageBytes)
    await this.onRead(start, page)
    this.#written.set(start, page)
  }

  #each(offset: number, length: number, take: (page: Uint8Array, from: number, to: number) => void): void {
    for (let start = offset - (offset % pageBytes); start < offset + length; start += pageBytes) {
      const page = this.#written.get(start)
      if (page !== undefined) take(page, Math.max(start, offset), Math.min(start + pageBytes, offset + length))
    }
  }
}

const done: Promise<void> = Promise.resolve()
