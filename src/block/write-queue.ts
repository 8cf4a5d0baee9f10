/**
 * A byte-oriented sink that a disk likes: bytes come in any sizes, requests go out aligned, large, in
 * order and several at a time. Owns slabs, requests in flight and back-pressure; knows nothing of what
 * the bytes are, nor where a sink puts them.
 *
 * Alignment is half of the cure: a disk that gets one request at a time loses a turn between two, so
 * the next is always on its way before the last has ended.
 */
import { Qcow2Error } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import type { BlockDevice, CallOptions } from './device.ts'
import { SlabPool } from './slab.ts'

/** Where the slabs of an {@link AlignedWriteQueue} go: a device, an area of an image, anything. */
export interface WriteSink {
  /** Default of the queue's `alignment`. */
  readonly alignment?: number
  /** Default of the queue's `padTo`. */
  readonly padTo?: number
  /**
   * Stores `bytes` at `offset`, counted from the start of the queue. Called with ascending offsets
   * and no gaps, without waiting for earlier calls, at most `depth` at a time. The bytes are page-aligned in
   * memory and stay unchanged until the promise settles, not longer. After a flush, the last
   * partial unit of `alignment` is stored again with the bytes that followed.
   */
  submit(offset: number, bytes: Uint8Array, options?: CallOptions): Promise<void>
  /** Told in ascending order: everything before `end` is stored. */
  completed?(end: number): void
  /** Everything before `end` is stored: makes it durable. */
  flush?(end: number, options?: CallOptions): Promise<void>
}

/** Options of {@link AlignedWriteQueue}. */
export interface WriteQueueOptions extends CallOptions {
  /** Bytes of a full request; rounded up to a multiple of `alignment`. Default 1 MiB. */
  readonly slabSize?: number | undefined
  /** Most requests in flight; from 2 on a disk streams. Default 4. */
  readonly depth?: number | undefined
  /**
   * Every request starts at a multiple of this and, but for the last, is a multiple of it long: the
   * cluster size of an image, so that no cluster is split over two requests. Default 4096 or the sink's.
   */
  readonly alignment?: number | undefined
  /**
   * The last request is padded with zeroes to a multiple of this, a divisor of `alignment`; 1 pads nothing. Default: the
   * sink's rule, else `alignment`.
   */
  readonly padTo?: number | undefined
  /** Bytes stored so far, without gaps before them; how many will come is not known. */
  readonly onProgress?: ((progress: { readonly done: number }) => void) | undefined
}

/** Options of {@link deviceSink}. */
export interface DeviceSinkOptions {
  /** Where in the device the first byte goes; a multiple of its request alignment. Default 0. */
  readonly offset?: number | undefined
  /** Default true: a flush of the queue flushes the device. */
  readonly durable?: boolean | undefined
}

/**
 * A device as a sink. Padding that made a growable device longer than the bytes given is cut off at
 * each flush. The device stays open.
 */
export function deviceSink(device: BlockDevice, options: DeviceSinkOptions = {}): WriteSink {
  const base = options.offset ?? 0
  const sizeBefore = device.size
  return {
    padTo: device.limits.requestAlignment,
    submit: (offset, bytes, call) => device.write(base + offset, bytes, call),
    async flush(end, call) {
      const size = Math.max(sizeBefore, base + end)
      if (device.growable && device.size > size) await device.resize(size, call)
      if (options.durable !== false) await device.flush(call)
    },
  }
}

interface Request {
  readonly end: number
  stored: boolean
}

/**
 * Collects bytes into page-aligned slabs and stores them in order of offset, several at a time.
 *
 * The first error sticks: it rejects every later call. Nothing is lost silently: `close` stores what is left or
 * rejects. To give up, call {@link AlignedWriteQueue.abort}. The sink stays open.
 */
export class AlignedWriteQueue extends Resource {
  readonly #sink: WriteSink
  readonly #pool: SlabPool
  readonly #depth: number
  readonly #alignment: number
  readonly #padTo: number
  readonly #signal: AbortSignal | undefined
  readonly #onProgress: WriteQueueOptions['onProgress']
  readonly #inFlight: Request[] = []
  #running = 0
  #slab: Uint8Array | undefined
  /** Offset of the current slab's first byte, and how many of its bytes are filled. */
  #slabOffset = 0
  #filled = 0
  /** The current slab holds bytes that no request has taken yet. */
  #dirty = false
  #aborted = false
  #stored = 0
  #failure: { readonly error: unknown } | undefined
  /** Calls that wait, one after another; undefined when nothing waits. */
  #turn: Promise<void> | undefined
  #wake: (() => void) | undefined

