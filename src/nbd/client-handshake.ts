/** The client's side of the negotiation. Owns what is asked of a server, and the check of what it says. */
import { concat } from '../bytes/concat.ts'
import { FormatError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import * as protocol from './protocol.ts'
import { infoTypes, optionReplies, optionTypes } from './protocol.ts'
import type { ByteReader, NbdTransport } from './transport.ts'

/** What a server said of the export. */
export interface Handshake {
  readonly size: number
  readonly flags: number
  readonly minimum: number
  readonly maximum: number
  /** Ids of the contexts the server agreed to. */
  readonly contexts: ReadonlyMap<number, string>
}

const usualContexts = ['base:allocation', 'qemu:allocation-depth']

/** Negotiates structured replies, the contexts of a map, and the export. */
export async function shakeHands(transport: NbdTransport, reader: ByteReader, name: string, contextNames: readonly string[] = usualContexts): Promise<Handshake> {
  const { fixedNewstyle, noZeroes } = protocol.handshakeFlags
  const flags = protocol.decodeGreeting(await reader.read(protocol.sizes.greeting))
  if ((flags & fixedNewstyle) === 0) throw new UnsupportedError('the NBD server does not speak fixed newstyle', ['fixed newstyle'])
  await transport.send([new Uint8Array([0, 0, 0, flags & (fixedNewstyle | noZeroes)])])
  const ask = (type: number, data: Uint8Array): Promise<Uint8Array[]> => haggle(transport, reader, { type, data, name })
  await ask(optionTypes.structuredReply, new Uint8Array(0))
  const contexts = new Map<number, string>()
  for (const reply of await ask(optionTypes.setMetaContext, concat([protocol.encodeString(name), u32(contextNames.length), ...contextNames.map(protocol.encodeString)]))) {
    const cursor = new protocol.Cursor(reply, 'NBD metadata context')
    contexts.set(cursor.u32(), new TextDecoder().decode(cursor.bytes(cursor.left)))
  }
  const wanted = [0, 1, 0, infoTypes.blockSize] // one request: the block sizes
  const infos = await ask(optionTypes.go, concat([protocol.encodeString(name), new Uint8Array(wanted)]))
  return { ...readInfos(infos), contexts }
}

function readInfos(infos: readonly Uint8Array[]): Omit<Handshake, 'contexts'> {
  const found = { size: 0, flags: 0, minimum: 1, maximum: protocol.maxPayload }
  for (const info of infos) {
    const cursor = new protocol.Cursor(info, 'NBD export info')
    const type = cursor.u16()
    if (type === infoTypes.export) {
      found.size = cursor.u64()
      found.flags = cursor.u16()
    } else if (type === infoTypes.blockSize) {
      found.minimum = cursor.u32()
      cursor.u32()
      found.maximum = Math.min(cursor.u32(), protocol.maxPayload)
    }
  }
  const { minimum, maximum } = found
  if (minimum < 1 || (minimum & (minimum - 1)) !== 0 || minimum > 65536 || maximum < minimum || maximum % minimum !== 0) {
    throw new FormatError(`block sizes are ${minimum} and ${maximum}`, { structure: 'NBD export info' })
  }
  return found
}

/** Sends one option; the data of its replies up to the ack. */
async function haggle(
  transport: NbdTransport,
  reader: ByteReader,
  option: { type: number; data: Uint8Array; name: string },
): Promise<Uint8Array[]> {
  await transport.send([protocol.encodeOption(option.type, option.data)])
  const replies: Uint8Array[] = []
  while (replies.length < 1000) {
    const head = protocol.decodeOptionReply(await reader.read(protocol.sizes.optionReply))
    if (head.length > protocol.maxOptionLength) throw new FormatError(`length is ${head.length}`, { structure: 'NBD option reply' })
    const data = await reader.read(head.length)
    if (head.type === optionReplies.ack) return replies
    if (head.type < 0x8000_0000) {
      replies.push(data)
      continue
    }
    const words = new TextDecoder().decode(data)
    if (head.type === optionReplies.unknownExport) {
      throw new Qcow2Error('ERR_NOT_FOUND', `the NBD server has no export named '${option.name}'${words === '' ? '' : `: ${words}`}`)
    }
    if (option.type === optionTypes.setMetaContext) return []
    throw new UnsupportedError(`the NBD server refused option ${option.type} (0x${head.type.toString(16)})${words === '' ? '' : `: ${words}`}`)
  }
  throw new FormatError('more than 1000 replies', { structure: 'NBD option reply' })
}

function u32(value: number): Uint8Array {
  const bytes = new Uint8Array(4)
  new DataView(bytes.buffer).setUint32(0, value)
  return bytes
}
