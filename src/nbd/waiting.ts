/** How long a client waits for its server. Owns the clocks; knows nothing of the protocol. */
import { IoError, type IoOperation } from '../core/errors.ts'

/** Bounds of waiting. */
export interface WaitOptions {
  readonly signal?: AbortSignal | undefined
  /** Milliseconds; 0 for ever. */
  readonly timeout: number
}

/** What to say of a server that does not answer. */
export function silence(operation: IoOperation, timeout: number): IoError {
  const hint = operation === 'open' ? '; one that serves a client at a time may have another' : ''
  return new IoError(operation, `the server said nothing for ${timeout} ms${hint}`, { name: 'NBD' })
}

/**
 * The outcome of `work`, or the first of signal and clock. Whoever calls this ends what `work` uses, then.
 * @throws IoError `ERR_IO` when the time is over; `signal.reason` when aborted.
 */
export function within<T>(work: Promise<T>, { signal, timeout }: WaitOptions): Promise<T> {
  return new Promise((resolve, reject) => {
    const onAbort = (): void => reject(signal?.reason as Error)
    const timer = timeout > 0 ? setTimeout(() => reject(silence('open', timeout)), timeout) : undefined
    if (signal?.aborted === true) onAbort()
    signal?.addEventListener('abort', onAbort, { once: true })
    const settle = (): void => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
    }
    work.finally(settle).then(resolve, reject)
  })
}

/** Notices that a server stays silent while an answer is due. One timer for any number of requests. */
export class SilenceTimer {
  readonly #timeout: number
  readonly #isDue: () => boolean
  readonly #onSilence: () => void
  #last = 0
  #timer: ReturnType<typeof setTimeout> | undefined

  /** @param timeout in milliseconds; 0 for ever */
  constructor(timeout: number, isDue: () => boolean, onSilence: () => void) {
    this.#timeout = timeout
    this.#isDue = isDue
    this.#onSilence = onSilence
  }

  /** A request was made. The time runs from the last sign of life: call `heard` too if nothing was due before. */
  start(): void {
    if (this.#timeout > 0) this.#timer ??= setTimeout(this.#look, this.#timeout)
  }

  /** There was a sign of life. */
  heard(): void {
    this.#last = performance.now()
  }

  stop(): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
  }

  readonly #look = (): void => {
    this.#timer = undefined
    if (!this.#isDue()) return
    const left = this.#last + this.#timeout - performance.now()
    if (left > 0) this.#timer = setTimeout(this.#look, left)
    else this.#onSilence()
  }
}
