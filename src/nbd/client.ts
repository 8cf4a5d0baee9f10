/**
 * An NBD export as a block device. Owns the client's side of the conversation: negotiation, many
 * requests under way at once, the matching of replies; knows nothing of sockets.
 */
import { anyRequest, BaseDevice, type BlockLimits, type Extent, type MapOptions, type WriteZeroesOptions } from '../block/device.ts'
import { FormatError, IoError, type IoOperation } from '../core/errors.ts'
import * as protocol from './protocol.ts'
import { chunkTypes, commandFlags, commands, errors, transmissionFlags, type StatusRun } from './protocol.ts'
import { combine, sameKind, toExtent } from './client-map.ts'
import { shakeHands, type Handshake } from './client-handshake.ts'
import { ByteReader, type NbdTransport } from './transport.ts'

/** Options of {@link NbdClient.open}. */
export interface NbdClientOptions {
  /** The export's name; default the empty one. */
  readonly name?: string | undefined
  /** Refuse changes even where the server allows them. */
  readonly readOnly?: boolean | undefined
}

interface Pending {
  readonly offset: number
  readonly target: Uint8Array | undefined
  readonly status: Map<number, StatusRun[]>
  error: Error | undefined
  readonly operation: IoOperation
  readonly length: number
  resolve(): void
  reject(error: unknown): void
}

/** Longest range of one request without a payload: below 2^32, and aligned to any block size. */
const maxRange = 1 << 30

/** An NBD export. Errors of the server are `ERR_IO` with the server's own words, where it gives them. */
export class NbdClient extends BaseDevice {
  readonly #transport: NbdTransport
  readonly #reader: ByteReader
  readonly #handshake: Handshake
  readonly #readOnly: boolean
  readonly #pending = new Map<number, Pending>()
  readonly #received: Promise<void>
  #nextCookie = 1
  #failure: unknown

  private constructor(transport: NbdTransport, reader: ByteReader, handshake: Handshake, readOnly: boolean) {
    super()
    this.#transport = transport
    this.#reader = reader
    this.#handshake = handshake
    this.#readOnly = readOnly || this.#can('readOnly')
    this.#received = this.#receive()
  }

