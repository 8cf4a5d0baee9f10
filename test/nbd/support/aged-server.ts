/** An NBD server of any age: as much of the protocol as a test wants it to have, over bytes in memory. */
import * as protocol from '../../../src/nbd/protocol.ts'
import { ByteReader, type NbdTransport } from '../../../src/nbd/transport.ts'

const { commands, errors, handshakeFlags, optionReplies, optionTypes, transmissionFlags } = protocol

export interface Age {
  readonly style: 'oldstyle' | 'newstyle' | 'fixed'
  /** Leaves out the zeroes after `exportName` if the client agrees. */
  readonly noZeroes?: boolean
  readonly go?: boolean
  readonly structured?: boolean
  readonly contexts?: boolean
  /** Smallest and largest request, told to those who ask. */
  readonly blockSizes?: readonly [number, number]
  /** Refuses what is no multiple of this, told or not. */
  readonly demands?: number
  /** Transmission flags; none at all means that not even `hasFlags` is set. */
  readonly flags?: number
  /** The error number of every refused option; default unsupported. */
  readonly refusal?: number
}

export class AgedServer {
  readonly bytes: Uint8Array
  readonly seen: protocol.Request[] = []
  readonly #age: Age
  readonly #name: string

  constructor(age: Age, bytes: Uint8Array, name = '') {
    this.#age = age
    this.bytes = bytes
    this.#name = name
  }

  get #flags(): number {
    return this.#age.flags ?? transmissionFlags.hasFlags | transmissionFlags.sendFlush | transmissionFlags.sendTrim | transmissionFlags.sendWriteZeroes
  }

  async serve(transport: NbdTransport): Promise<void> {
    const reader = new ByteReader(transport.incoming)
    if (await this.#greet(transport, reader)) await this.#transmit(transport, reader)
    transport.close()
  }

  async #greet(transport: NbdTransport, reader: ByteReader): Promise<boolean> {
    const { style, noZeroes = false } = this.#age
    if (style === 'oldstyle') {
      const greeting = Buffer.alloc(152)
      greeting.write('NBDMAGIC')
      greeting.writeBigUInt64BE(0x00420281861253n, 8)
      greeting.writeBigUInt64BE(BigInt(this.bytes.length), 16)
      greeting.writeUInt32BE(this.#flags, 24)
      await transport.send([greeting])
      return true
    }
    await transport.send([protocol.encodeGreeting((style === 'fixed' ? handshakeFlags.fixedNewstyle : 0) | (noZeroes ? handshakeFlags.noZeroes : 0))])
    const agreed = (await reader.read(4))[3]!
    return this.#negotiate(transport, reader, (agreed & handshakeFlags.noZeroes) === 0)
  }

  async #negotiate(transport: NbdTransport, reader: ByteReader, zeroes: boolean): Promise<boolean> {
    const { style, go, structured, contexts, blockSizes, refusal = optionReplies.unsupported } = this.#age
    for (;;) {
      const { type, length } = protocol.decodeOption(await reader.read(16))
      const data = await reader.read(length)
      if (type === optionTypes.exportName) {
        if (new TextDecoder().decode(data) !== this.#name) return false
        await transport.send([protocol.encodeExportName(this.bytes.length, this.#flags, zeroes)])
        return true
      }
      if (style !== 'fixed') return false // what a server does that knows nothing else
      const reply = (kind: number, ...parts: Uint8Array[]): Promise<void> => transport.send([protocol.encodeOptionReply(type, kind, Buffer.concat(parts))])
      if (type === optionTypes.structuredReply && structured === true) await reply(optionReplies.ack)
      else if (type === optionTypes.setMetaContext && contexts === true) {
        await reply(optionReplies.metaContext, protocol.encodeMetaContext(7, 'base:allocation').subarray(0, 4), new TextEncoder().encode('base:allocation'))
        await reply(optionReplies.ack)
      } else if (type === optionTypes.go && go === true) {
        if (protocol.decodeInfoRequest(data).name !== this.#name) {
          await reply(optionReplies.unknownExport)
          continue
        }
        if (blockSizes !== undefined) await reply(optionReplies.info, protocol.encodeBlockSizeInfo(blockSizes[0], 4096, blockSizes[1]))
        await reply(optionReplies.info, protocol.encodeExportInfo(this.bytes.length, this.#flags))
        await reply(optionReplies.ack)
        return true
      } else await reply(refusal)
    }
  }

  async #transmit(transport: NbdTransport, reader: ByteReader): Promise<void> {
    for (let head = await reader.tryRead(28); head !== undefined; head = await reader.tryRead(28)) {
      const request = protocol.decodeRequest(head)
      if (request.command === commands.disconnect) return
      this.seen.push(request)
      const data = request.command === commands.write ? await reader.read(request.length) : undefined
      await transport.send(this.#answer(request, data))
    }
  }

  #answer(request: protocol.Request, data: Uint8Array | undefined): Uint8Array[] {
    const { command, cookie, offset, length } = request
    const { structured = false, demands = 1, blockSizes } = this.#age
    const ok = (): Uint8Array[] =>
      structured ? [protocol.encodeChunk({ flags: protocol.chunkDone, type: protocol.chunkTypes.none, cookie, length: 0 })] : [protocol.encodeSimpleReply(cookie, 0)]
    const refuse = (): Uint8Array[] => (structured ? [protocol.encodeErrorChunk(cookie, errors.invalid, 'refused')] : [protocol.encodeSimpleReply(cookie, errors.invalid)])
    const carries = command === commands.read || command === commands.write
    if (offset % demands !== 0 || length % demands !== 0 || offset + length > this.bytes.length || (carries && length > (blockSizes?.[1] ?? protocol.maxPayload))) return refuse()
    const can = (flag: number): boolean => (this.#flags & transmissionFlags.hasFlags) !== 0 && (this.#flags & flag) !== 0
    if (command === commands.read) {
      const bytes = this.bytes.slice(offset, offset + length)
      return structured ? [protocol.encodeDataChunk(cookie, protocol.chunkDone, offset, length), bytes] : [protocol.encodeSimpleReply(cookie, 0), bytes]
    }
    if (command === commands.write) this.bytes.set(data!, offset)
    else if (command === commands.flush && can(transmissionFlags.sendFlush)) return ok()
    else if (command === commands.trim && can(transmissionFlags.sendTrim)) return ok()
    else if (command === commands.writeZeroes && can(transmissionFlags.sendWriteZeroes)) this.bytes.fill(0, offset, offset + length)
    else if (command === commands.blockStatus && this.#age.contexts === true) return [protocol.encodeStatusChunk(cookie, protocol.chunkDone, 7, this.#runs(offset, length))]
    else return refuse()
    return ok()
  }

  /** Zeroes and data, 4 KiB exactly. */
  #runs(offset: number, length: number): protocol.StatusRun[] {
    const runs: { length: number; flags: number }[] = []
    for (let at = offset; at < offset + length; ) {
      const end = Math.min(offset + length, (Math.floor(at / 4096) + 1) * 4096)
      const flags = this.bytes.subarray(at, end).every((byte) => byte === 0) ? 3 : 0
      if (runs.at(-1)?.flags === flags) runs.at(-1)!.length += end - at
      else runs.push({ length: end - at, flags })
      at = end
    }
    return runs
  }
}
