/** Keeps a record of every request that passes. */
import type { BlockDevice, CallOptions, WriteOptions, WriteZeroesOptions } from './device.ts'
import { FilterDevice } from './filter.ts'

/** What a request asks of a device. */
export type RequestOperation = 'read' | 'write' | 'write zeroes' | 'discard' | 'flush' | 'resize'

/** One request, from its submission on; `completed` and `error` are filled in when it settles. */
export interface TracedRequest {
  readonly operation: RequestOperation
  /** Byte offset; 0 for a flush; the new size for a resize. */
  readonly offset: number
  /** Bytes; 0 for a flush and a resize. */
  readonly length: number
  /** When the request was made, in milliseconds of the trace's clock. */
  readonly submitted: number
  /** When it settled; `undefined` while it is in flight. */
  completed: number | undefined
  /** Why it failed; `undefined` if it did not. */
  error: unknown
}

/** Where requests are recorded: an array, or anything else with a `push`. */
export interface TraceLog {
  /** Takes a request when it is submitted; the object is filled in when it settles. */
  push(request: TracedRequest): unknown
}

/** Options of {@link trace}. */
export interface TraceOptions {
  /** Milliseconds; default `performance.now`. A simulated disk has its own. */
  readonly clock?: (() => number) | undefined
}

/** Passes everything and pushes each request to `log` in order of submission. */
export function trace(device: BlockDevice, log: TraceLog, options: TraceOptions = {}): BlockDevice {
  return new TraceDevice(device, log, options.clock ?? (() => performance.now()))
}

class TraceDevice extends FilterDevice {
  readonly #log: TraceLog
  readonly #clock: () => number

  constructor(inner: BlockDevice, log: TraceLog, clock: () => number) {
    super(inner)
    this.#log = log
    this.#clock = clock
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    return this.#record('read', offset, target.length, () => this.inner.readInto(offset, target, options))
  }

  protected override onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.#record('write', offset, source.length, () => this.inner.write(offset, source, options))
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    return this.#record('write zeroes', offset, length, () => this.inner.writeZeroes(offset, length, options))
  }

  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.#record('discard', offset, length, () => this.inner.discard(offset, length, options))
  }

  protected override onFlush(options?: CallOptions): Promise<void> {
    return this.#record('flush', 0, 0, () => this.inner.flush(options))
  }

  protected override onResize(size: number, options?: CallOptions): Promise<void> {
    return this.#record('resize', size, 0, () => this.inner.resize(size, options))
  }

  async #record(operation: RequestOperation, offset: number, length: number, perform: () => Promise<void>): Promise<void> {
    const request: TracedRequest = {
      operation,
      offset,
      length,
      submitted: this.#clock(),
      completed: undefined,
      error: undefined,
    }
    this.#log.push(request)
    try {
      await perform()
    } catch (error) {
      request.error = error
      throw error
    } finally {
      request.completed = this.#clock()
    }
  }
}
