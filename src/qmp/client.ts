/**
 * A client of QEMU's machine protocol (QMP): greeting, capabilities, commands, events. Owns the
 * conversation on one connection; knows nothing of what the commands are for.
 */
import { Qcow2Error } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import type { ExecuteOptions, QmpArguments, QmpGreeting, QmpReturn } from './commands.ts'
import { isDuplexStream, type DuplexStream } from './duplex.ts'
import { QmpError } from './error.ts'
import { EventSubscription, type QmpEvent } from './events.ts'
import { MessageSplitter } from './lines.ts'
import { checkAnswer, isGreeting } from './shapes.ts'
import { connectSocket, describeAddress, type SocketAddress } from './socket.ts'

/**
 * What the rest of this library asks of a monitor. {@link QmpClient} has it; any object of the same
 * shape (another client, a connection shared through libvirt, a fake) serves instead.
 */
export interface Qmp {
  /** Runs a command and gives its answer. A refusal is `ERR_QMP` with QEMU's own words. */
  execute<Name extends string>(
    command: Name,
    parameters?: QmpArguments<Name>,
    options?: ExecuteOptions,
  ): Promise<QmpReturn<Name>>
  /** Events from this moment on; only those named, if names are given. */
  events(...names: string[]): AsyncIterableIterator<QmpEvent>
}

/** Options of {@link QmpClient.connect}. */
export interface QmpConnectOptions {
  readonly signal?: AbortSignal | undefined
  /** Milliseconds for the connection, for the greeting and for each answer; default 30 000 (10 000 for the greeting), 0 for ever. */
  readonly timeout?: number | undefined
  /** Milliseconds to wait for the socket to appear and to listen, for a QEMU that is being started; default 0. */
  readonly wait?: number | undefined
  /** Ask for out-of-band execution where QEMU offers it; default true. */
  readonly outOfBand?: boolean | undefined
}

/** QEMU greets at once. Where it does not, another client has the monitor, most likely: sooner told than other silence. */
const greetingTimeout = 10_000

interface Pending {
  readonly command: string
  readonly resolve: (value: unknown) => void
  readonly reject: (reason: unknown) => void
}

interface Message {
  readonly QMP?: { readonly version: QmpGreeting['version']; readonly capabilities: readonly string[] }
  readonly id?: unknown
  readonly return?: unknown
  readonly error?: { readonly class?: unknown; readonly desc?: unknown }
  readonly event?: unknown
}

/**
 * A monitor connection.
 *
 * ```ts
 * await using qmp = await QmpClient.connect('vm.qmp')
 * const { status } = await qmp.execute('query-status')
 * for await (const event of qmp.events('STOP', 'RESUME')) console.log(event.event)
 * ```
 */
export class QmpClient extends Resource implements Qmp {
  readonly #stream: DuplexStream
  readonly #name: string
  readonly #timeout: number
  readonly #messages = new MessageSplitter()
  readonly #pending = new Map<number, Pending>()
  readonly #subscriptions = new Set<EventSubscription>()
  #nextId = 1
  #greeting: QmpGreeting | undefined
  #awaitsGreeting: Pending | undefined
  #ended: QmpError | undefined
  #outOfBand = false

