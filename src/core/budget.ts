/**
 * What looking at a stranger's bytes may cost. Owns the limit on the memory that a task keeps, which is counted before
 * it is taken; the turns of the event loop are {@link AbortPoints}.
 */
import { UnsupportedError } from './errors.ts'

/** Bytes a task may keep where nobody says otherwise. */
export const defaultBudget: number = 2 ** 32

/** Bytes that a task may keep. */
export class Budget {
  readonly #what: string
  readonly #most: number
  #taken = 0

  /** `what` begins the message of the error. */
  constructor(what: string, most: number = defaultBudget) {
    this.#what = what
    this.#most = most
  }

  /** @throws UnsupportedError (`ERR_UNSUPPORTED`) if more than the budget would be taken. */
  take(bytes: number): void {
    this.#taken += bytes
    if (this.#taken > this.#most) {
      throw new UnsupportedError(`${this.#what} would take more than ${this.#most} bytes of memory; a larger maxMemory allows more`, ['maxMemory'])
    }
  }
}
