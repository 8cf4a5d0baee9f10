/**
 * The lifecycle every closable thing shares: open, closing, closed. Owns the rule that `close` is
 * idempotent and that later calls fail with `ERR_CLOSED`; knows nothing of what is closed.
 */
import './dispose.ts'
import { Qcow2Error } from './errors.ts'

/** Something that holds resources until it is closed, by `close()` or by `await using`. */
export abstract class Resource implements AsyncDisposable {
  #closing: Promise<void> | undefined

  /** True as soon as `close` was called. */
  get closed(): boolean {
    return this.#closing !== undefined
  }

  /** Releases everything held. Every call returns the outcome of the first. */
  close(): Promise<void> {
    if (this.#closing !== undefined) return this.#closing
    const ending = this.settling()
    this.#closing = ending === undefined ? this.onClose() : ending.then(() => this.onClose())
    return this.#closing
  }

  /** What `await using` calls: {@link close}. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  /** What has to end before `onClose`; undefined: nothing. Asked once, at the first `close`. */
  protected settling(): Promise<void> | undefined {
    return undefined
  }

  /** Runs once, at the first `close`. */
  protected abstract onClose(): Promise<void>

  /** Throws `ERR_CLOSED` after `close` was called. */
  protected assertOpen(): void {
    if (this.#closing !== undefined) {
      throw new Qcow2Error('ERR_CLOSED', `${nameOf(this)} is closed`)
    }
  }
}

/** What a thing is, for messages: its class, without the underscore that bundlers may put before the name. */
export function nameOf(thing: object): string {
  return thing.constructor.name.replace(/^_/, '')
}