  /**
   * @param sink a {@link WriteSink}, or a device as {@link deviceSink} makes it one
   * @throws RangeError for sizes that make no sense
   */
  constructor(sink: WriteSink | BlockDevice, options: WriteQueueOptions = {}) {
    super()
    this.#sink = 'submit' in sink ? sink : deviceSink(sink)
    this.#alignment = powerOfTwo('alignment', options.alignment ?? this.#sink.alignment ?? 4096)
    this.#padTo = powerOfTwo('padTo', options.padTo ?? Math.min(this.#sink.padTo ?? this.#alignment, this.#alignment))
    if (this.#padTo > this.#alignment) throw new RangeError(`padTo is ${this.#padTo}, more than alignment, ${this.#alignment}`)
    this.#depth = options.depth ?? 4
    if (!Number.isSafeInteger(this.#depth) || this.#depth < 1) throw new RangeError(`depth must be at least 1, not ${this.#depth}`)
    const slabSize = options.slabSize ?? (1 << 20)
    this.#pool = new SlabPool(Math.ceil(slabSize / this.#alignment) * this.#alignment, this.#depth + 1)
    this.#signal = options.signal
    this.#onProgress = options.onProgress
    this.#signal?.addEventListener('abort', this.#onAbort, { once: true })
    if (this.#signal?.aborted === true) this.#onAbort()
  }

  /** Bytes taken so far: the offset of the next one. */
  get position(): number {
    return this.#slabOffset + this.#filled
  }

  /** Bytes stored so far, without gaps before them. */
  get stored(): number {
    return this.#stored
  }

  /**
   * Appends bytes. Returns `undefined` when all are taken: the fast path, without a promise; they may
   * be changed at once. Otherwise all slabs are in flight, and the promise resolves when the bytes are
   * taken; until then they must not change. Calls keep their order even when not awaited.
   *
   * Rejects with the first error of any earlier request.
   */
  write(bytes: Uint8Array): Promise<void> | undefined {
    if (this.#failure !== undefined) return Promise.reject(this.#failure.error)
    if (this.closed) return Promise.reject(new Qcow2Error('ERR_CLOSED', 'AlignedWriteQueue is closed'))
    if (this.#turn !== undefined) return this.#inTurn(() => this.#putAll(bytes, 0))
    const taken = this.#put(bytes, 0)
    return taken === bytes.length ? undefined : this.#inTurn(() => this.#putAll(bytes, taken))
  }

  /**
   * Stores everything taken before the call and makes it durable. A partial last request is padded;
   * writing may go on: its unit is then stored again, complete.
   */
  flush(): Promise<void> {
    if (this.closed) return Promise.reject(new Qcow2Error('ERR_CLOSED', 'AlignedWriteQueue is closed'))
    return this.#inTurn(() => this.#flushNow())
  }

  /** Gives up what is not yet stored; resolves when nothing is in flight. `close` then resolves, too. */
  async abort(reason: unknown = new Qcow2Error('ERR_CLOSED', 'AlignedWriteQueue was aborted')): Promise<void> {
    this.#fail(reason)
    this.#aborted = true
    await this.close().catch(() => undefined) // a close that failed earlier said so to its own caller
  }

  protected async onClose(): Promise<void> {
    try {
      await this.#inTurn(() => this.#flushNow())
    } catch (error) {
      if (!this.#aborted) throw error
    } finally {
      while (this.#running > 0) await this.#change()
      if (this.#slab !== undefined) this.#pool.release(this.#slab)
      this.#slab = undefined
      this.#pool.close()
      this.#signal?.removeEventListener('abort', this.#onAbort)
    }
  }

  readonly #onAbort = (): void => this.#fail(this.#signal?.reason)

  /** Runs `task` when all earlier waiting calls are done. */
  #inTurn(task: () => Promise<void>): Promise<void> {
    const before = this.#turn
    const turn = before === undefined ? task() : before.then(task, task)
    this.#turn = turn
    const done = (): void => {
      if (this.#turn === turn) this.#turn = undefined
    }
    turn.then(done, done)
    return turn
  }

  /** Takes bytes from `from` on while there is room; returns where it stopped. */
  #put(bytes: Uint8Array, from: number): number {
    while (from < bytes.length) {
      const slab = (this.#slab ??= this.#pool.acquire())
      if (slab === undefined || this.#filled === slab.length) return from
      const room = slab.length - this.#filled
      const rest = bytes.length - from
      const count = Math.min(room, rest)
      slab.set(count === bytes.length ? bytes : bytes.subarray(from, from + count), this.#filled)
      this.#filled += count
      from += count
      this.#dirty = true
      if (this.#filled === slab.length) this.#submitFull()
    }
    return from
  }

  async #putAll(bytes: Uint8Array, from: number): Promise<void> {
    for (let at = from; ; ) {
      this.#throwIfFailed()
      at = this.#put(bytes, at)
      if (at === bytes.length) return
      await this.#changeWithoutFailure()
    }
  }

  async #flushNow(): Promise<void> {
    while (this.#dirty && this.#running === this.#depth) await this.#changeWithoutFailure()
    this.#throwIfFailed()
    if (this.#dirty) this.#submitPartial()
    while (this.#running > 0) await this.#changeWithoutFailure()
    this.#throwIfFailed()
    this.#keepLastUnit()
    try {
      await this.#sink.flush?.(this.position, { signal: this.#signal })
    } catch (error) {
      this.#fail(error)
      throw error
    }
  }

  /** Submits the current slab if it is full and a request is free; called when either changes. */
  #submitFull(): void {
    const slab = this.#slab
    if (slab === undefined || this.#filled < slab.length || !this.#dirty) return
    if (this.#running === this.#depth || this.#failure !== undefined) return
    this.#slab = undefined
    const offset = this.#slabOffset
    this.#slabOffset += slab.length
    this.#filled = 0
    this.#dirty = false
    this.#submit(offset, slab, this.#slabOffset, slab)
  }

  /** The slab stays current: the bytes that follow share its last unit. */
  #submitPartial(): void {
    const slab = this.#slab
    if (slab === undefined) return
    const padded = Math.ceil(this.#filled / this.#padTo) * this.#padTo
    slab.fill(0, this.#filled, padded)
    this.#dirty = false
    this.#submit(this.#slabOffset, slab.subarray(0, padded), this.position, undefined)
  }

  /** After a flush: the unit that is not full moves to the start of the slab, to be stored again later. */
  #keepLastUnit(): void {
    if (this.#slab === undefined) return
    const whole = this.#filled - (this.#filled % this.#alignment)
    this.#slab.copyWithin(0, whole, this.#filled)
    this.#slabOffset += whole
    this.#filled -= whole
  }

  #submit(offset: number, bytes: Uint8Array, end: number, release: Uint8Array | undefined): void {
    const request: Request = { end, stored: false }
    this.#inFlight.push(request)
    this.#running++
    const settled = (): void => {
      this.#running--
      if (release !== undefined) this.#pool.release(release)
      if (this.#failure === undefined) this.#submitFull()
      this.#wake?.()
    }
    start(this.#sink, offset, bytes, this.#signal).then(
      () => {
        request.stored = true
        this.#retire()
        settled()
      },
      (error: unknown) => {
        this.#fail(error)
        settled()
      },
    )
  }

  /** Requests may complete out of order; what is reported has no gaps. */
  #retire(): void {
    let end: number | undefined
    while (this.#inFlight[0]?.stored === true) end = this.#inFlight.shift()?.end
    if (end === undefined || this.#failure !== undefined) return
    this.#stored = end
    try {
      this.#sink.completed?.(end)
      this.#onProgress?.({ done: end })
    } catch (error) {
      this.#fail(error)
    }
  }

  #fail(error: unknown): void {
    this.#failure ??= { error }
    this.#wake?.()
  }

  #throwIfFailed(): void {
    if (this.#failure !== undefined) throw this.#failure.error
  }

  async #changeWithoutFailure(): Promise<void> {
    this.#throwIfFailed()
    await this.#change()
    this.#throwIfFailed()
  }

  /** Resolves when a request settles or the queue fails. Only the call whose turn it is waits. */
  #change(): Promise<void> {
    return new Promise((resolve) => (this.#wake = resolve))
  }
}

/** Async, so that what a sink throws becomes a rejection. */
async function start(sink: WriteSink, offset: number, bytes: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
  return sink.submit(offset, bytes, signal === undefined ? undefined : { signal })
}

function powerOfTwo(name: string, value: number): number {
  if (!Number.isSafeInteger(value) || value < 1 || 2 ** Math.floor(Math.log2(value)) !== value) {
    throw new RangeError(`${name} must be a power of two, not ${value}`)
  }
  return value
}
