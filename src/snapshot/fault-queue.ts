/**
 * Faults in the order in which they came, a few in service at once. Owns how much a destination can make its source
 * hold: it may ask for all of its memory and read none of it.
 */

/** Faults in service at once: one is read while others are written. */
const atOnce = 4

/** A guest waits for these bytes. */
export interface Fault {
  readonly block: string
  readonly offset: number
  readonly length: number
  /** `performance.now()` of its arrival. */
  readonly arrived: number
}

/** Serves faults; whoever has less urgent things to send waits until it is {@link FaultQueue.idle}. */
export class FaultQueue {
  readonly #serve: (fault: Fault) => Promise<void>
  readonly #onError: (error: unknown) => void
  readonly #waiting = new Map<string, Fault>()
  #serving = 0
  #wake: (() => void) | undefined
  #failure: unknown

  /** `serve` resolves when the connection has taken what it was asked for. */
  constructor(serve: (fault: Fault) => Promise<void>, onError: (error: unknown) => void) {
    this.#serve = serve
    this.#onError = onError
  }

  /** Serves a fault in its turn. Of those that wait with the same `key`, which are served together, the first counts. */
  add(key: string, fault: Fault): void {
    if (!this.#waiting.has(key)) this.#waiting.set(key, fault)
    this.#next()
  }

  /** Resolves when no fault waits or is in service. One caller at a time. */
  async idle(): Promise<void> {
    while (this.#serving > 0 && this.#failure === undefined) {
      await new Promise<void>((resolve) => (this.#wake = resolve))
    }
    if (this.#failure !== undefined) throw this.#failure as Error
  }

  /** Serves none any more; {@link idle} rejects with `reason`. */
  fail(reason: unknown): void {
    this.#failure ??= reason
    this.#waiting.clear()
    this.#wake?.()
  }

  #next(): void {
    for (const [key, fault] of this.#waiting) {
      if (this.#serving === atOnce || this.#failure !== undefined) return
      this.#waiting.delete(key)
      this.#serving++
      this.#serve(fault)
        .catch((error: unknown) => this.#onError(error))
        .finally(() => this.#served())
    }
  }

  #served(): void {
    this.#serving--
    this.#next()
    if (this.#serving === 0) this.#wake?.()
  }
}
