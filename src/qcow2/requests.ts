/**
 * Guest requests in flight. Owns two rules: an operation on the whole image (a snapshot, a resize)
 * runs alone, and a freed cluster is not used again while a request that started before may still
 * be reading or writing it. Knows nothing of what requests do.
 */
import { Mutex } from '../core/lock.ts'

/** The requests that started between two calls of `drained`. */
class Generation {
  #running = 0
  #sealed = false
  #drained: (() => void) | undefined
  readonly #whenDrained: Promise<void> = new Promise((resolve) => {
    this.#drained = resolve
  })

  readonly #onFailure: (error: unknown) => void

  constructor(onFailure: (error: unknown) => void) {
    this.#onFailure = onFailure
  }

  begin(): void {
    this.#running++
  }

  /** Counts one request as ended. Bound, so that it can be given to a promise as it is. */
  readonly end = (): void => {
    if (--this.#running === 0 && this.#sealed) this.#drained?.()
  }

  readonly fail = (error: unknown): void => {
    this.#onFailure(error)
    this.end()
  }

  /** No more requests join. Resolves when all have ended. */
  seal(): Promise<void> {
    this.#sealed = true
    if (this.#running === 0) this.#drained?.()
    return this.#whenDrained
  }
}

export class Requests {
  #generation: Generation
  readonly #onFailure: (error: unknown) => void
  #earlier: Promise<void> = Promise.resolve()
  #gate: Promise<void> | undefined
  readonly #exclusive = new Mutex()

  /** True while an operation on the whole image holds requests back. */
  get held(): boolean {
    return this.#gate !== undefined
  }

  /** `onFailure` hears of every request that failed, before its caller does. */
  constructor(onFailure: (error: unknown) => void = () => undefined) {
    this.#onFailure = onFailure
    this.#generation = new Generation(onFailure)
  }

  /** Counts a request that has just been started, in the same turn, while requests are not held back. */
  track<T>(running: Promise<T>): Promise<T> {
    const generation = this.#generation
    generation.begin()
    running.then(generation.end, generation.fail)
    return running
  }

  /** Starts `task` as a request: at once, or when requests are no longer held back. */
  run<T>(task: () => Promise<T>): Promise<T> {
    return this.#gate === undefined ? this.track(task()) : this.#gate.then(() => this.run(task))
  }

  /** Resolves when every request that is in flight now has ended. */
  drained(): Promise<void> {
    const generation = this.#generation
    this.#generation = new Generation(this.#onFailure)
    const sealed = generation.seal()
    const earlier = this.#earlier
    this.#earlier = earlier.then(() => sealed)
    return this.#earlier
  }

  /** Runs `task` while no request is in flight; requests that come meanwhile wait. */
  exclusive<T>(task: () => Promise<T>): Promise<T> {
    return this.#exclusive.run(async () => {
      let open!: () => void
      this.#gate = new Promise((resolve) => {
        open = resolve
      })
      try {
        await this.drained()
        return await task()
      } finally {
        this.#gate = undefined
        open()
      }
    })
  }
}
