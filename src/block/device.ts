/**
 * The contract everything in this library stands on: a `BlockDevice` is a run of bytes that can be
 * read, written, zeroed, discarded, flushed and mapped. Owns the rules each request must obey; knows
 * nothing of files, formats or caches.
 */
import { Qcow2Error } from '../core/errors.ts'
import { nameOf, Resource } from '../core/resource.ts'
import { InFlight } from '../core/in-flight.ts'
import { allocateAligned, isMemoryAligned, zeroes } from './slab.ts'

/** What every asynchronous call takes. */
export interface CallOptions {
  /** Aborting rejects with `signal.reason`; requests already handed to the system finish first. */
  readonly signal?: AbortSignal | undefined
}

/** Options of a call that changes data. */
export interface WriteOptions extends CallOptions {
  /** Force unit access: the data is durable when the call resolves, as if followed by a flush. */
  readonly fua?: boolean | undefined
}

/** Options of {@link BlockDevice.writeZeroes}. */
export interface WriteZeroesOptions extends WriteOptions {
  /** The space may be given back; without it an existing allocation is kept. */
  readonly unmap?: boolean | undefined
}

/** Options of {@link BlockDevice.map}. */
export interface MapOptions extends CallOptions {
  /** First byte; default 0. */
  readonly offset?: number | undefined
  /** Bytes from `offset`; default to the end. */
  readonly length?: number | undefined
}

/** What a device asks of its callers, and what suits it. All in bytes. */
export interface BlockLimits {
  /**
   * Offsets and lengths must be multiples of this power of two; 1 takes anything. The last read of a
   * device whose size is no multiple may end at its size.
   */
  readonly requestAlignment: number
  /**
   * Buffers must start at a multiple of this power of two in memory; 1 takes anything. Memory with a
   * known alignment comes from `allocateAligned()`.
   */
  readonly memoryAlignment: number
  /** Request size at which sequential transfer is near its best. */
  readonly optimalTransfer: number
  /** Granularity at which zeroes and discards give space back; 0 if they never do. */
  readonly discardAlignment: number
}

/** In one word, how an extent reads. Derived from the flags of {@link Extent}. */
export type ExtentKind = 'data' | 'zero' | 'unallocated' | 'compressed'

/** A run of bytes that all read the same way, with the flags `qemu-img map` gives them. */
export interface Extent {
  /** First byte, on the device that was mapped. */
  readonly start: number
  /** Length in bytes, at least 1. */
  readonly length: number
  /** 0: this device; n: found n backing files further down. */
  readonly depth: number
  /** Allocated in the image at `depth` (data, or explicitly zero). */
  readonly present: boolean
  /** Known to read as zeroes. */
  readonly zero: boolean
  /** Has bytes stored for it. */
  readonly data: boolean
  /** Stored compressed. */
  readonly compressed: boolean
  /** Where the bytes are in the host file, when they can be read there as they are. */
  readonly offset?: number
  readonly kind: ExtentKind
}

/**
 * A run of bytes. The outer device of a stack owns the inner one and closes it.
 *
 * Every call checks its range (`RangeError` for a caller's mistake: negative, not an integer, past
 * the end), `ERR_CLOSED`, `ERR_READ_ONLY` and `ERR_ALIGNMENT` before anything is done; a failing
 * medium is `ERR_IO` (an {@link IoError} with operation, offset and length). Requests may be issued
 * concurrently; writes that overlap each other in flight land in no particular order.
 */
export interface BlockDevice extends AsyncDisposable {
  /** Size in bytes. Getters do no I/O. */
  readonly size: number
  /** Changes are refused with `ERR_READ_ONLY`. */
  readonly readOnly: boolean
  /** A write that reaches past `size` extends the device (a file does, a disk does not). */
  readonly growable: boolean
  /** What the device demands of requests, and what suits it. */
  readonly limits: BlockLimits
  /** True as soon as `close` was called. */
  readonly closed: boolean
  /** Path of the local file that the device shows as a whole, if it was opened by one: what names in it are relative to. */
  readonly path?: string | undefined
  /** Which local file the device shows as a whole, whatever path leads there: its device and inode. */
  readonly identity?: string | undefined

