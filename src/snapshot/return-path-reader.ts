/**
 * Listens to a migration's destination from the first byte on. Owns who waits for which message and for
 * how long; knows nothing of what the messages are answered with.
 */
import { Qcow2Error } from '../core/errors.ts'
import { ReturnPathParser, type ReturnPathMessage } from '../migration/return-path.ts'
import type { DuplexStream } from '../qmp/duplex.ts'

type Message<Kind extends ReturnPathMessage['kind']> = Extract<ReturnPathMessage, { kind: Kind }>

interface Waiter {
  readonly matches: (message: ReturnPathMessage) => boolean
  readonly resolve: (message: ReturnPathMessage) => void
  readonly reject: (reason: unknown) => void
}

/** The destination's side of a connection, as messages. */
export class ReturnPathReader {
  readonly #parser = new ReturnPathParser()
  readonly #onMessage: (message: ReturnPathMessage) => void
  readonly #onFailure: (reason: unknown) => void
  readonly #waiters = new Set<Waiter>()
  #failure: unknown
  #lastMessage = performance.now()

  /** `onMessage` sees every message, before those who wait for it; `onFailure` why no more come. */
  constructor(
    stream: DuplexStream,
    onMessage: (message: ReturnPathMessage) => void,
    onFailure: (reason: unknown) => void,
  ) {
    this.#onMessage = onMessage
    this.#onFailure = onFailure
    stream.on('data', (chunk: Uint8Array) => this.#receive(chunk))
    stream.on('error', (cause: Error) => this.fail(lost(`the connection to the destination failed: ${cause.message}`, cause)))
    const gone = (): void => this.fail(lost('the destination closed the connection'))
    stream.on('end', gone)
    stream.on('close', gone)
  }

  /** Why no more messages come; undefined while they do. */
  get failure(): unknown {
    return this.#failure
  }

  /** Rejects everyone who waits, now and later. The first reason stays. */
  fail(reason: unknown): void {
    if (this.#failure !== undefined) return
    this.#failure = reason
    for (const waiter of this.#waiters) waiter.reject(reason)
    this.#waiters.clear()
    this.#onFailure(reason)
  }

  /**
   * The next message of `kind` (with `value`, if given).
   * @throws Qcow2Error `ERR_STREAM` with `complaint` when the destination has been silent for `silence` milliseconds.
   */
  async expect<Kind extends ReturnPathMessage['kind']>(
    kind: Kind,
    silence: number,
    complaint: string,
    value?: number,
  ): Promise<Message<Kind>> {
    if (this.#failure !== undefined) throw this.#failure as Error
    const asked = performance.now()
    let timer: ReturnType<typeof setTimeout> | undefined
    try {
      return (await new Promise<ReturnPathMessage>((resolve, reject) => {
        const waiter: Waiter = {
          matches: (message) => message.kind === kind && (value === undefined || ('value' in message && message.value === value)),
          resolve,
          reject,
        }
        this.#waiters.add(waiter)
        const check = (): void => {
          const quiet = performance.now() - Math.max(asked, this.#lastMessage)
          if (quiet < silence) {
            timer = setTimeout(check, silence - quiet)
            return
          }
          this.#waiters.delete(waiter)
          reject(new Qcow2Error('ERR_STREAM', `${complaint}: no word from the destination in ${silence} ms`))
        }
        timer = setTimeout(check, silence)
      })) as Message<Kind>
    } finally {
      clearTimeout(timer)
    }
  }

  #receive(chunk: Uint8Array): void {
    if (this.#failure !== undefined) return
    this.#lastMessage = performance.now()
    try {
      for (const message of this.#parser.push(chunk)) this.#dispatch(message)
    } catch (error) {
      this.fail(error)
    }
  }

  #dispatch(message: ReturnPathMessage): void {
    this.#onMessage(message)
    for (const waiter of this.#waiters) {
      if (!waiter.matches(message)) continue
      this.#waiters.delete(waiter)
      waiter.resolve(message)
    }
  }
}

function lost(message: string, cause?: unknown): Qcow2Error {
  return new Qcow2Error('ERR_STREAM', message, cause === undefined ? undefined : { cause })
}
