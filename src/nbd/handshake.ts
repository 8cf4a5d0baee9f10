/**
 * The negotiation before any data: what exports there are, which one the client takes, and in which
 * dialect. Owns the answers to options; knows nothing of commands.
 *
 *     server: greeting            client: flags
 *     client: option, data        server: reply (several for lists), then ack or an error
 *     ... until `go` or `exportName` begins the transmission, or `abort` ends it
 */
import { FormatError } from '../core/errors.ts'
import { contextsOf, flagsOf, type NbdExport, type NbdMetaContext } from './export.ts'
import * as protocol from './protocol.ts'
import { optionReplies, optionTypes } from './protocol.ts'
import type { ByteReader, NbdTransport } from './transport.ts'

/** What a finished negotiation agreed on. */
export interface Agreement {
  readonly entry: NbdExport
  /** Replies may come in chunks. */
  readonly structured: boolean
  /** The contexts that block status reports, by the id the client knows them by. */
  readonly contexts: ReadonlyMap<number, NbdMetaContext>
}

/** More options than any client needs: a client that sends more is only holding the connection. */
const maxOptions = 1000

/** `base:allocation` and kin are few; a reply with more is refused. */
const maxContexts = 128

type ExportList = readonly NbdExport[]

/**
 * Negotiates with one client.
 * @returns what was agreed, or `undefined` where the client left or aborted.
 * @throws FormatError if the client breaks the protocol; the connection is then of no more use.
 */
export async function negotiate(
  transport: NbdTransport,
  reader: ByteReader,
  exports: ExportList,
): Promise<Agreement | undefined> {
  const { fixedNewstyle, noZeroes } = protocol.handshakeFlags
  await transport.send([protocol.encodeGreeting(fixedNewstyle | noZeroes)])
  const bytes = await reader.tryRead(protocol.sizes.clientFlags)
  if (bytes === undefined) return undefined
  const flags = new DataView(bytes.buffer).getUint32(0)
  if ((flags & ~(fixedNewstyle | noZeroes)) !== 0) {
    throw new FormatError(`unknown handshake flags 0x${flags.toString(16)}`, { structure: 'NBD client flags' })
  }
  return new Negotiation(transport, reader, exports, (flags & noZeroes) === 0).run()
}

class Negotiation {
  readonly #transport: NbdTransport
  readonly #reader: ByteReader
  readonly #exports: ExportList
  /** The client wants the 124 zeroes of the old reply to `exportName`. */
  readonly #zeroes: boolean
  #structured = false
  #chosen: { name: string; contexts: Map<number, NbdMetaContext> } | undefined

  constructor(transport: NbdTransport, reader: ByteReader, exports: ExportList, zeroes: boolean) {
    this.#transport = transport
    this.#reader = reader
    this.#exports = exports
    this.#zeroes = zeroes
  }

  async run(): Promise<Agreement | undefined> {
    for (let count = 0; count < maxOptions; count++) {
      const head = await this.#reader.tryRead(protocol.sizes.option)
      if (head === undefined) return undefined
      const { type, length } = protocol.decodeOption(head)
      if (length > protocol.maxOptionLength) await this.#tooLong(type, length)
      const data = await this.#reader.read(length)
      if (type === optionTypes.exportName) return this.#exportName(data)
      if (type === optionTypes.abort) {
        await this.#reply(type, optionReplies.ack)
        return undefined
      }
      const entry = await this.#option(type, data)
      if (entry !== undefined) return this.#agree(entry)
    }
    throw new FormatError(`more than ${maxOptions} options`, { structure: 'NBD option' })
  }

