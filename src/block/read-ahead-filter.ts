/**
 * Read-ahead as a filter: sequential reads are recognised and served from large chunks, others pass.
 * Owns the recognition, and that no byte is served that was overwritten since.
 */
import { Mutex } from '../core/lock.ts'
import type { BlockDevice, CallOptions, WriteOptions, WriteZeroesOptions } from './device.ts'
import { FilterDevice } from './filter.ts'
import { ReadAheadPrefetcher, type ReadAheadOptions } from './read-ahead.ts'
import { growingWindow } from './read-ahead-window.ts'

/** Options of {@link readAhead}. */
export type ReadAheadFilterOptions = Pick<ReadAheadOptions, 'chunkSize' | 'window' | 'policy'>

/**
 * Reads that follow each other are served from chunks read ahead; the window grows as they go on.
 * Any other read, and one of a chunk or more, goes straight to `device`. Writes pass.
 */
export function readAhead(device: BlockDevice, options: ReadAheadFilterOptions = {}): BlockDevice {
  return new ReadAheadDevice(device, options)
}

class ReadAheadDevice extends FilterDevice {
  readonly #chunkSize: number
  readonly #prefetcher: ReadAheadPrefetcher
  readonly #turn = new Mutex()
  /** End of the last read: a read that begins here goes on in sequence. */
  #expected = -1

  constructor(inner: BlockDevice, options: ReadAheadFilterOptions) {
    super(inner)
    const window = options.window ?? 4
    this.#chunkSize = options.chunkSize ?? 1 << 20
    this.#prefetcher = new ReadAheadPrefetcher(inner, {
      chunkSize: this.#chunkSize,
      window,
      policy: options.policy ?? growingWindow(window),
    })
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const inSequence = offset === this.#expected || this.#prefetcher.buffers(offset, target.length)
    this.#expected = offset + target.length
    if (!inSequence || target.length >= this.#chunkSize) return this.inner.readInto(offset, target, options)
    return this.inSteps(this.#turn.run(() => this.#readSequence(offset, target, options)))
  }

  async #readSequence(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    try {
      this.#prefetcher.seek(offset)
      if ((await this.#prefetcher.readInto(target, options)) === target.length) return
    } catch {
      this.#prefetcher.drop()
    }
    // the plain read gives the error that belongs to this very request, or succeeds
    await this.inner.readInto(offset, target, options)
  }

  protected override onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.#changing(offset, source.length, () => this.inner.write(offset, source, options))
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    return this.#changing(offset, length, () => this.inner.writeZeroes(offset, length, options))
  }

  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.#changing(offset, length, () => this.inner.discard(offset, length, options))
  }

  protected override onResize(size: number, options?: CallOptions): Promise<void> {
    return this.#changing(0, Number.MAX_SAFE_INTEGER, () => this.inner.resize(size, options))
  }

  protected override async onClose(): Promise<void> {
    await this.#prefetcher.close()
    await this.inner.close()
  }

  /** A chunk requested before the change has ended may hold the old bytes. */
  async #changing(offset: number, length: number, change: () => Promise<void>): Promise<void> {
    const size = this.inner.size
    try {
      await change()
    } finally {
      if (this.inner.size !== size || this.#prefetcher.buffers(offset, length)) this.#prefetcher.drop()
    }
  }
}
