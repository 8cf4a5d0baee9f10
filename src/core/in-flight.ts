/**
 * The parts of one request that run at the same time. Owns the rule that a request has not ended,
 * also not with an error, while a part of it may still touch the caller's memory.
 */
export class InFlight {
  #running = 0
  #failed = false
  #error: unknown
  #wake: (() => void) | undefined

  /** Parts that have not ended. */
  get count(): number {
    return this.#running
  }

  add(part: Promise<unknown>): void {
    this.#running++
    part.then(this.#end, this.#fail)
  }

  /** Resolves when at most `left` parts are running; throws the first error once none is. */
  async settle(left = 0): Promise<void> {
    while (this.#running > (this.#failed ? 0 : left)) {
      await new Promise<void>((resolve) => {
        this.#wake = resolve
      })
    }
    if (this.#failed) throw this.#error
  }

  readonly #end = (): void => {
    this.#running--
    this.#wake?.()
  }

  readonly #fail = (error: unknown): void => {
    if (!this.#failed) this.#error = error
    this.#failed = true
    this.#end()
  }
}
