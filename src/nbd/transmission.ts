/**
 * The transmission phase: commands in, replies out. Owns how many requests may be under way, and
 * that memory stays bounded however fast a client sends or slow it reads; the work itself is the
 * device's.
 */
import { IoError, Qcow2Error } from '../core/errors.ts'
import { Budget } from './budget.ts'
import { isReadOnly } from './export.ts'
import type { Agreement } from './handshake.ts'
import * as protocol from './protocol.ts'
import { commandFlags, commands, errors, type Request } from './protocol.ts'
import { readChunks } from './read-chunks.ts'
import { statusRuns } from './status.ts'
import type { ByteReader, NbdTransport } from './transport.ts'

/** How much one connection may have under way. */
export interface TransmissionLimits {
  /** Requests; default 64. */
  readonly maxRequests?: number | undefined
  /** Bytes of payload, of reads and writes together; at least 32 MiB, the default. */
  readonly maxBytes?: number | undefined
  /** Milliseconds after which a client is disconnected that asks nothing, or takes no answer; default 0, never. */
  readonly idleTimeout?: number | undefined
}

/** The flags each command may carry. */
const allowedFlags: Readonly<Record<number, number>> = {
  [commands.read]: commandFlags.dontFragment | commandFlags.fua,
  [commands.write]: commandFlags.fua,
  [commands.disconnect]: 0,
  [commands.flush]: commandFlags.fua,
  [commands.trim]: commandFlags.fua,
  [commands.writeZeroes]: commandFlags.fua | commandFlags.noHole | commandFlags.fastZero,
  [commands.blockStatus]: commandFlags.requestOne | commandFlags.fua,
}

const changing: ReadonlySet<number> = new Set([commands.write, commands.trim, commands.writeZeroes])

/** A reason to refuse a request, as the protocol numbers them. */
class Refusal extends Error {
  readonly error: number

  constructor(error: number, message: string) {
    super(message)
    this.error = error
  }
}

/**
 * Serves requests until the client disconnects; then waits for those under way.
 * @throws FormatError if the client breaks the protocol.
 */
export async function transmit(
  transport: NbdTransport,
  reader: ByteReader,
  agreement: Agreement,
  limits: TransmissionLimits = {},
): Promise<void> {
  const requests = new Budget(limits.maxRequests ?? 64)
  const bytes = new Budget(Math.max(limits.maxBytes ?? 0, protocol.maxPayload))
  const underWay = new Set<Promise<void>>()
  const stop = new AbortController()
  const transmission = new Transmission(transport, agreement, stop.signal)
  const idle = new IdleWatch(limits.idleTimeout ?? 0, () => transmission.working === 0, () => transport.close())
  try {
    while (!stop.signal.aborted) {
      const head = await reader.tryRead(protocol.sizes.request)
      if (head === undefined) break
      const request = protocol.decodeRequest(head)
      if (request.command === commands.disconnect) break
      idle.heard()
      const payload = payloadBytes(request)
      await requests.take(1)
      await bytes.take(payload)
      const data = await readPayload(reader, request)
      const task = transmission.serve(request, data).catch((error: unknown) => stop.abort(error))
      const ended = task.finally(() => {
        idle.heard()
        requests.give(1)
        bytes.give(payload)
        underWay.delete(ended)
      })
      underWay.add(ended)
    }
  } catch (error) {
    idle.check()
    throw error
  } finally {
    await Promise.all(underWay)
    idle.end()
  }
  stop.signal.throwIfAborted()
  idle.check()
}

/** Disconnects a client that makes no use of its connection. */
class IdleWatch {
  readonly #timeout: number
  readonly #timer: ReturnType<typeof setInterval> | undefined
  #last = performance.now()
  #over = false

