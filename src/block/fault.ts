/** A device that goes wrong where a plan says so: what a caller does then can be tried. */
import { IoError } from '../core/errors.ts'
import type { BlockDevice, CallOptions, WriteOptions, WriteZeroesOptions } from './device.ts'
import { FilterDevice } from './filter.ts'
import type { RequestOperation } from './trace.ts'

/** What is to go wrong with a request. */
export type Fault =
  /** It fails without touching the medium. Default error: `ERR_IO`. */
  | { readonly kind: 'fail'; readonly error?: Error }
  /** Only its first `length` bytes are transferred, then it fails. A request without bytes just fails. */
  | { readonly kind: 'tear'; readonly length: number; readonly error?: Error }
  /** It is passed on when `until` resolves. */
  | { readonly kind: 'delay'; readonly until: Promise<unknown> }
  /** It does not complete; only its signal ends it. */
  | { readonly kind: 'never' }

/** A request as the plan sees it. */
export interface FaultRequest {
  readonly operation: RequestOperation
  /** Byte offset; 0 for a flush; the new size for a resize. */
  readonly offset: number
  /** Bytes; 0 for a flush and a resize. */
  readonly length: number
  /** Requests of any operation before this one. */
  readonly index: number
}

/** Decides over each request, in order of submission; `undefined` lets it pass. */
export type FaultPlan = (request: FaultRequest) => Fault | undefined

/** Passes the requests that `plan` lets pass, and fails, tears, delays or loses the others. */
export function fault(device: BlockDevice, plan: FaultPlan): BlockDevice {
  return new FaultDevice(device, plan)
}

class FaultDevice extends FilterDevice {
  readonly #plan: FaultPlan
  #requests = 0

  constructor(inner: BlockDevice, plan: FaultPlan) {
    super(inner)
    this.#plan = plan
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const part = (length: number): Promise<void> => this.inner.readInto(offset, target.subarray(0, length), options)
    return this.#perform('read', offset, target.length, part, options)
  }

  protected override onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    const part = (length: number): Promise<void> => this.inner.write(offset, source.subarray(0, length), options)
    return this.#perform('write', offset, source.length, part, options)
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    const part = (bytes: number): Promise<void> => this.inner.writeZeroes(offset, bytes, options)
    return this.#perform('write zeroes', offset, length, part, options)
  }

  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    const part = (bytes: number): Promise<void> => this.inner.discard(offset, bytes, options)
    return this.#perform('discard', offset, length, part, options)
  }

  protected override onFlush(options?: CallOptions): Promise<void> {
    return this.#perform('flush', 0, 0, () => this.inner.flush(options), options)
  }

  protected override onResize(size: number, options?: CallOptions): Promise<void> {
    return this.#perform('resize', size, 0, () => this.inner.resize(size, options), options)
  }

  /** A request that never completes is not waited for when the device is closed. */
  #perform(
    operation: RequestOperation,
    offset: number,
    length: number,
    part: (length: number) => Promise<void>,
    options: CallOptions | undefined,
  ): Promise<void> {
    const wrong = this.#plan({ operation, offset, length, index: this.#requests++ })
    const running = this.#end(wrong, operation, offset, length, part, options)
    return wrong?.kind === 'delay' || wrong?.kind === 'tear' ? this.inSteps(running) : running
  }

  async #end(
    wrong: Fault | undefined,
    operation: RequestOperation,
    offset: number,
    length: number,
    part: (length: number) => Promise<void>,
    options: CallOptions | undefined,
  ): Promise<void> {
    if (wrong === undefined) return part(length)
    const failure = (): Error => new IoError(operation, 'injected fault', { offset, length })
    switch (wrong.kind) {
      case 'fail':
        throw wrong.error ?? failure()
      case 'tear':
        if (length > 0) await part(Math.min(wrong.length, length))
        throw wrong.error ?? failure()
      case 'delay':
        await wrong.until
        return part(length)
      case 'never':
        return aborted(options?.signal)
    }
  }
}

/** Rejects when the signal is aborted, and never settles otherwise. */
function aborted(signal: AbortSignal | undefined): Promise<never> {
  return new Promise((_resolve, reject) => {
    signal?.addEventListener('abort', () => reject(signal.reason), { once: true })
  })
}
