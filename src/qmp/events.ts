/** Events of a QMP monitor, each subscriber with a queue of its own. */
import { QmpError } from './error.ts'

/** Events that wait in a queue: whoever reads them at all is never that far behind. */
const maxQueued = 65_536

/** An event as QEMU sends it. */
export interface QmpEvent {
  /** For example `STOP`, `RESUME`, `MIGRATION`. */
  readonly event: string
  readonly data?: Readonly<Record<string, unknown>>
  readonly timestamp?: { readonly seconds: number; readonly microseconds: number }
}

/**
 * An iterator over events that starts collecting when it is made, not at the first `next()`, so
 * subscribe before the command that causes the event. Ends when the monitor closes; `return()` (or
 * leaving a `for await`) unsubscribes.
 */
export class EventSubscription implements AsyncIterableIterator<QmpEvent> {
  readonly #queue: QmpEvent[] = []
  readonly #waiting: { resolve: (result: IteratorResult<QmpEvent>) => void; reject: (reason: unknown) => void }[] = []
  readonly #names: ReadonlySet<string> | undefined
  readonly #onReturn: (subscription: EventSubscription) => void
  #ended = false
  #error: unknown

  /** `names`: only these events; all if left out. */
  constructor(names: readonly string[] | undefined, onReturn: (subscription: EventSubscription) => void) {
    this.#names = names === undefined ? undefined : new Set(names)
    this.#onReturn = onReturn
  }

  /** Queues the event, or gives it to whoever waits. */
  push(event: QmpEvent): void {
    if (this.#ended || this.#names?.has(event.event) === false) return
    const waiter = this.#waiting.shift()
    if (waiter === undefined && this.#queue.length >= maxQueued) this.end(new QmpError(`QMP: ${maxQueued} events wait to be read, and more came`))
    else if (waiter === undefined) this.#queue.push(event)
    else waiter.resolve({ done: false, value: event })
  }

  /** No more events; with an error, `next()` rejects once the queue is empty. */
  end(error?: unknown): void {
    this.#ended = true
    this.#error = error
    for (const waiter of this.#waiting.splice(0)) {
      if (error === undefined) waiter.resolve({ done: true, value: undefined })
      else waiter.reject(error)
    }
  }

  /** The next event; done when the subscription or the connection has ended. */
  next(): Promise<IteratorResult<QmpEvent>> {
    const event = this.#queue.shift()
    if (event !== undefined) return Promise.resolve({ done: false, value: event })
    if (this.#ended) {
      return this.#error === undefined
        ? Promise.resolve({ done: true, value: undefined })
        : Promise.reject(this.#error)
    }
    return new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }))
  }

  /** Ends the subscription. */
  return(): Promise<IteratorResult<QmpEvent>> {
    this.#queue.length = 0
    this.end()
    this.#onReturn(this)
    return Promise.resolve({ done: true, value: undefined })
  }

  /** The subscription itself. */
  [Symbol.asyncIterator](): this {
    return this
  }
}
