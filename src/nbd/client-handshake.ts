/**
 * The client's side of the negotiation, with servers of any age. Owns what is asked of a server, what is done
 * without where it refuses, and the check of what it says.
 *
 *     fixed newstyle: structured replies, metadata contexts, then `go`; `exportName` where `go` is unknown
 *     newstyle:       `exportName` only, which every server has
 *     oldstyle:       no negotiation: the greeting has the size, and there is one export without a name
 */
import { concat } from '../bytes/concat.ts'
import { FormatError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import * as protocol from './protocol.ts'
import { infoTypes, optionReplies, optionTypes } from './protocol.ts'
import type { ByteReader, NbdTransport } from './transport.ts'

/** What a server said of the export. */
export interface Handshake {
  readonly size: number
  readonly flags: number
  /** The smallest unit of a request in bytes; undefined where the server did not say. */
  readonly minimum: number | undefined
  readonly maximum: number
  /** Replies may come in chunks. */
  readonly structured: boolean
  /** Ids of the contexts the server agreed to. */
  readonly contexts: ReadonlyMap<number, string>
}

const usualContexts = ['base:allocation', 'qemu:allocation-depth']
const nothing = new Uint8Array(0)

/** Data that all replies to one option may have together. */
const maxReplies = 1 << 20

/** Negotiates as much of structured replies, the contexts of a map and block sizes as the server has, and the export. */
export async function shakeHands(transport: NbdTransport, reader: ByteReader, name: string, contextNames: readonly string[] = usualContexts): Promise<Handshake> {
  const greeting = await reader.read(protocol.sizes.greeting)
  if (protocol.isOldstyle(greeting)) return oldstyle(reader, greeting, name)
  const { fixedNewstyle, noZeroes } = protocol.handshakeFlags
  const flags = protocol.decodeGreeting(greeting) & (fixedNewstyle | noZeroes)
  await transport.send([new Uint8Array([0, 0, 0, flags])])
  const options = new ClientOptions(transport, reader, name)
  const zeroes = (flags & noZeroes) === 0
  if ((flags & fixedNewstyle) === 0) return { ...(await options.exportName(zeroes)), structured: false, contexts: new Map() }
  const structured = (await options.ask(optionTypes.structuredReply, nothing)) !== undefined
  const contexts = structured ? await options.contexts(contextNames) : new Map<number, string>()
  return { ...((await options.go()) ?? (await options.exportName(zeroes))), structured, contexts }
}

/** What the rest of an oldstyle greeting says. */
async function oldstyle(reader: ByteReader, start: Uint8Array, name: string): Promise<Handshake> {
  const rest = await reader.read(protocol.sizes.oldstyle - start.length)
  if (name !== '') throw new Qcow2Error('ERR_NOT_FOUND', `the NBD server has no export named '${name}': it speaks oldstyle, whose only export has no name`)
  return { ...protocol.decodeOldstyle(concat([start, rest])), ...unsaid, structured: false, contexts: new Map() }
}

type ExportInfo = Omit<Handshake, 'structured' | 'contexts'>

/** Limits of a server that told none. */
const unsaid = { minimum: undefined, maximum: protocol.maxPayload } as const

/** Options sent for one export. */
class ClientOptions {
  readonly #transport: NbdTransport
  readonly #reader: ByteReader
  readonly #name: string

  constructor(transport: NbdTransport, reader: ByteReader, name: string) {
    this.#transport = transport
    this.#reader = reader
    this.#name = name
  }

  /** The contexts that the server agrees to, by id; none where it does not know the option. */
  async contexts(names: readonly string[]): Promise<Map<number, string>> {
    const found = new Map<number, string>()
    const data = concat([protocol.encodeString(this.#name), u32(names.length), ...names.map(protocol.encodeString)])
    for (const reply of (await this.ask(optionTypes.setMetaContext, data)) ?? []) {
      const cursor = new protocol.Cursor(reply, 'NBD metadata context')
      const id = cursor.u32()
      const name = new TextDecoder().decode(cursor.bytes(cursor.left))
      if (names.includes(name)) found.set(id, name)
    }
    return found
  }

  /** Undefined if the server does not know the option. */
  async go(): Promise<ExportInfo | undefined> {
    const wanted = [0, 1, 0, infoTypes.blockSize] // one request: the block sizes
    const infos = await this.ask(optionTypes.go, concat([protocol.encodeString(this.#name), new Uint8Array(wanted)]))
    return infos === undefined ? undefined : readInfos(infos)
  }

  /** The oldest option: a server that does not have the export ends the connection. */
  async exportName(zeroes: boolean): Promise<ExportInfo> {
    await this.#transport.send([protocol.encodeOption(optionTypes.exportName, new TextEncoder().encode(this.#name))])
    const reply = await this.#reader.tryRead(protocol.sizes.exportName + (zeroes ? protocol.sizes.zeroes : 0)).catch(() => undefined)
    if (reply === undefined) throw new Qcow2Error('ERR_NOT_FOUND', `the NBD server ended the connection: it seems to have no export named '${this.#name}'`)
    return { ...protocol.decodeExportName(reply), ...unsaid }
  }

  /**
   * Sends one option; the data of its replies up to the ack, or `undefined` if the server does without the option.
   * @throws Qcow2Error `ERR_NOT_FOUND` for an unknown export, `ERR_UNSUPPORTED` if the server insists on what we have not
   */
  async ask(type: number, data: Uint8Array): Promise<Uint8Array[] | undefined> {
    await this.#transport.send([protocol.encodeOption(type, data)])
    const replies: Uint8Array[] = []
    for (let left = maxReplies; left > 0; ) {
      const head = protocol.decodeOptionReply(await this.#reader.read(protocol.sizes.optionReply))
      if (head.option !== type) throw new FormatError(`answers option ${head.option}, asked was ${type}`, { structure: 'NBD option reply' })
      if (head.length > protocol.maxOptionLength) throw new FormatError(`length is ${head.length}`, { structure: 'NBD option reply' })
      left -= head.length + protocol.sizes.optionReply
      const reply = await this.#reader.read(head.length)
      if (head.type === optionReplies.ack) return replies
      if (head.type >= 0x8000_0000) {
        const failure = this.#failureOf(type, head.type, reply)
        if (failure === undefined) return undefined
        // told, a server does not take the end for an accident
        await this.#transport.send([protocol.encodeOption(optionTypes.abort, nothing)]).catch(() => undefined)
        throw failure
      }
      replies.push(reply)
    }
    throw new FormatError(`more than ${maxReplies} bytes of replies`, { structure: 'NBD option reply' })
  }

  /** Why the negotiation cannot go on without the option; undefined if it can. */
  #failureOf(option: number, error: number, reply: Uint8Array): Qcow2Error | undefined {
    const said = new TextDecoder().decode(reply.subarray(0, protocol.maxNameLength))
    const words = said === '' ? '' : `: ${said}`
    if (error === optionReplies.unsupported) return undefined
    if (error === optionReplies.tlsRequired) return new UnsupportedError(`the NBD server requires TLS, which this client does not speak${words}`, ['TLS'])
    if (error === optionReplies.unknownExport) return new Qcow2Error('ERR_NOT_FOUND', `the NBD server has no export named '${this.#name}'${words}`)
    // what only makes more possible can be done without
    if (option !== optionTypes.go) return undefined
    return new UnsupportedError(`the NBD server refused option ${option} (0x${error.toString(16)})${words}`)
  }
}

function readInfos(infos: readonly Uint8Array[]): ExportInfo {
  let found: ExportInfo | undefined
  let limits: Pick<ExportInfo, 'minimum' | 'maximum'> = unsaid
  for (const info of infos) {
    const cursor = new protocol.Cursor(info, 'NBD export info')
    const type = cursor.u16()
    if (type === infoTypes.export) found = { size: cursor.u64(), flags: cursor.u16(), ...unsaid }
    else if (type === infoTypes.blockSize) limits = readBlockSizes(cursor)
  }
  if (found === undefined) throw new FormatError('the server told no size', { structure: 'NBD export info' })
  return { ...found, ...limits }
}

function readBlockSizes(cursor: protocol.Cursor): { minimum: number; maximum: number } {
  const minimum = cursor.u32()
  cursor.u32()
  const maximum = Math.min(cursor.u32(), protocol.maxPayload)
  if (minimum < 1 || (minimum & (minimum - 1)) !== 0 || minimum > 65536 || maximum < minimum || maximum % minimum !== 0) {
    throw new FormatError(`block sizes are ${minimum} and ${maximum}`, { structure: 'NBD export info' })
  }
  return { minimum, maximum }
}

function u32(value: number): Uint8Array {
  const bytes = new Uint8Array(4)
  new DataView(bytes.buffer).setUint32(0, value)
  return bytes
}