  constructor(timeout: number, isIdle: () => boolean, close: () => void) {
    this.#timeout = timeout
    if (timeout <= 0) return
    this.#timer = setInterval(() => {
      if (this.#over || !isIdle() || performance.now() - this.#last < timeout) return
      this.#over = true
      close()
    }, Math.max(5, timeout / 8))
  }

  heard(): void {
    this.#last = performance.now()
  }

  end(): void {
    clearInterval(this.#timer)
  }

  /** @throws IoError if the connection ended for this reason */
  check(): void {
    if (this.#over) throw new IoError('read', `the client made no use of its connection for ${this.#timeout} ms`, { name: 'NBD' })
  }
}

/** Bytes of memory that a request needs for its payload, in either direction. */
function payloadBytes({ command, length }: Request): number {
  const carries = command === commands.read || command === commands.write
  return carries && length <= protocol.maxPayload ? length : 0
}

/** A write's data; `undefined` for other commands, and for a write too long to be kept, which is skipped. */
async function readPayload(reader: ByteReader, { command, length }: Request): Promise<Uint8Array | undefined> {
  if (command !== commands.write) return undefined
  if (length <= protocol.maxPayload) return reader.read(length)
  await reader.skip(length)
  return undefined
}

class Transmission {
  readonly #transport: NbdTransport
  readonly #agreement: Agreement
  readonly #signal: AbortSignal
  /** Requests that the device works on. */
  working = 0

  constructor(transport: NbdTransport, agreement: Agreement, signal: AbortSignal) {
    this.#transport = transport
    this.#agreement = agreement
    this.#signal = signal
  }

  /** Does one request and sends its reply. Rejects only if the reply cannot be sent. */
  async serve(request: Request, data: Uint8Array | undefined): Promise<void> {
    let reply: readonly Uint8Array[]
    this.working++
    try {
      this.#check(request)
      reply = await this.#do(request, data)
    } catch (error) {
      reply = this.#errorReply(request, error)
    } finally {
      this.working--
    }
    await this.#transport.send(reply)
  }

  #check({ command, flags, offset, length }: Request): void {
    const { entry, contexts } = this.#agreement
    const allowed = allowedFlags[command]
    if (allowed === undefined) throw new Refusal(errors.invalid, `unknown command ${command}`)
    if ((flags & ~allowed) !== 0) throw new Refusal(errors.invalid, `flags 0x${flags.toString(16)} on command ${command}`)
    if (changing.has(command) && isReadOnly(entry)) throw new Refusal(errors.perm, 'the export is read-only')
    if ((command === commands.read || command === commands.write) && length > protocol.maxPayload) {
      throw new Refusal(errors.overflow, `a payload of ${length} bytes, at most ${protocol.maxPayload}`)
    }
    if (command === commands.flush) return
    if (offset + length > entry.device.size) {
      const error = changing.has(command) ? errors.noSpace : errors.invalid
      throw new Refusal(error, `${length} bytes at offset ${offset} reach past the end (${entry.device.size} bytes)`)
    }
    if (command === commands.blockStatus && (contexts.size === 0 || length === 0)) {
      throw new Refusal(errors.invalid, length === 0 ? 'block status of no bytes' : 'no metadata context was negotiated')
    }
  }

  async #do(request: Request, data: Uint8Array | undefined): Promise<readonly Uint8Array[]> {
    const { device } = this.#agreement.entry
    const { command, flags, offset, length } = request
    const signal = this.#signal
    const fua = (flags & commandFlags.fua) !== 0
    switch (command) {
      case commands.read:
        return this.#read(request)
      case commands.write:
        await device.write(offset, data!, { fua, signal })
        break
      case commands.flush:
        await device.flush({ signal })
        break
      case commands.trim:
        await device.discard(offset, length, { signal })
        if (fua) await device.flush({ signal })
        break
      case commands.writeZeroes:
        await this.#writeZeroes(request, fua)
        break
      default:
        return this.#blockStatus(request)
    }
    return [this.#emptyReply(request.cookie)]
  }

  async #read({ cookie, flags, offset, length }: Request): Promise<readonly Uint8Array[]> {
    const { entry, structured } = this.#agreement
    const { device } = entry
    const signal = this.#signal
    if (!structured) {
      const bytes = await device.read(offset, length, { signal })
      return [protocol.encodeSimpleReply(cookie, 0), bytes]
    }
    if (length === 0) return [this.#emptyReply(cookie)]
    return readChunks(device, { cookie, offset, length, whole: (flags & commandFlags.dontFragment) !== 0, signal })
  }

  async #writeZeroes({ flags, offset, length }: Request, fua: boolean): Promise<void> {
    const { device } = this.#agreement.entry
    const quick = device.limits.discardAlignment
    if ((flags & commandFlags.fastZero) !== 0 && (quick === 0 || offset % quick !== 0 || length % quick !== 0)) {
      throw new Refusal(errors.notSupported, 'zeroing this range is no faster than writing it')
    }
    await device.writeZeroes(offset, length, { fua, unmap: (flags & commandFlags.noHole) === 0, signal: this.#signal })
  }

  async #blockStatus({ cookie, flags, offset, length }: Request): Promise<readonly Uint8Array[]> {
    const one = (flags & commandFlags.requestOne) !== 0
    const { contexts } = this.#agreement
    const reply: Uint8Array[] = []
    for (const [id, context] of contexts) {
      const runs = await statusRuns(context, { offset, length, one, signal: this.#signal })
      const last = reply.length === contexts.size - 1
      reply.push(protocol.encodeStatusChunk(cookie, last ? protocol.chunkDone : 0, id, runs))
    }
    return reply
  }

  /** Success without a payload. */
  #emptyReply(cookie: Uint8Array): Uint8Array {
    if (!this.#agreement.structured) return protocol.encodeSimpleReply(cookie, 0)
    return protocol.encodeChunk({ flags: protocol.chunkDone, type: protocol.chunkTypes.none, cookie, length: 0 })
  }

  #errorReply(request: Request, error: unknown): readonly Uint8Array[] {
    const number = errorNumber(error)
    if (!this.#agreement.structured) return [protocol.encodeSimpleReply(request.cookie, number)]
    return [protocol.encodeErrorChunk(request.cookie, number, error instanceof Error ? error.message : String(error))]
  }
}

/** The protocol's number for what a device threw. */
function errorNumber(error: unknown): number {
  if (error instanceof Refusal) return error.error
  if (error instanceof RangeError) return errors.invalid
  if (!Qcow2Error.is(error)) return errors.io
  switch (error.code) {
    case 'ERR_READ_ONLY':
      return errors.perm
    case 'ERR_NO_SPACE':
      return errors.noSpace
    case 'ERR_UNSUPPORTED':
      return errors.notSupported
    case 'ERR_ALIGNMENT':
    case 'ERR_RANGE':
      return errors.invalid
    case 'ERR_CLOSED':
      return errors.shutdown
    default:
      return errors.io
  }
}