  private constructor(stream: DuplexStream, name: string, timeout: number) {
    super()
    this.#stream = stream
    this.#name = name
    this.#timeout = timeout
    stream.on('data', (chunk: Uint8Array) => this.#receive(chunk))
    stream.on('error', (cause: Error) => this.#end(new QmpError(`${name}: connection failed: ${cause.message}`, { cause })))
    const gone = (): void => this.#end(new QmpError(`${name}: QEMU closed the monitor connection`))
    stream.on('end', gone)
    stream.on('close', gone)
  }

  /**
   * Connects, reads the greeting and negotiates capabilities. `target` is a unix socket's path, a TCP
   * address, or a connected two-way stream (which the client then owns).
   * @throws QmpError (`ERR_QMP`): nothing listens, or what listens is not a QMP monitor; Qcow2Error `ERR_BUSY`: no greeting
   *   in time, because a monitor serves one client at a time and another has it.
   */
  static async connect(target: SocketAddress | DuplexStream, options: QmpConnectOptions = {}): Promise<QmpClient> {
    const { timeout = 30_000, outOfBand = true, signal, wait } = options
    const given = isDuplexStream(target)
    const name = given ? 'QMP' : `QMP ${describeAddress(target)}`
    const stream = given ? target : await connectSocket(target, { signal, timeout, wait })
    const client = new QmpClient(stream, name, timeout)
    try {
      const greeting = await client.#awaitGreeting(options.timeout ?? greetingTimeout, given, signal)
      const enable = outOfBand && greeting.capabilities.includes('oob') ? ['oob'] : []
      await client.execute('qmp_capabilities', enable.length > 0 ? { enable } : {}, { signal })
      client.#outOfBand = enable.length > 0
    } catch (error) {
      await client.close()
      throw error
    }
    return client
  }

  /** QEMU's version and what the monitor offers. */
  get greeting(): QmpGreeting {
    return this.#greeting!
  }

  /** True when out-of-band commands were negotiated. */
  get outOfBand(): boolean {
    return this.#outOfBand
  }

  /**
   * Runs a command.
   * @throws QmpError (`ERR_QMP`): QEMU refused it, did not answer in time (the command may still take
   *   effect), or closed the connection; `ERR_CLOSED` after `close`; `signal.reason` when aborted.
   */
  execute<Name extends string>(
    command: Name,
    parameters?: QmpArguments<Name>,
    options: ExecuteOptions = {},
  ): Promise<QmpReturn<Name>> {
    if (this.closed) return Promise.reject(new Qcow2Error('ERR_CLOSED', 'QmpClient is closed'))
    if (this.#ended !== undefined) return Promise.reject(this.#ended)
    const { signal, timeout = this.#timeout } = options
    const verb = options.outOfBand === true && this.#outOfBand ? 'exec-oob' : 'execute'
    const id = this.#nextId++
    const message = { [verb]: command, id, ...(parameters === undefined ? {} : { arguments: parameters }) }
    const answer = this.#await(command, timeout, signal, (pending) => {
      this.#pending.set(id, pending)
      this.#stream.write(`${JSON.stringify(message)}\n`)
      return () => this.#pending.delete(id)
    })
    return answer as Promise<QmpReturn<Name>>
  }

  /** Events from this call on. Leave the loop, or call `return()`, to unsubscribe. */
  events(...names: string[]): EventSubscription {
    this.assertOpen()
    const subscription = new EventSubscription(names.length === 0 ? undefined : names, (ended) => {
      this.#subscriptions.delete(ended)
    })
    if (this.#ended === undefined) this.#subscriptions.add(subscription)
    else subscription.end(this.#ended)
    return subscription
  }

  protected onClose(): Promise<void> {
    const closed = new Qcow2Error('ERR_CLOSED', 'QmpClient was closed')
    for (const { reject } of this.#waiting()) reject(closed)
    for (const subscription of this.#subscriptions) subscription.end()
    this.#stream.destroy()
    return Promise.resolve()
  }

  async #awaitGreeting(timeout: number, given: boolean, signal: AbortSignal | undefined): Promise<QmpGreeting> {
    if (this.#ended !== undefined) throw this.#ended
    if (this.#greeting !== undefined) return this.#greeting
    const command = 'the greeting'
    const greeting = this.#await(command, timeout, signal, (pending) => {
      this.#awaitsGreeting = pending
      return () => (this.#awaitsGreeting = undefined)
    })
    if (given) return greeting as Promise<QmpGreeting>
    return greeting.catch((error: unknown) => {
      if (this.#ended !== undefined || signal?.aborted === true) throw error
      const message = `${this.#name}: no answer to the greeting in ${timeout} ms: a monitor serves one client at a time, and another has this one; end it, or give QEMU a second monitor`
      throw new Qcow2Error('ERR_BUSY', message, { cause: error })
    }) as Promise<QmpGreeting>
  }

  *#waiting(): Generator<Pending, void, undefined> {
    if (this.#awaitsGreeting !== undefined) yield this.#awaitsGreeting
    yield* [...this.#pending.values()]
  }

  /** One promise that an answer, the clock or the signal settles, and that cleans up behind itself. */
  #await(
    command: string,
    timeout: number,
    signal: AbortSignal | undefined,
    start: (pending: Pending) => () => unknown,
  ): Promise<unknown> {
    if (signal?.aborted === true) return Promise.reject(signal.reason as Error)
    return new Promise((resolve, reject) => {
      const onAbort = (): void => settle(() => reject(signal?.reason as Error))
      const timer =
        timeout > 0
          ? setTimeout(() => {
              const message = `${this.#name}: no answer to ${command} in ${timeout} ms`
              settle(() => reject(new QmpError(message, { command })))
            }, timeout)
          : undefined
      let forget = (): void => undefined
      const settle = (finish: () => void): void => {
        clearTimeout(timer)
        signal?.removeEventListener('abort', onAbort)
        forget()
        finish()
      }
      signal?.addEventListener('abort', onAbort, { once: true })
      forget = start({
        command,
        resolve: (value) => settle(() => resolve(value)),
        reject: (reason) => settle(() => reject(reason)),
      })
    })
  }

  #receive(chunk: Uint8Array): void {
    try {
      for (const message of this.#messages.push(chunk)) this.#dispatch(parse(message, this.#name))
    } catch (error) {
      this.#end(error as QmpError)
      this.#stream.destroy()
    }
  }

  #dispatch(message: Message): void {
    if (message.QMP !== undefined) {
      this.#greeting = checkGreeting(message.QMP, this.#name)
      this.#awaitsGreeting?.resolve(this.#greeting)
    } else if (typeof message.event === 'string') {
      for (const subscription of this.#subscriptions) subscription.push(message as QmpEvent)
    } else {
      this.#answer(message)
    }
  }

  #answer(message: Message): void {
    const pending = typeof message.id === 'number' ? this.#pending.get(message.id) : undefined
    if (pending === undefined) return // the answer to a call that timed out or was aborted
    if (message.error === undefined) {
      try {
        pending.resolve(checkAnswer(pending.command, message.return))
      } catch (error) {
        pending.reject(error)
      }
      return
    }
    const { desc, class: qmpClass } = isObject(message.error) ? message.error : {}
    if (typeof desc !== 'string') throw new QmpError(`${this.#name}: an error without a description`)
    pending.reject(new QmpError(`${pending.command}: ${desc}`, { command: pending.command, desc, ...(typeof qmpClass === 'string' ? { qmpClass } : {}) }))
  }

  #end(error: QmpError): void {
    if (this.#ended !== undefined) return
    this.#ended = error
    for (const { command, reject } of this.#waiting()) {
      reject(new QmpError(`${error.message} while waiting for ${command}`, { command, cause: error }))
    }
    for (const subscription of this.#subscriptions) subscription.end(this.closed ? undefined : error)
  }
}

/** The greeting, if it has what this library reads of it. */
function checkGreeting(greeting: unknown, name: string): QmpGreeting {
  if (isGreeting(greeting)) return greeting as QmpGreeting
  throw new QmpError(`${name}: a greeting without version and capabilities; is this a QMP monitor?`)
}

function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null
}

function parse(text: string, name: string): Message {
  try {
    const value: unknown = JSON.parse(text)
    if (isObject(value) && !Array.isArray(value)) return value
  } catch {
    // reported below: text that is no JSON and JSON that is no object are the same mistake
  }
  const human = /^QEMU \S+ monitor/.test(text) ? '; this is a monitor for people: give QEMU one with -qmp' : ''
  throw new QmpError(`${name}: not a QMP message: ${JSON.stringify(text.slice(0, 80))}${human}`)
}
