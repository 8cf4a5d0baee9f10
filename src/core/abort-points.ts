/**
 * The points of a long task at which it may be aborted. Owns the rule that a task which computes more than
 * it waits lets the event loop turn now and then: otherwise neither a timer nor a key press could abort it.
 */

/** Milliseconds without a turn of the event loop. */
const longestStretch = 20

export class AbortPoints {
  readonly #signal: AbortSignal | undefined
  #turned: number

  /** Without a signal the points cost nothing. */
  constructor(signal: AbortSignal | undefined) {
    this.#signal = signal
    this.#turned = signal === undefined ? 0 : performance.now()
  }

  /** Throws `signal.reason` once the signal is aborted. Gives a promise only when the event loop has to turn. */
  pass(): Promise<void> | undefined {
    const signal = this.#signal
    if (signal === undefined) return undefined
    signal.throwIfAborted()
    return performance.now() - this.#turned < longestStretch ? undefined : this.#turn(signal)
  }

  async #turn(signal: AbortSignal): Promise<void> {
    await new Promise((resolve) => setTimeout(resolve, 0))
    this.#turned = performance.now()
    signal.throwIfAborted()
  }
}
