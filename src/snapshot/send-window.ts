/**
 * Bounds how much background data can stand between an urgent page and the destination. A socket's own
 * buffers cannot be bounded from here, so each background chunk ends with a PING: its PONG tells that the
 * destination has read that far.
 */
import { ping } from '../migration/postcopy.ts'

/** Values of the first PING; smaller ones belong to the conversation. */
const firstValue = 0x100

/** Milliseconds without a request after which the guest counts as quiet. */
const quietAfter = 20
/** How much larger the window is then: the fill goes at full speed when nobody is likely to wait for it. */
const quietFactor = 8

/** Background bytes under way, at most `limit` while the guest asks for pages, some times more when it is quiet. */
export class SendWindow {
  readonly #limit: number
  #lastRequest = performance.now()
  readonly #chunks: { readonly value: number; readonly length: number }[] = []
  #used = 0
  #value = firstValue
  #wake: (() => void) | undefined
  #failure: unknown

  /** `limit` in bytes; a larger chunk goes alone. */
  constructor(limit: number) {
    this.#limit = limit
  }

  /** Resolves when a chunk of `length` bytes may go. One caller at a time. */
  async room(length: number): Promise<void> {
    while (this.#failure === undefined && this.#used > 0 && this.#used + length > this.#currentLimit) {
      await new Promise<void>((resolve) => (this.#wake = resolve))
    }
    if (this.#failure !== undefined) throw this.#failure as Error
  }

  /** The guest has asked for a page. */
  requested(): void {
    this.#lastRequest = performance.now()
  }

  /** Counts a chunk as sent and gives the PING to send behind it. */
  sent(length: number): Uint8Array {
    const value = this.#value
    this.#value = value === 0xffff_ffff ? firstValue : value + 1
    this.#chunks.push({ value, length })
    this.#used += length
    return ping(value)
  }

  /** The destination has read up to the PING with this value. */
  pong(value: number): void {
    const index = this.#chunks.findIndex((chunk) => chunk.value === value)
    if (index < 0) return // a PONG of the conversation
    for (const { length } of this.#chunks.splice(0, index + 1)) this.#used -= length
    this.#signal()
  }

  /** Rejects whoever waits, now and later. */
  fail(reason: unknown): void {
    this.#failure ??= reason
    this.#signal()
  }

  /** The guest has not asked for a while. */
  get isQuiet(): boolean {
    return performance.now() - this.#lastRequest > quietAfter
  }

  get #currentLimit(): number {
    return this.isQuiet ? this.#limit * quietFactor : this.#limit
  }

  #signal(): void {
    this.#wake?.()
    this.#wake = undefined
  }
}
