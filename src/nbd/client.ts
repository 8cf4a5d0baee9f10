/**
 * An NBD export as a block device. Owns the client's side of the conversation: negotiation, many
 * requests under way at once, the matching of replies; knows nothing of sockets.
 */
import { anyRequest, BaseDevice, type BlockLimits, type CallOptions, type Extent, type MapOptions, type WriteOptions, type WriteZeroesOptions } from '../block/device.ts'
import { FormatError, IoError, Qcow2Error } from '../core/errors.ts'
import { InFlight } from '../core/in-flight.ts'
import * as protocol from './protocol.ts'
import { commandFlags, commands, transmissionFlags } from './protocol.ts'
import { combine, sameKind, toExtent } from './client-map.ts'
import { shakeHands, type Handshake } from './client-handshake.ts'
import { ClientRequest, type ReplyStatus, type RequestFields } from './client-request.ts'
import { ByteReader, type NbdTransport } from './transport.ts'
import { silence, SilenceTimer, within } from './waiting.ts'

/** Options of {@link NbdClient.open}. Its `signal` ends the negotiation. */
export interface NbdClientOptions extends CallOptions {
  /** The export's name; default the empty one. */
  readonly name?: string | undefined
  /**
   * The metadata context that a map shows: a run's 1 is a hole, its 2 reads as zeroes. Default
   * `base:allocation`, with the depth in the backing chain where the server tells it.
   */
  readonly context?: string | undefined
  /** Refuse changes even where the server allows them. */
  readonly readOnly?: boolean | undefined
  /**
   * Milliseconds for connecting, for the negotiation, and later between one answer (or 4 KiB of one) and the next while
   * any is due; then the connection is given up. Default 60 000; 0 for ever.
   */
  readonly timeout?: number | undefined
  /**
   * The {@link BlockLimits.requestAlignment} towards a server that does not state its block size, where the export's size is a
   * multiple of it. Default 1: such servers should take any request. Some take whole sectors only: 512 suits all.
   */
  readonly blockSize?: number | undefined
}

/** Default of {@link NbdClientOptions.timeout}. */
export const defaultTimeout = 60_000

/** Longest range of one request without a payload: below 2^32, and aligned to any block size. */
const maxRange = 1 << 30
/** Fewer bytes of answers are no progress: a server could go on for ever with one now and then. */
const leastProgress = 4096
/** Replies of one map that tell the state of less than this are counted, ... */
const smallestStatus = 512
/** ... and so many are followed: each costs a round trip. */
const maxSmallStatus = 1024
/** Parts of one long request that are under way at once. */
const mostParts = 16

/**
 * An NBD export. Errors of the server are `ERR_IO` with the server's own words, where it gives them; so is a
 * server that stays silent. Aborting a read, a flush or a map ends it at once; a call that changes data sends
 * nothing more and ends when what was sent is answered.
 */
export class NbdClient extends BaseDevice {
  readonly #transport: NbdTransport
  readonly #reader: ByteReader
  readonly #handshake: Handshake
  readonly #readOnly: boolean
  readonly #context: string
  readonly #pending = new Map<number, ClientRequest>()
  readonly #silence: SilenceTimer
  readonly #received: Promise<void>
  readonly #minimum: number
  #nextCookie = 1
  /** Bytes that came since the last sign of life. */
  #unheard = 0
  #failure: unknown