  /** Fills `target` with the bytes at `offset`. Reading past `size` is a `RangeError`. */
  readInto(offset: number, target: Uint8Array, options?: CallOptions): Promise<void>
  /** The bytes `[offset, offset + length)` in a new array, in memory as the device demands it. */
  read(offset: number, length: number, options?: CallOptions): Promise<Uint8Array>
  /** Stores `source` at `offset`. `source` must not change until the call settles. */
  write(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void>
  /** Makes the range read as zeroes, without transferring them where the device can. */
  writeZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void>
  /** Tells that the range is no longer needed. It then reads as zeroes or unchanged, as the device documents. */
  discard(offset: number, length: number, options?: CallOptions): Promise<void>
  /** When it resolves, every write that resolved before the call is durable. */
  flush(options?: CallOptions): Promise<void>
  /** Changes `size`; new bytes read as zeroes. `ERR_UNSUPPORTED` where the device has a fixed size. */
  resize(size: number, options?: CallOptions): Promise<void>
  /** The extents of the range, in order, without gaps, neighbours that differ in nothing merged. */
  map(options?: MapOptions): AsyncIterable<Extent>
  /** Waits for the requests under way, then closes the device and those it owns. What was not flushed may not survive a power cut. */
  close(): Promise<void>
}

/** The limits of a device that takes any request. */
export const anyRequest: BlockLimits = {
  requestAlignment: 1,
  memoryAlignment: 1,
  optimalTransfer: 1 << 20,
  discardAlignment: 0,
}

/** An extent with its `kind` derived from the flags. */
export function extent(flags: Omit<Extent, 'kind'>): Extent {
  return { ...flags, kind: kindOf(flags) }
}

function kindOf(flags: Omit<Extent, 'kind'>): ExtentKind {
  if (flags.compressed) return 'compressed'
  if (flags.data) return 'data'
  return flags.present ? 'zero' : 'unallocated'
}

/**
 * The checks every device shares. A driver implements the protected `on…` methods, which see only
 * valid, non-empty requests; the defaults suit a device that can only read, write and flush.
 */
export abstract class BaseDevice extends Resource implements BlockDevice {
  #steps: InFlight | undefined

  abstract get size(): number
  abstract get readOnly(): boolean
  abstract get limits(): BlockLimits

  get growable(): boolean {
    return false
  }

  /** @internal The devices that this one is made of. */
  get below(): readonly BlockDevice[] {
    return []
  }

  readInto(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const problem = this.#problem(offset, target.length, target, false, options)
    if (problem !== undefined) return Promise.reject(problem)
    return target.length === 0 ? done : this.onRead(offset, target, options)
  }

  async read(offset: number, length: number, options?: CallOptions): Promise<Uint8Array> {
    checkRange(offset, length, this.size)
    const target = this.limits.memoryAlignment > 1 ? allocateAligned(length) : new Uint8Array(length)
    await this.readInto(offset, target, options)
    return target
  }

  write(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    const problem = this.#problem(offset, source.length, source, true, options)
    if (problem !== undefined) return Promise.reject(problem)
    if (source.length === 0) return done
    if (options?.fua !== true) return this.onWrite(offset, source, options)
    return this.inSteps(this.onWrite(offset, source, { signal: options.signal }).then(() => this.onFlush(options)))
  }

  writeZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    const problem = this.#problem(offset, length, undefined, true, options)
    if (problem !== undefined) return Promise.reject(problem)
    if (length === 0) return done
    if (options?.fua !== true) return this.onWriteZeroes(offset, length, options)
    const { signal, unmap } = options
    return this.inSteps(this.onWriteZeroes(offset, length, { signal, unmap }).then(() => this.onFlush(options)))
  }

  discard(offset: number, length: number, options?: CallOptions): Promise<void> {
    const problem = this.#problem(offset, length, undefined, true, options, false)
    if (problem !== undefined) return Promise.reject(problem)
    return length === 0 ? done : this.onDiscard(offset, length, options)
  }

  flush(options?: CallOptions): Promise<void> {
    if (this.closed) return this.#rejectClosed()
    if (options?.signal?.aborted === true) return Promise.reject(options.signal.reason as Error)
    return this.readOnly ? done : this.onFlush(options)
  }

  resize(size: number, options?: CallOptions): Promise<void> {
    if (this.closed) return this.#rejectClosed()
    if (options?.signal?.aborted === true) return Promise.reject(options.signal.reason as Error)
    if (!Number.isSafeInteger(size) || size < 0) {
      return Promise.reject(new RangeError(`size must be an integer from 0 to 2^53 - 1, not ${size}`))
    }
    if (this.readOnly) return Promise.reject(readOnlyError(this))
    return this.onResize(size, options)
  }

  async *map(options: MapOptions = {}): AsyncGenerator<Extent, void, undefined> {
    this.assertOpen()
    const offset = options.offset ?? 0
    const length = options.length ?? this.size - offset
    checkRange(offset, length, this.size)
    options.signal?.throwIfAborted()
    if (length > 0) yield* this.onMap(offset, length, options)
  }

  /** Fills `target`; the request is valid and not empty. */
  protected abstract onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void>
  /** Stores `source`; the request is valid and not empty. `fua` is taken care of. */
  protected abstract onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void>
  /** Makes completed writes durable. Not called on a read-only device. */
  protected abstract onFlush(options?: CallOptions): Promise<void>