  /** Answers an option; an export where it begins the transmission. */
  async #option(type: number, data: Uint8Array): Promise<NbdExport | undefined> {
    try {
      switch (type) {
        case optionTypes.list:
          await this.#list(data)
          return undefined
        case optionTypes.info:
          await this.#info(type, data)
          return undefined
        case optionTypes.go:
          return await this.#info(type, data)
        case optionTypes.structuredReply:
          await this.#structuredReply(data)
          return undefined
        case optionTypes.listMetaContext:
        case optionTypes.setMetaContext:
          await this.#metaContext(type, data)
          return undefined
        default:
          await this.#reply(type, optionReplies.unsupported)
          return undefined
      }
    } catch (error) {
      // the option's own data were read whole, so the conversation can go on
      if (!(error instanceof FormatError)) throw error
      await this.#fail(type, optionReplies.invalid, error.message)
      return undefined
    }
  }

  async #list(data: Uint8Array): Promise<void> {
    if (data.length > 0) return this.#fail(optionTypes.list, optionReplies.invalid, 'the list option has no data')
    for (const { name, description } of this.#exports) {
      await this.#reply(optionTypes.list, optionReplies.server, protocol.encodeListed(name, description))
    }
    await this.#reply(optionTypes.list, optionReplies.ack)
  }

  async #structuredReply(data: Uint8Array): Promise<void> {
    const type = optionTypes.structuredReply
    if (data.length > 0) return this.#fail(type, optionReplies.invalid, 'the structured reply option has no data')
    this.#structured = true
    await this.#reply(type, optionReplies.ack)
  }

  async #info(type: number, data: Uint8Array): Promise<NbdExport | undefined> {
    const { name, requests } = protocol.decodeInfoRequest(data)
    const entry = this.#find(name)
    if (entry === undefined) {
      await this.#unknownExport(type, name)
      return undefined
    }
    const { infoTypes } = protocol
    const asked = new Set(requests)
    if (asked.has(infoTypes.name)) await this.#sendInfo(type, protocol.encodeTextInfo(infoTypes.name, entry.name))
    if (asked.has(infoTypes.description) && entry.description !== undefined) {
      await this.#sendInfo(type, protocol.encodeTextInfo(infoTypes.description, entry.description))
    }
    const minimum = entry.device.limits.requestAlignment
    if (asked.has(infoTypes.blockSize) || minimum > 1) {
      await this.#sendInfo(type, protocol.encodeBlockSizeInfo(minimum, Math.max(minimum, 65536), protocol.maxPayload))
    }
    await this.#sendInfo(type, protocol.encodeExportInfo(entry.device.size, flagsOf(entry, this.#structured)))
    await this.#reply(type, optionReplies.ack)
    return entry
  }

  async #metaContext(type: number, data: Uint8Array): Promise<void> {
    const set = type === optionTypes.setMetaContext
    if (set) this.#chosen = undefined
    if (!this.#structured) return this.#fail(type, optionReplies.invalid, 'negotiate structured replies first')
    const { name, queries } = protocol.decodeMetaContextRequest(data)
    const entry = this.#find(name)
    if (entry === undefined) return this.#unknownExport(type, name)
    const contexts = contextsOf(entry).filter((context) => (set ? queries.includes(context.name) : listed(context.name, queries)))
    if (contexts.length > maxContexts) return this.#fail(type, optionReplies.tooBig, `more than ${maxContexts} contexts`)
    const chosen = new Map(contexts.map((context, at) => [at + 1, context]))
    for (const [id, context] of chosen) {
      await this.#reply(type, optionReplies.metaContext, protocol.encodeMetaContext(set ? id : 0, context.name))
    }
    if (set) this.#chosen = { name: entry.name, contexts: chosen }
    await this.#reply(type, optionReplies.ack)
  }

  /** The option from before `go`: it has no way to refuse but to end the connection. */
  async #exportName(data: Uint8Array): Promise<Agreement> {
    const name = protocol.decodeName(data)
    const entry = this.#find(name)
    if (entry === undefined) throw new FormatError(`no export named '${name}'`, { structure: 'NBD export name' })
    const flags = flagsOf(entry, this.#structured)
    await this.#transport.send([protocol.encodeExportName(entry.device.size, flags, this.#zeroes)])
    return this.#agree(entry)
  }

  #agree(entry: NbdExport): Agreement {
    const contexts = this.#chosen?.name === entry.name ? this.#chosen.contexts : new Map<number, NbdMetaContext>()
    return { entry, structured: this.#structured, contexts }
  }

  #find(name: string): NbdExport | undefined {
    return this.#exports.find((entry) => entry.name === name)
  }

  #sendInfo(type: number, data: Uint8Array): Promise<void> {
    return this.#reply(type, optionReplies.info, data)
  }

  #unknownExport(type: number, name: string): Promise<void> {
    return this.#fail(type, optionReplies.unknownExport, `no export named '${name}'`)
  }

  async #tooLong(type: number, length: number): Promise<never> {
    await this.#reply(type, optionReplies.tooBig)
    const limit = protocol.maxOptionLength
    throw new FormatError(`data of ${length} bytes, at most ${limit}`, { structure: 'NBD option', field: 'length' })
  }

  #fail(option: number, type: number, message: string): Promise<void> {
    return this.#reply(option, type, new TextEncoder().encode(message))
  }

  #reply(option: number, type: number, data?: Uint8Array): Promise<void> {
    return this.#transport.send([protocol.encodeOptionReply(option, type, data)])
  }
}

/** A query lists a context by its name, or all of those below a prefix that ends in `:`; none lists all. */
function listed(name: string, queries: readonly string[]): boolean {
  return queries.length === 0 || queries.some((query) => query === name || (query.endsWith(':') && name.startsWith(query)))
}
