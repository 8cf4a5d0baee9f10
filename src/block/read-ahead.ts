/**
 * A byte-oriented source that a disk likes: the consumer takes bytes in any sizes, requests are large,
 * aligned and in sequence. Owns the chunks and the reads in flight; how far to read ahead is the
 * policy's decision (`read-ahead-window.ts`).
 *
 * The next chunk is requested when a read completes or when the consumer frees a chunk. There is no
 * other queue: on a rotational disk sequence matters more than depth.
 */
import { Qcow2Error } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import type { BlockDevice, CallOptions } from './device.ts'
import { fixedWindow, type WindowPolicy } from './read-ahead-window.ts'
import { SlabPool } from './slab.ts'

/** Options of {@link ReadAheadPrefetcher}. */
export interface ReadAheadOptions extends CallOptions {
  /** First byte; default 0. */
  readonly offset?: number | undefined
  /** Byte to stop before; default the size of the device. */
  readonly end?: number | undefined
  /** Bytes of a request; a multiple of the device's request alignment. Default 1 MiB. */
  readonly chunkSize?: number | undefined
  /** Chunks held beyond the one being consumed, at most. Default 4. */
  readonly window?: number | undefined
  /** Default `fixedWindow(window)`. */
  readonly policy?: WindowPolicy | undefined
}

interface Chunk {
  readonly offset: number
  readonly bytes: Uint8Array
  readonly slab: Uint8Array
  /** Resolves, never rejects, when the read has ended. */
  settled: Promise<void>
  reading: boolean
  /** Dropped by a seek while it was being read. */
  stale: boolean
  failure: { readonly error: unknown } | undefined
  /** How many bytes from the start are good; less than all only after a failure. */
  good: number
}

/**
 * Reads a device in sequence, ahead of its consumer. One call at a time. The device stays open.
 *
 * An error surfaces at the byte it belongs to: all bytes before it are delivered first, and a
 * failed chunk is read again in halves to find them. `seek` starts anew.
 */
export class ReadAheadPrefetcher extends Resource implements AsyncIterable<Uint8Array> {
  readonly #device: BlockDevice
  readonly #chunkSize: number
  readonly #policy: WindowPolicy
  readonly #pool: SlabPool
  readonly #end: number
  readonly #stop = new AbortController()
  readonly #signal: AbortSignal | undefined
  /** In order; the first holds `position`, once it is requested. */
  #chunks: Chunk[] = []
  readonly #running = new Set<Chunk>()
  #position: number
  #sequential = 0
  #busy = false

  /** @throws RangeError for a range outside the device or a chunk size that its alignment forbids */
  constructor(device: BlockDevice, options: ReadAheadOptions = {}) {
    super()
    const { requestAlignment } = device.limits
    const chunkSize = options.chunkSize ?? 1 << 20
    const window = options.window ?? 4
    if (!Number.isSafeInteger(chunkSize) || chunkSize < 1 || chunkSize % requestAlignment !== 0) {
      throw new RangeError(`chunkSize must be a multiple of ${requestAlignment}, not ${chunkSize}`)
    }
    if (!Number.isSafeInteger(window) || window < 0) throw new RangeError(`window must be at least 0 chunks, not ${window}`)
    this.#device = device
    this.#chunkSize = chunkSize
    this.#policy = options.policy ?? fixedWindow(window)
    this.#end = options.end ?? Number.POSITIVE_INFINITY
    this.#position = this.#checked(options.offset ?? 0)
    this.#pool = new SlabPool(chunkSize, window + 1)
    this.#signal = options.signal
    this.#signal?.addEventListener('abort', this.#onAbort, { once: true })
    if (this.#signal?.aborted === true) this.#onAbort()
  }

  /** Offset in the device of the next byte to be delivered. */
  get position(): number {
    return this.#position
  }

  /** Byte that reading stops before. */
  get end(): number {
    return Math.min(this.#end, this.#device.size)
  }

  /**
   * The bytes at `position`, as many as are at hand, in place; `undefined` at the end. The view is
   * valid until the next call of any method.
   * @throws the device's error, when its byte is reached; again until a `seek`
   */
  async next(options?: CallOptions): Promise<Uint8Array | undefined> {
    return this.#alone(async () => {
      const bytes = await this.#atPosition(options?.signal)
      this.#position += bytes?.length ?? 0
      return bytes
    })
  }