  /**
   * For a request that makes several of another device, one after the other: `close` waits for it. Requests that are made
   * in one go need no such care, because what they are made of waits for them.
   */
  protected inSteps<T>(running: Promise<T>): Promise<T> {
    this.#steps ??= new InFlight()
    this.#steps.add(running)
    return running
  }

  protected override settling(): Promise<void> | undefined {
    // whoever made a request gets its error
    return this.#steps === undefined || this.#steps.count === 0 ? undefined : this.#steps.settle().catch(() => undefined)
  }

  /** Default: writes zeroes in bounded pieces. */
  protected onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    return this.inSteps(this.#writeZeroes(offset, length, options))
  }

  async #writeZeroes(offset: number, length: number, options: WriteZeroesOptions | undefined): Promise<void> {
    const piece = 1 << 20
    for (let at = 0; at < length; at += piece) {
      options?.signal?.throwIfAborted()
      await this.onWrite(offset + at, zeroes(Math.min(piece, length - at)), options)
    }
  }

  /** Default: does nothing; the range reads unchanged. */
  protected onDiscard(_offset: number, _length: number, _options?: CallOptions): Promise<void> {
    return done
  }

  /** Default: refuses with `ERR_UNSUPPORTED`. */
  protected onResize(_size: number, _options?: CallOptions): Promise<void> {
    return Promise.reject(new Qcow2Error('ERR_UNSUPPORTED', `${nameOf(this)} has a fixed size`))
  }

  /** Default: one extent of data. */
  // eslint-disable-next-line @typescript-eslint/require-await -- overrides do await
  protected async *onMap(offset: number, length: number, _options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    yield extent({ start: offset, length, depth: 0, present: true, zero: false, data: true, compressed: false, offset })
  }

  #problem(
    offset: number,
    length: number,
    memory: Uint8Array | undefined,
    writes: boolean,
    options: CallOptions | undefined,
    aligned = true,
  ): Error | undefined {
    if (this.closed) return new Qcow2Error('ERR_CLOSED', `${nameOf(this)} is closed`)
    if (writes && this.readOnly) return readOnlyError(this)
    if (options?.signal?.aborted === true) return options.signal.reason as Error
    const end = writes && this.growable ? Number.MAX_SAFE_INTEGER : this.size
    if (memory !== undefined && !isBytes(memory)) return new TypeError(`bytes must be a Uint8Array, not ${typeof memory}`)
    const range = rangeProblem(offset, length, end)
    if (range !== undefined) return range
    const { requestAlignment, memoryAlignment } = this.limits
    const last = !writes && offset + length === this.size
    if (
      aligned &&
      requestAlignment > 1 &&
      (offset % requestAlignment !== 0 || (length % requestAlignment !== 0 && !last))
    ) {
      return new Qcow2Error(
        'ERR_ALIGNMENT',
        `request of ${length} bytes at offset ${offset}: both must be multiples of ${requestAlignment}; wrap the device in pad() to send any request`,
      )
    }
    if (memory !== undefined && !isMemoryAligned(memory, memoryAlignment)) {
      return new Qcow2Error(
        'ERR_ALIGNMENT',
        `buffer must start at a multiple of ${memoryAlignment} in memory; take it from allocateAligned(), or wrap the device in pad()`,
      )
    }
    return undefined
  }

  #rejectClosed(): Promise<never> {
    return Promise.reject(new Qcow2Error('ERR_CLOSED', `${nameOf(this)} is closed`))
  }
}

const done: Promise<void> = Promise.resolve()

/** Not by `instanceof`: arrays of another realm are bytes too. */
function isBytes(memory: unknown): boolean {
  return ArrayBuffer.isView(memory) && (memory as Uint8Array).BYTES_PER_ELEMENT === 1
}

function readOnlyError(device: object): Qcow2Error {
  return new Qcow2Error('ERR_READ_ONLY', `${nameOf(device)} is read-only`)
}

function rangeProblem(offset: number, length: number, end: number): RangeError | undefined {
  if (!Number.isSafeInteger(offset) || offset < 0) {
    return new RangeError(`offset must be an integer from 0 to 2^53 - 1, not ${offset}`)
  }
  if (!Number.isSafeInteger(length) || length < 0) {
    return new RangeError(`length must be an integer from 0 to 2^53 - 1, not ${length}`)
  }
  if (offset + length > end) {
    return new RangeError(`${length} byte${length === 1 ? '' : 's'} at offset ${offset} reach past the end of the device (${end} bytes)`)
  }
  return undefined
}

/** Throws a `RangeError` unless `[offset, offset + length)` lies within `[0, size)`. */
export function checkRange(offset: number, length: number, size: number): void {
  const problem = rangeProblem(offset, length, size)
  if (problem !== undefined) throw problem
}
