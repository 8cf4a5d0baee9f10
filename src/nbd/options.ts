/**
 * The messages of the negotiation: greeting, options and their replies, encoded and decoded. Owns the
 * bytes; knows nothing of sockets, devices or the order of a conversation.
 *
 * Format: the NBD project's `doc/proto.md`, "fixed newstyle" negotiation with structured replies.
 * All integers are big-endian.
 */
import { writeU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'
import { Cursor, decodeText, wrong } from './cursor.ts'
import { infoTypes, sizes } from './numbers.ts'

/** `NBDMAGIC`, then `IHAVEOPT`: how a server greets. */
const greetingMagic = new TextEncoder().encode('NBDMAGIC')
const oldstyleMagic = new Uint8Array([0x00, 0x00, 0x42, 0x02, 0x81, 0x86, 0x12, 0x53])
const optionMagic = new TextEncoder().encode('IHAVEOPT')
const optionReplyMagic = [0x0003e889, 0x045565a9] as const

/** An option as a client sends it; the data follows the head. */
export interface OptionHead {
  readonly type: number
  /** Bytes of data that follow. */
  readonly length: number
}

/** A reply to an option; the data follows the head. */
export interface OptionReplyHead {
  readonly option: number
  readonly type: number
  /** Bytes of data that follow. */
  readonly length: number
}

/** `NBDMAGIC IHAVEOPT flags:16`: the first bytes a server sends. */
export function encodeGreeting(flags: number): Uint8Array {
  const bytes = new Uint8Array(sizes.greeting)
  bytes.set(greetingMagic, 0)
  bytes.set(optionMagic, 8)
  viewOf(bytes).setUint16(16, flags)
  return bytes
}

/** True for the start of an oldstyle greeting, which has the size instead of flags. */
export function isOldstyle(greeting: Uint8Array): boolean {
  return sameBytes(greeting.subarray(0, 8), greetingMagic) && sameBytes(greeting.subarray(8, 16), oldstyleMagic)
}

/** `NBDMAGIC magic:64 size:64 handshakeFlags:16 flags:16`, then 124 zeroes: all that an oldstyle server says. */
export function decodeOldstyle(bytes: Uint8Array): { size: number; flags: number } {
  const cursor = new Cursor(bytes.subarray(16), 'NBD greeting')
  const size = cursor.u64()
  cursor.u16()
  return { size, flags: cursor.u16() }
}

/** The handshake flags of a server's greeting. */
export function decodeGreeting(bytes: Uint8Array): number {
  if (!sameBytes(bytes.subarray(0, 8), greetingMagic)) throw wrong('NBD greeting', 'magic is not NBDMAGIC')
  if (!sameBytes(bytes.subarray(8, 16), optionMagic)) {
    throw wrong('NBD greeting', 'the server does not speak the newstyle negotiation')
  }
  return viewOf(bytes).getUint16(16)
}

/** `IHAVEOPT option:32 length:32 data`. */
export function encodeOption(type: number, data: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(sizes.option + data.length)
  const view = viewOf(bytes)
  bytes.set(optionMagic, 0)
  view.setUint32(8, type)
  view.setUint32(12, data.length)
  bytes.set(data, sizes.option)
  return bytes
}

/** Decodes the 16 bytes before an option's data. */
export function decodeOption(bytes: Uint8Array): OptionHead {
  if (!sameBytes(bytes.subarray(0, 8), optionMagic)) throw wrong('NBD option', 'magic is not IHAVEOPT')
  const view = viewOf(bytes)
  return { type: view.getUint32(8), length: view.getUint32(12) }
}

/** `magic:64 option:32 type:32 length:32 data`. */
export function encodeOptionReply(option: number, type: number, data: Uint8Array = nothing): Uint8Array {
  const bytes = new Uint8Array(sizes.optionReply + data.length)
  const view = viewOf(bytes)
  view.setUint32(0, optionReplyMagic[0])
  view.setUint32(4, optionReplyMagic[1])
  view.setUint32(8, option)
  view.setUint32(12, type)
  view.setUint32(16, data.length)
  bytes.set(data, sizes.optionReply)
  return bytes
}

/** Decodes the 20 bytes before an option reply's data. */
export function decodeOptionReply(bytes: Uint8Array): OptionReplyHead {
  const view = viewOf(bytes)
  if (view.getUint32(0) !== optionReplyMagic[0] || view.getUint32(4) !== optionReplyMagic[1]) {
    throw wrong('NBD option reply', 'magic is not 0x3e889045565a9')
  }
  return { option: view.getUint32(8), type: view.getUint32(12), length: view.getUint32(16) }
}

/** `size:64 flags:16`, then 124 zeroes unless the client waived them: the reply to `exportName`. */
export function encodeExportName(size: number, flags: number, zeroes: boolean): Uint8Array {
  const bytes = new Uint8Array(sizes.exportName + (zeroes ? sizes.zeroes : 0))
  const view = viewOf(bytes)
  writeU64(view, 0, size)
  view.setUint16(8, flags)
  return bytes
}

/** The size and the flags of a reply to `exportName`. */
export function decodeExportName(bytes: Uint8Array): { size: number; flags: number } {
  const cursor = new Cursor(bytes, 'NBD export name reply')
  return { size: cursor.u64(), flags: cursor.u16() }
}

/** `type:16 = export, size:64, flags:16`. */
export function encodeExportInfo(size: number, flags: number): Uint8Array {
  const bytes = new Uint8Array(12)
  const view = viewOf(bytes)
  view.setUint16(0, infoTypes.export)
  writeU64(view, 2, size)
  view.setUint16(10, flags)
  return bytes
}

/** `type:16 = blockSize, minimum:32, preferred:32, maximum:32`, in bytes. */
export function encodeBlockSizeInfo(minimum: number, preferred: number, maximum: number): Uint8Array {
  const bytes = new Uint8Array(14)
  const view = viewOf(bytes)
  view.setUint16(0, infoTypes.blockSize)
  view.setUint32(2, minimum)
  view.setUint32(6, preferred)
  view.setUint32(10, maximum)
  return bytes
}

/** `type:16, text`: the name or the description of an export. */
export function encodeTextInfo(type: number, value: string): Uint8Array {
  const encoded = utf8.encode(value)
  const bytes = new Uint8Array(2 + encoded.length)
  viewOf(bytes).setUint16(0, type)
  bytes.set(encoded, 2)
  return bytes
}

/** `length:32 text`: a name as it appears inside option data. */
export function encodeString(value: string): Uint8Array {
  const encoded = utf8.encode(value)
  const bytes = new Uint8Array(4 + encoded.length)
  viewOf(bytes).setUint32(0, encoded.length)
  bytes.set(encoded, 4)
  return bytes
}

/** `length:32 name description`: one export of a listing. */
export function encodeListed(name: string, description = ''): Uint8Array {
  const bytes = encodeString(name + description)
  viewOf(bytes).setUint32(0, utf8.encode(name).length)
  return bytes
}

/** `id:32 name`: a metadata context in an option reply. */
export function encodeMetaContext(id: number, name: string): Uint8Array {
  const bytes = encodeString(name)
  viewOf(bytes).setUint32(0, id)
  return bytes
}

/** What `info` and `go` ask. Data: `nameLength:32 name count:16 (type:16)*`. */
export function decodeInfoRequest(data: Uint8Array): { name: string; requests: number[] } {
  const cursor = new Cursor(data, 'NBD info option')
  const name = cursor.string()
  const count = cursor.u16()
  const requests = Array.from({ length: cursor.fits(count, 2) }, () => cursor.u16())
  cursor.end()
  return { name, requests }
}

/** What the metadata context options ask. Data: `nameLength:32 name count:32 (queryLength:32 query)*`. */
export function decodeMetaContextRequest(data: Uint8Array): { name: string; queries: string[] } {
  const cursor = new Cursor(data, 'NBD metadata context option')
  const name = cursor.string()
  const count = cursor.u32()
  const queries = Array.from({ length: cursor.fits(count, 4) }, () => cursor.string())
  cursor.end()
  return { name, queries }
}

/** A name that is all of an option's data. */
export function decodeName(data: Uint8Array): string {
  return decodeText(data, 'NBD export name')
}

const utf8 = new TextEncoder()
const nothing = new Uint8Array(0)

function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, at) => byte === b[at])
}