  private constructor(transport: NbdTransport, reader: ByteReader, handshake: Handshake, options: NbdClientOptions) {
    const { readOnly = false, timeout = defaultTimeout, context = 'base:allocation', blockSize = 1 } = options
    super()
    this.#transport = transport
    this.#reader = reader
    this.#handshake = handshake
    this.#context = context
    this.#minimum = handshake.minimum ?? (handshake.size % blockSize === 0 ? blockSize : 1)
    this.#readOnly = readOnly || this.#can('readOnly')
    this.#silence = new SilenceTimer(timeout, () => this.#pending.size > 0, () => {
      this.#fail(silence('read', timeout))
      transport.close()
    })
    reader.onPiece = (length) => {
      this.#unheard += length
      if (this.#unheard >= leastProgress) this.#heard()
    }
    this.#received = this.#receive()
  }

  /**
   * Negotiates over `transport`, which the client owns from now on.
   * Servers of any age will do; one without structured replies or metadata contexts has a map of data only.
   * @throws Qcow2Error `ERR_NOT_FOUND` if there is no such export, `ERR_UNSUPPORTED` if the server insists on TLS,
   * `ERR_FORMAT` if it breaks the protocol, `ERR_IO` if it does not answer in time.
   */
  static async open(transport: NbdTransport, options: NbdClientOptions = {}): Promise<NbdClient> {
    const reader = new ByteReader(transport.incoming)
    try {
      const { signal, timeout = defaultTimeout, name = '', context } = options
      const handshake = await within(shakeHands(transport, reader, name, context === undefined ? undefined : [context]), { signal, timeout })
      if (context !== undefined && context !== 'base:allocation' && ![...handshake.contexts.values()].includes(context)) {
        throw new Qcow2Error('ERR_NOT_FOUND', `the NBD server has no metadata context '${context}'`)
      }
      return new NbdClient(transport, reader, handshake, options)
    } catch (error) {
      transport.close()
      throw error
    }
  }

  override get size(): number {
    return this.#handshake.size
  }

  override get readOnly(): boolean {
    return this.#readOnly
  }

  override get limits(): BlockLimits {
    const minimum = this.#minimum
    return { ...anyRequest, requestAlignment: minimum, discardAlignment: this.#can('sendTrim') ? Math.max(minimum, 4096) : 0 }
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const signal = options?.signal
    return this.#inParts(target.length, signal, (from, to) => {
      const part = target.subarray(from, to)
      return this.#request({ operation: 'read', command: commands.read, offset: offset + from, length: to - from, target: part, signal })
    })
  }

  protected override onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.#inParts(source.length, options?.signal, (from, to) => {
      const payload = source.subarray(from, to)
      return this.#request({ operation: 'write', command: commands.write, offset: offset + from, length: to - from, payload })
    })
  }

  protected override async onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    if (!this.#can('sendWriteZeroes')) return super.onWriteZeroes(offset, length, options)
    const flags = options?.unmap === true ? 0 : commandFlags.noHole
    for (let at = 0; at < length; at += maxRange) {
      options?.signal?.throwIfAborted()
      const part = { offset: offset + at, length: Math.min(maxRange, length - at) }
      await this.#request({ operation: 'write zeroes', command: commands.writeZeroes, flags, ...part })
    }
  }

  protected override async onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    if (!this.#can('sendTrim')) return
    for (let at = 0; at < length; at += maxRange) {
      options?.signal?.throwIfAborted()
      await this.#request({ operation: 'discard', command: commands.trim, offset: offset + at, length: Math.min(maxRange, length - at) })
    }
  }

  protected override async onFlush(options?: CallOptions): Promise<void> {
    const signal = options?.signal
    if (this.#can('sendFlush')) await this.#request({ operation: 'flush', command: commands.flush, offset: 0, length: 0, signal })
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    const allocation = this.#contextId(this.#context)
    if (allocation === undefined) {
      yield* super.onMap(offset, length, options)
      return
    }
    const depthId = this.#context === 'base:allocation' ? this.#contextId('qemu:allocation-depth') : undefined
    let waiting: Extent | undefined
    let small = 0
    for (let at = offset; at < offset + length; ) {
      options?.signal?.throwIfAborted()
      const asked = Math.min(maxRange, offset + length - at)
      const fields = { operation: 'map', command: commands.blockStatus, offset: at, length: asked } as const
      const status = await this.#request({ ...fields, signal: options?.signal })
      const start = at
      const runs = status.get(allocation)
      for (const run of runs === undefined ? [] : combine(runs, depthId === undefined ? undefined : status.get(depthId), asked)) {
        const next = toExtent(at, run)
        if (waiting !== undefined && sameKind(waiting, next)) waiting = { ...waiting, length: waiting.length + next.length }
        else {
          if (waiting !== undefined) yield waiting
          waiting = next
        }
        at += run.length
      }
      if (at === start) throw new FormatError('no run for the range asked', { structure: 'NBD block status' })
      if (at - start < Math.min(smallestStatus, asked) && ++small > maxSmallStatus) {
        throw new FormatError(`more than ${maxSmallStatus} replies that tell the state of less than ${smallestStatus} bytes`, { structure: 'NBD block status' })
      }
    }
    if (waiting !== undefined) yield waiting
  }

  protected override async onClose(): Promise<void> {
    const head = { flags: 0, command: commands.disconnect, cookie: new Uint8Array(8), offset: 0, length: 0 }
    this.#silence.stop()
    // not awaited: a server that reads nothing never makes room
    this.#transport.send([protocol.encodeRequest(head)]).catch(() => undefined)
    this.#transport.close()
    await this.#received
  }

  #can(flag: keyof typeof transmissionFlags): boolean {
    const { flags } = this.#handshake
    return (flags & transmissionFlags.hasFlags) !== 0 && (flags & transmissionFlags[flag]) !== 0
  }

  #contextId(name: string): number | undefined {
    return [...this.#handshake.contexts].find(([, found]) => found === name)?.[0]
  }

  /** A request of any length in parts the server takes. Has not ended while a part may touch the caller's memory. */
  async #inParts(length: number, signal: AbortSignal | undefined, send: (from: number, to: number) => Promise<unknown>): Promise<void> {
    const parts = new InFlight()
    const { maximum } = this.#handshake
    for (let at = 0; at < length && signal?.aborted !== true; at += maximum) {
      parts.add(send(at, Math.min(at + maximum, length)))
      if (parts.count >= mostParts) await parts.settle(mostParts - 1)
    }
    await parts.settle()
    signal?.throwIfAborted()
  }

  #request(fields: RequestFields): Promise<ReplyStatus> {
    const { operation, command, flags = 0, offset, length, payload } = fields
    if (this.#failure !== undefined) return Promise.reject(new IoError(operation, this.#failure, { offset, length, name: 'NBD' }))
    const number = this.#nextCookie++ % 0x1_0000_0000
    const cookie = new Uint8Array(8)
    new DataView(cookie.buffer).setUint32(4, number)
    const request = new ClientRequest(fields)
    this.#pending.set(number, request)
    if (this.#pending.size === 1) this.#heard()
    this.#silence.start()
    const head = protocol.encodeRequest({ flags, command, cookie, offset, length })
    this.#transport.send(payload === undefined ? [head] : [head, payload]).then(
      () => {
        if (payload !== undefined) this.#heard()
      },
      (error: unknown) => this.#fail(error),
    )
    return request.outcome
  }

  /** Takes replies until the connection ends; then fails what is still waiting. */
  async #receive(): Promise<void> {
    try {
      for (;;) {
        const start = await this.#reader.tryRead(4)
        if (start === undefined) throw new FormatError('the server ended the connection', { structure: 'NBD reply' })
        const head = new Uint8Array(protocol.replyHeadSize(start))
        head.set(start, 0)
        head.set(await this.#reader.read(head.length - 4), 4)
        await this.#take(protocol.decodeReplyHead(head))
      }
    } catch (error) {
      this.#fail(error)
      this.#transport.close()
    }
  }

  async #take(head: protocol.ReplyHead): Promise<void> {
    const number = new DataView(head.cookie.buffer).getUint32(4)
    const request = this.#pending.get(number)
    if (request === undefined) throw new FormatError(`a reply to no request (cookie ${number})`, { structure: 'NBD reply' })
    if (head.structured) {
      const limit = protocol.maxChunkLength(head.type)
      if (head.length > limit) throw new FormatError(`length is ${head.length}, at most ${limit}`, { structure: 'NBD reply chunk' })
      request.takeChunk(head, await this.#reader.read(head.length), this.#handshake.contexts)
      if ((head.flags & protocol.chunkDone) === 0) return
    } else if (head.error !== 0) request.takeError(head.error)
    else if (request.simpleLength > 0) request.takeAll(await this.#reader.read(request.simpleLength))
    request.end()
    this.#pending.delete(number)
    this.#heard()
  }

  #heard(): void {
    this.#unheard = 0
    this.#silence.heard()
  }

  #fail(error: unknown): void {
    this.#failure ??= error
    this.#silence.stop()
    for (const request of this.#pending.values()) {
      const { operation, offset, length } = request.fields
      request.fail(new IoError(operation, error, { offset, length, name: 'NBD' }))
    }
    this.#pending.clear()
  }
}
