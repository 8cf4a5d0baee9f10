/** A number of things that may be in use at once: takers wait, first come, first served. */
export class Budget {
  readonly #limit: number
  #used = 0
  readonly #waiting: { amount: number; resolve: () => void }[] = []

  constructor(limit: number) {
    this.#limit = limit
  }

  /** Resolves when `amount` (at most the limit) fits. */
  take(amount: number): Promise<void> {
    if (this.#waiting.length === 0 && this.#used + amount <= this.#limit) {
      this.#used += amount
      return Promise.resolve()
    }
    return new Promise((resolve) => this.#waiting.push({ amount, resolve }))
  }

  give(amount: number): void {
    this.#used -= amount
    for (;;) {
      const next = this.#waiting[0]
      if (next === undefined || this.#used + next.amount > this.#limit) return
      this.#waiting.shift()
      this.#used += next.amount
      next.resolve()
    }
  }
}
