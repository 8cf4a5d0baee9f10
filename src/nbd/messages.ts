/**
 * The messages of the transmission phase: requests, simple replies and the chunks of structured ones,
 * encoded and decoded. Owns the bytes; knows nothing of sockets or devices.
 *
 * Format: the NBD project's `doc/proto.md`, "fixed newstyle" negotiation with structured replies.
 * All integers are big-endian.
 */
import { writeU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'
import { wrong } from './cursor.ts'
import { chunkDone, chunkTypes, sizes } from './numbers.ts'

const requestMagic = 0x25609513
const simpleReplyMagic = 0x67446698
const structuredReplyMagic = 0x668e33ef

/** A command of the transmission phase; a write's payload follows. */
export interface Request {
  readonly flags: number
  readonly command: number
  /** The client's own mark on the request; the reply carries it back unchanged. */
  readonly cookie: Uint8Array
  /** First byte, or `Infinity` where the client's number is past 2^53 - 1. */
  readonly offset: number
  /** Bytes. */
  readonly length: number
}

/** The head of one chunk of a structured reply; the payload follows. */
export interface ChunkHead {
  readonly flags: number
  readonly type: number
  readonly cookie: Uint8Array
  /** Bytes of payload that follow. */
  readonly length: number
}

/** One run of a block status reply. */
export interface StatusRun {
  /** Bytes. */
  readonly length: number
  /** The state, as the context defines it. */
  readonly flags: number
}

/** `magic:32 flags:16 command:16 cookie:64 offset:64 length:32`. */
export function encodeRequest(request: Request): Uint8Array {
  const bytes = new Uint8Array(sizes.request)
  const view = viewOf(bytes)
  view.setUint32(0, requestMagic)
  view.setUint16(4, request.flags)
  view.setUint16(6, request.command)
  bytes.set(request.cookie, 8)
  writeU64(view, 16, request.offset)
  view.setUint32(24, request.length)
  return bytes
}

/** Decodes the 28 bytes of a request. The cookie is a copy. */
export function decodeRequest(bytes: Uint8Array): Request {
  const view = viewOf(bytes)
  const magic = view.getUint32(0)
  if (magic !== requestMagic) {
    throw wrong('NBD request', `magic is 0x${magic.toString(16)}, expected 0x${requestMagic.toString(16)}`)
  }
  // past 2^53 is past the end of any export: the request fails, the connection need not
  const offset = view.getUint32(16) > 0x1f_ffff ? Infinity : view.getUint32(16) * 0x1_0000_0000 + view.getUint32(20)
  return {
    flags: view.getUint16(4),
    command: view.getUint16(6),
    cookie: bytes.slice(8, 16),
    offset,
    length: view.getUint32(24),
  }
}

/** `magic:32 error:32 cookie:64`; a read's bytes follow. */
export function encodeSimpleReply(cookie: Uint8Array, error: number): Uint8Array {
  const bytes = new Uint8Array(sizes.simpleReply)
  const view = viewOf(bytes)
  view.setUint32(0, simpleReplyMagic)
  view.setUint32(4, error)
  bytes.set(cookie, 8)
  return bytes
}

/** `magic:32 flags:16 type:16 cookie:64 length:32`; the payload follows. */
export function encodeChunk(head: ChunkHead): Uint8Array {
  const bytes = new Uint8Array(sizes.chunk)
  writeChunk(viewOf(bytes), bytes, head)
  return bytes
}

/** A chunk whose payload is an offset, then `length` bytes that the caller sends after it. */
export function encodeDataChunk(cookie: Uint8Array, flags: number, offset: number, length: number): Uint8Array {
  const bytes = new Uint8Array(sizes.chunk + 8)
  const view = viewOf(bytes)
  writeChunk(view, bytes, { flags, type: chunkTypes.offsetData, cookie, length: 8 + length })
  writeU64(view, sizes.chunk, offset)
  return bytes
}

/** A chunk that says `length` bytes at `offset` are zeroes. */
export function encodeHoleChunk(cookie: Uint8Array, flags: number, offset: number, length: number): Uint8Array {
  const bytes = new Uint8Array(sizes.chunk + 12)
  const view = viewOf(bytes)
  writeChunk(view, bytes, { flags, type: chunkTypes.offsetHole, cookie, length: 12 })
  writeU64(view, sizes.chunk, offset)
  view.setUint32(sizes.chunk + 8, length)
  return bytes
}

/** A chunk with the status runs of one context, in order from the request's offset. */
export function encodeStatusChunk(cookie: Uint8Array, flags: number, contextId: number, runs: readonly StatusRun[]): Uint8Array {
  const bytes = new Uint8Array(sizes.chunk + 4 + runs.length * 8)
  const view = viewOf(bytes)
  writeChunk(view, bytes, { flags, type: chunkTypes.blockStatus, cookie, length: 4 + runs.length * 8 })
  view.setUint32(sizes.chunk, contextId)
  let at = sizes.chunk + 4
  for (const run of runs) {
    view.setUint32(at, run.length)
    view.setUint32(at + 4, run.flags)
    at += 8
  }
  return bytes
}

/** A chunk that ends a structured reply with an error and a message for people. */
export function encodeErrorChunk(cookie: Uint8Array, error: number, message: string): Uint8Array {
  const encoded = utf8.encode(message.slice(0, 1024))
  const bytes = new Uint8Array(sizes.chunk + 6 + encoded.length)
  const view = viewOf(bytes)
  writeChunk(view, bytes, { flags: chunkDone, type: chunkTypes.error, cookie, length: 6 + encoded.length })
  view.setUint32(sizes.chunk, error)
  view.setUint16(sizes.chunk + 4, encoded.length)
  bytes.set(encoded, sizes.chunk + 6)
  return bytes
}

/** Either head a server may answer a request with. The cookies are copies. */
export type ReplyHead =
  | { readonly structured: false; readonly cookie: Uint8Array; readonly error: number }
  | ({ readonly structured: true } & ChunkHead)

/** The magic at the start of a reply says how long its head is: 16 bytes or 20. */
export function replyHeadSize(magic: Uint8Array): number {
  const value = viewOf(magic).getUint32(0)
  if (value === simpleReplyMagic) return sizes.simpleReply
  if (value === structuredReplyMagic) return sizes.chunk
  throw wrong('NBD reply', `magic is 0x${value.toString(16)}`)
}

/** Decodes a reply's head of {@link replyHeadSize} bytes. */
export function decodeReplyHead(bytes: Uint8Array): ReplyHead {
  const view = viewOf(bytes)
  const cookie = bytes.slice(8, 16)
  if (bytes.length === sizes.simpleReply) return { structured: false, cookie, error: view.getUint32(4) }
  return { structured: true, flags: view.getUint16(4), type: view.getUint16(6), cookie, length: view.getUint32(16) }
}

const utf8 = new TextEncoder()

function writeChunk(view: DataView, bytes: Uint8Array, head: ChunkHead): void {
  view.setUint32(0, structuredReplyMagic)
  view.setUint16(4, head.flags)
  view.setUint16(6, head.type)
  bytes.set(head.cookie, 8)
  view.setUint32(16, head.length)
}