  /**
   * Negotiates over `transport`, which the client owns from now on.
   * @throws Qcow2Error `ERR_NOT_FOUND` if there is no such export, `ERR_UNSUPPORTED` if the server has no
   * structured replies, `ERR_FORMAT` if it breaks the protocol.
   */
  static async open(transport: NbdTransport, options: NbdClientOptions = {}): Promise<NbdClient> {
    const reader = new ByteReader(transport.incoming)
    try {
      const handshake = await shakeHands(transport, reader, options.name ?? '')
      return new NbdClient(transport, reader, handshake, options.readOnly ?? false)
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
    const { minimum } = this.#handshake
    return { ...anyRequest, requestAlignment: minimum, discardAlignment: this.#can('sendTrim') ? Math.max(minimum, 4096) : 0 }
  }

  protected override async onRead(offset: number, target: Uint8Array): Promise<void> {
    const piece = this.#handshake.maximum
    const parts: Promise<unknown>[] = []
    for (let at = 0; at < target.length; at += piece) {
      const part = target.subarray(at, at + piece)
      parts.push(this.#request('read', commands.read, 0, offset + at, part.length, { target: part }))
    }
    await Promise.all(parts)
  }

  protected override async onWrite(offset: number, source: Uint8Array): Promise<void> {
    const piece = this.#handshake.maximum
    const parts: Promise<unknown>[] = []
    for (let at = 0; at < source.length; at += piece) {
      const part = source.subarray(at, at + piece)
      parts.push(this.#request('write', commands.write, 0, offset + at, part.length, { payload: part }))
    }
    await Promise.all(parts)
  }

  protected override async onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    if (!this.#can('sendWriteZeroes')) return super.onWriteZeroes(offset, length, options)
    const flags = options?.unmap === true ? 0 : commandFlags.noHole
    for (let at = 0; at < length; at += maxRange) {
      await this.#request('write zeroes', commands.writeZeroes, flags, offset + at, Math.min(maxRange, length - at))
    }
  }

  protected override async onDiscard(offset: number, length: number): Promise<void> {
    if (!this.#can('sendTrim')) return
    for (let at = 0; at < length; at += maxRange) {
      await this.#request('discard', commands.trim, 0, offset + at, Math.min(maxRange, length - at))
    }
  }

  protected override async onFlush(): Promise<void> {
    if (this.#can('sendFlush')) await this.#request('flush', commands.flush, 0, 0, 0)
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    const allocation = this.#contextId('base:allocation')
    if (allocation === undefined) {
      yield* super.onMap(offset, length, options)
      return
    }
    const depthId = this.#contextId('qemu:allocation-depth')
    let waiting: Extent | undefined
    for (let at = offset; at < offset + length; ) {
      options?.signal?.throwIfAborted()
      const asked = Math.min(maxRange, offset + length - at)
      const status = await this.#request('map', commands.blockStatus, 0, at, asked)
      const runs = combine(status.get(allocation) ?? [], depthId === undefined ? undefined : status.get(depthId), asked)
      for (const run of runs) {
        const next = toExtent(at, run)
        if (waiting !== undefined && sameKind(waiting, next)) waiting = { ...waiting, length: waiting.length + next.length }
        else {
          if (waiting !== undefined) yield waiting
          waiting = next
        }
        at += run.length
      }
      if (runs.length === 0) throw new FormatError('no run for the range asked', { structure: 'NBD block status' })
    }
    if (waiting !== undefined) yield waiting
  }

  protected override async onClose(): Promise<void> {
    const head = { flags: 0, command: commands.disconnect, cookie: new Uint8Array(8), offset: 0, length: 0 }
    await this.#transport.send([protocol.encodeRequest(head)]).catch(() => undefined)
    this.#transport.close()
    await this.#received
  }

  #can(flag: keyof typeof transmissionFlags): boolean {
    return (this.#handshake.flags & transmissionFlags[flag]) !== 0
  }

  #contextId(name: string): number | undefined {
    return [...this.#handshake.contexts].find(([, found]) => found === name)?.[0]
  }

  /** Sends one request; resolves with its status runs (empty for all but block status). */
  #request(
    operation: IoOperation,
    command: number,
    flags: number,
    offset: number,
    length: number,
    data: { target?: Uint8Array; payload?: Uint8Array } = {},
  ): Promise<Map<number, StatusRun[]>> {
    if (this.#failure !== undefined) return Promise.reject(new IoError(operation, this.#failure, { offset, length, name: 'NBD' }))
    const number = this.#nextCookie++
    const cookie = new Uint8Array(8)
    new DataView(cookie.buffer).setUint32(4, number % 0x1_0000_0000)
    return new Promise((resolve, reject) => {
      const status = new Map<number, StatusRun[]>()
      const { target, payload } = data
      const settled = { resolve: () => resolve(status), reject }
      this.#pending.set(number % 0x1_0000_0000, { offset, target, status, error: undefined, operation, length, ...settled })
      const head = protocol.encodeRequest({ flags, command, cookie, offset, length })
      this.#transport.send(payload === undefined ? [head] : [head, payload]).catch((error: unknown) => this.#fail(error))
    })
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
    const pending = this.#pending.get(number)
    if (pending === undefined) throw new FormatError(`a reply to no request (cookie ${number})`, { structure: 'NBD reply' })
    if (!head.structured) {
      if (head.error !== 0) pending.error = serverError(pending, head.error)
      else if (pending.target !== undefined) pending.target.set(await this.#reader.read(pending.target.length))
    } else {
      await this.#chunk(pending, head)
      if ((head.flags & protocol.chunkDone) === 0) return
    }
    this.#pending.delete(number)
    if (pending.error === undefined) pending.resolve()
    else pending.reject(pending.error)
  }

  async #chunk(pending: Pending, head: protocol.ChunkHead): Promise<void> {
    const limit = protocol.maxPayload + 8
    if (head.length > limit) throw new FormatError(`length is ${head.length}, at most ${limit}`, { structure: 'NBD reply chunk' })
    const cursor = new protocol.Cursor(await this.#reader.read(head.length), 'NBD reply chunk')
    switch (head.type) {
      case chunkTypes.none:
        return
      case chunkTypes.offsetData: {
        const at = cursor.u64() - pending.offset
        const length = cursor.left
        placeIn(pending, at, length).set(cursor.bytes(length), at)
        return
      }
      case chunkTypes.offsetHole: {
        const at = cursor.u64() - pending.offset
        const length = cursor.u32()
        placeIn(pending, at, length).fill(0, at, at + length)
        return
      }
      case chunkTypes.blockStatus: {
        const id = cursor.u32()
        const runs = Array.from({ length: Math.floor(cursor.left / 8) }, () => ({ length: cursor.u32(), flags: cursor.u32() }))
        pending.status.set(id, runs)
        return
      }
      default:
        if ((head.type & 0x8000) === 0) throw new FormatError(`unknown type ${head.type}`, { structure: 'NBD reply chunk' })
        pending.error = serverError(pending, cursor.u32(), new TextDecoder().decode(cursor.bytes(cursor.u16())))
    }
  }

  #fail(error: unknown): void {
    this.#failure ??= error
    for (const pending of this.#pending.values()) {
      pending.reject(new IoError(pending.operation, error, { offset: pending.offset, length: pending.length, name: 'NBD' }))
    }
    this.#pending.clear()
  }
}

function serverError(pending: Pending, error: number, message = ''): IoError {
  const { operation, offset, length } = pending
  const name = Object.entries(errors).find(([, value]) => value === error)?.[0] ?? `error ${error}`
  const code = error === errors.noSpace ? 'ERR_NO_SPACE' : 'ERR_IO'
  return new IoError(operation, message === '' ? `the server says ${name}` : message, { offset, length, code, name: 'NBD' })
}

/** The target of a read, if the chunk lies within it. */
function placeIn(pending: Pending, at: number, length: number): Uint8Array {
  const { target } = pending
  if (target === undefined || at < 0 || at + length > target.length) {
    throw new FormatError(`${length} bytes at ${at + pending.offset} were not asked for`, { structure: 'NBD reply chunk' })
  }
  return target
}