  /** Fills `target` from `position` on; returns how many bytes, fewer than asked only at the end. */
  async readInto(target: Uint8Array, options?: CallOptions): Promise<number> {
    return this.#alone(async () => {
      let filled = 0
      while (filled < target.length) {
        const bytes = await this.#atPosition(options?.signal)
        if (bytes === undefined) break
        const count = Math.min(bytes.length, target.length - filled)
        target.set(count === bytes.length ? bytes : bytes.subarray(0, count), filled)
        filled += count
        this.#position += count
      }
      this.#freeConsumed() // nothing refers to them: the next read can start now
      return filled
    })
  }

  /** The next `length` bytes in an array of their own; fewer only at the end. */
  async read(length: number, options?: CallOptions): Promise<Uint8Array> {
    const target = new Uint8Array(Math.max(0, Math.min(length, this.end - this.#position)))
    return target.subarray(0, await this.readInto(target, options))
  }

  /** Goes on at `offset`. Chunks that hold it are kept, others dropped; nothing is requested yet. */
  seek(offset: number): void {
    if (this.#busy) throw busy()
    this.#position = this.#checked(offset)
    const failed = this.#chunks.some((chunk) => chunk.failure !== undefined)
    if (failed || !this.buffers(offset, 1)) this.drop()
  }

  /** Forgets all that was read ahead: what is delivered next is read after this call. */
  drop(): void {
    for (const chunk of this.#chunks) this.#release(chunk)
    this.#chunks = []
    this.#sequential = 0
  }

  /** True if a part of `[offset, offset + length)` has been requested ahead. */
  buffers(offset: number, length: number): boolean {
    const first = this.#chunks[0]
    const last = this.#chunks.at(-1)
    return first !== undefined && last !== undefined && offset < last.offset + last.bytes.length && first.offset < offset + length
  }

  /**
   * The bytes from `position` on, until the end, in arrays of the caller's own: they stay as they are, so a Node
   * stream or a `Response` may be made of them. {@link next} and {@link readInto} save the copy.
   */
  async *[Symbol.asyncIterator](): AsyncGenerator<Uint8Array, void, undefined> {
    for await (const bytes of this.borrowedChunks()) yield bytes.slice()
  }

  /**
   * What {@link next} gives, until the end: each view is valid until the following one is asked for. Not for
   * Node's streams, which ask for the next before they are done with the last.
   */
  async *borrowedChunks(): AsyncGenerator<Uint8Array, void, undefined> {
    for (let bytes = await this.next(); bytes !== undefined; bytes = await this.next()) yield bytes
  }

  /** Resolves when no read is in flight any more. */
  protected async onClose(): Promise<void> {
    this.#signal?.removeEventListener('abort', this.#onAbort)
    this.#stop.abort(new Qcow2Error('ERR_CLOSED', 'ReadAheadPrefetcher is closed'))
    this.drop()
    await Promise.all(this.#settling())
    this.#pool.close()
  }

  readonly #onAbort = (): void => this.#stop.abort(this.#signal?.reason)

  async #alone<T>(task: () => Promise<T>): Promise<T> {
    this.assertOpen()
    if (this.#busy) throw busy()
    this.#busy = true
    try {
      return await task()
    } finally {
      this.#busy = false
    }
  }

  /** A view of the good bytes at `position`, at least one; `undefined` at the end. */
  async #atPosition(signal: AbortSignal | undefined): Promise<Uint8Array | undefined> {
    signal?.throwIfAborted()
    this.#stop.signal.throwIfAborted()
    this.#freeConsumed()
    if (this.#position >= this.end) return undefined
    const chunk = await this.#currentRead(signal)
    if (chunk.failure !== undefined && chunk.good === 0) {
      this.#running.add(chunk)
      chunk.settled = this.#findGood(chunk)
      await chunk.settled
      this.#stop.signal.throwIfAborted()
    }
    const from = this.#position - chunk.offset
    if (chunk.failure !== undefined && chunk.good <= from) throw chunk.failure.error
    return chunk.bytes.subarray(from, Math.min(chunk.good, this.end - chunk.offset))
  }

  /** The current chunk when its read has ended; another one if it was dropped meanwhile. */
  async #currentRead(signal: AbortSignal | undefined): Promise<Chunk> {
    for (;;) {
      const chunk = await this.#current(signal)
      await settledOrAborted(chunk.settled, signal)
      if (chunk === this.#chunks[0]) return chunk
    }
  }

  /** The chunk that holds `position`. After a seek all slabs may still be in flight. */
  async #current(signal: AbortSignal | undefined): Promise<Chunk> {
    for (;;) {
      this.#stop.signal.throwIfAborted()
      this.#request()
      const first = this.#chunks[0]
      if (first !== undefined) return first
      await settledOrAborted(Promise.race(this.#settling()), signal)
    }
  }

  #freeConsumed(): void {
    let chunk = this.#chunks[0]
    while (chunk !== undefined && chunk.failure === undefined && this.#position >= chunk.offset + chunk.bytes.length) {
      this.#chunks.shift()
      this.#release(chunk)
      this.#sequential++
      chunk = this.#chunks[0]
    }
    if (this.#chunks.length > 0) this.#request()
  }

  /** Requests the current chunk if need be, and as many beyond it as the policy wants. */
  #request(): void {
    if (this.closed || this.#stop.signal.aborted) return
    if (this.#chunks.length === 0 && !this.#requestChunk()) return
    for (;;) {
      const ahead = this.#chunks.length - 1
      if (this.#chunks.some((chunk) => chunk.failure !== undefined)) return
      if (this.#policy({ sequential: this.#sequential, ahead, inFlight: this.#running.size }) < 1) return
      if (!this.#requestChunk()) return
    }
  }

  /** Starts the read of the chunk behind the last; false at the end or when no slab is free. */
  #requestChunk(): boolean {
    const { requestAlignment } = this.#device.limits
    const last = this.#chunks.at(-1)
    const offset = last === undefined ? this.#position - (this.#position % requestAlignment) : last.offset + last.bytes.length
    // the device grew since its last, partial sector was read: when that is consumed, it is read again as a whole
    if (offset % requestAlignment !== 0) return false
    const stop = Math.min(this.#device.size, Math.ceil(this.end / requestAlignment) * requestAlignment)
    if (offset >= stop) return false
    const slab = this.#pool.acquire()
    if (slab === undefined) return false
    // after a seek the first chunk is shorter, so that all others begin at multiples of their size
    const bytes = slab.subarray(0, Math.min(this.#chunkSize - (offset % this.#chunkSize), stop - offset))
    const chunk: Chunk = { offset, bytes, slab, settled: done, reading: true, stale: false, failure: undefined, good: 0 }
    this.#chunks.push(chunk)
    this.#running.add(chunk)
    chunk.settled = this.#start(chunk)
    return true
  }

  async #start(chunk: Chunk): Promise<void> {
    try {
      await this.#device.readInto(chunk.offset, chunk.bytes, { signal: this.#stop.signal })
      chunk.good = chunk.bytes.length
    } catch (error) {
      chunk.failure = { error }
    }
    chunk.reading = false
    this.#running.delete(chunk)
    if (chunk.stale) this.#pool.release(chunk.slab)
    if (this.#chunks.length > 0) this.#request()
  }

  /** Reads a failed chunk again in halves: what lies before the bad bytes is still to be delivered. */
  async #findGood(chunk: Chunk): Promise<void> {
    const unit = this.#device.limits.requestAlignment
    let bad = chunk.bytes.length
    chunk.reading = true
    while (bad - chunk.good > unit && !this.#stop.signal.aborted) {
      const middle = chunk.good + Math.max(unit, Math.floor((bad - chunk.good) / 2 / unit) * unit)
      try {
        const half = chunk.bytes.subarray(chunk.good, middle)
        await this.#device.readInto(chunk.offset + chunk.good, half, { signal: this.#stop.signal })
        chunk.good = middle
      } catch (error) {
        chunk.failure = { error }
        bad = middle
      }
    }
    chunk.reading = false
    this.#running.delete(chunk)
    if (chunk.stale) this.#pool.release(chunk.slab)
  }

  #settling(): Promise<void>[] {
    return Array.from(this.#running, (chunk) => chunk.settled)
  }

  #release(chunk: Chunk): void {
    if (chunk.reading) chunk.stale = true
    else this.#pool.release(chunk.slab)
  }

  #checked(offset: number): number {
    if (!Number.isSafeInteger(offset) || offset < 0 || offset > this.end) {
      throw new RangeError(`offset must be an integer from 0 to ${this.end}, not ${offset}`)
    }
    return offset
  }
}

function busy(): Qcow2Error {
  return new Qcow2Error('ERR_BUSY', 'ReadAheadPrefetcher serves one call at a time; await the one before')
}

const done: Promise<void> = Promise.resolve()

/** Resolves with `promise`, unless the signal is aborted first. */
function settledOrAborted(promise: Promise<void>, signal: AbortSignal | undefined): Promise<void> {
  if (signal === undefined) return promise
  return new Promise((resolve, reject) => {
    const onAbort = (): void => reject(signal.reason)
    signal.addEventListener('abort', onAbort, { once: true })
    void promise.then(() => {
      signal.removeEventListener('abort', onAbort)
      resolve()
    })
  })
}
