/**
 * The return path: what a migration's destination says to its source, on the same connection.
 *
 * ```
 *  be16 type | be16 length | payload (RECV_BITMAP goes on behind it, see `parseBitmap`)
 * ```
 */
import { concat } from '../bytes/concat.ts'
import { readU64, writeU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'
import { streamError } from './format.ts'

/** A message of the destination. */
export type ReturnPathMessage =
  /** Last message; 0: all is well. */
  | { readonly kind: 'shut'; readonly value: number }
  /** The answer to PING. */
  | { readonly kind: 'pong'; readonly value: number }
  /** The guest waits for these bytes of a RAM block. */
  | { readonly kind: 'request-pages'; readonly block: string; readonly offset: number; readonly length: number }
  /** Pages that have arrived: bit `i & 7` of byte `i >> 3` for page `i` of the block. */
  | { readonly kind: 'received-bitmap'; readonly block: string; readonly bitmap: Uint8Array }
  /** The answer to POSTCOPY_RESUME; 1: go on. */
  | { readonly kind: 'resume-ack'; readonly value: number }
  /** The destination is ready to switch over. */
  | { readonly kind: 'switchover-ack' }

/** Message types as in the stream. */
const type = {
  shut: 1,
  pong: 2,
  requestPagesWithBlock: 3,
  requestPages: 4,
  receivedBitmap: 5,
  resumeAck: 6,
  switchoverAck: 7,
} as const

/** Payload lengths allowed for each type; QEMU reads a payload into a buffer of 512 bytes. */
const payloadLengths = new Map<number, readonly [number, number]>([
  [type.shut, [4, 4]],
  [type.pong, [4, 4]],
  [type.requestPagesWithBlock, [14, 512]],
  [type.requestPages, [12, 12]],
  [type.receivedBitmap, [2, 512]],
  [type.resumeAck, [4, 4]],
  [type.switchoverAck, [0, 0]],
])

/** Closes a received-pages bitmap: be64 0x0123456789abcdef. */
const bitmapEnd = [0x0123_4567, 0x89ab_cdef] as const

const structure = 'return path'

/** Options of {@link ReturnPathParser}. */
export interface ReturnPathOptions {
  /** The largest bitmap accepted, in bytes; default 64 MiB, enough for a RAM block of 2 TiB. */
  readonly bitmapLimit?: number | undefined
}

/** A message, or how many bytes must be there before it makes sense to look again. */
type Parsed = { readonly message: ReturnPathMessage; readonly length: number } | number

/** Turns bytes, in pieces of any size, into messages. */
export class ReturnPathParser {
  readonly #bitmapLimit: number
  #parts: Uint8Array[] = []
  #have = 0
  #need = 4
  #offset = 0
  #block: string | undefined

  constructor(options: ReturnPathOptions = {}) {
    this.#bitmapLimit = options.bitmapLimit ?? 64 << 20
  }

  /**
   * The messages completed by `chunk`, which is not kept.
   * @throws FormatError (`ERR_STREAM`) for anything no destination says.
   */
  push(chunk: Uint8Array): ReturnPathMessage[] {
    this.#have += chunk.length
    if (this.#have < this.#need) {
      this.#parts.push(new Uint8Array(chunk)) // a copy; slice() of a Buffer would not be one
      return []
    }
    const bytes = this.#join(chunk)
    const messages: ReturnPathMessage[] = []
    let at = 0
    for (;;) {
      const parsed = this.#parse(bytes.subarray(at))
      if (typeof parsed === 'number') {
        this.#need = parsed
        break
      }
      messages.push(parsed.message)
      at += parsed.length
      this.#offset += parsed.length
    }
    this.#have = bytes.length - at
    this.#parts = this.#have === 0 ? [] : [new Uint8Array(bytes.subarray(at))]
    return messages
  }

  /** Call at the end of the input. @throws FormatError (`ERR_STREAM`) if a message was cut. */
  end(): void {
    if (this.#have > 0) throw this.#error('message', `input ends ${this.#have} bytes into a message`)
  }

  #join(chunk: Uint8Array): Uint8Array {
    if (this.#parts.length === 0) return chunk
    return concat([...this.#parts, chunk])
  }

  #parse(bytes: Uint8Array): Parsed {
    if (bytes.length < 4) return 4
    const view = viewOf(bytes)
    const number = view.getUint16(0)
    const length = view.getUint16(2)
    this.#checkLength(number, length)
    if (bytes.length < 4 + length) return 4 + length
    const payload = bytes.subarray(4, 4 + length)
    if (number === type.receivedBitmap) return this.#parseBitmap(bytes, payload)
    return { message: this.#message(number, payload), length: 4 + length }
  }

  #checkLength(number: number, length: number): void {
    const allowed = payloadLengths.get(number)
    if (allowed === undefined) throw this.#error('type', `message type is ${number}, allowed 1 to 7`)
    const [least, most] = allowed
    if (length >= least && length <= most) return
    const range = least === most ? String(least) : `${least} to ${most}`
    throw this.#error('length', `length of a message of type ${number} is ${length}, allowed ${range}`)
  }

  #message(number: number, payload: Uint8Array): ReturnPathMessage {
    const view = viewOf(payload)
    if (number === type.shut) return { kind: 'shut', value: view.getUint32(0) }
    if (number === type.pong) return { kind: 'pong', value: view.getUint32(0) }
    if (number === type.resumeAck) return { kind: 'resume-ack', value: view.getUint32(0) }
    if (number === type.switchoverAck) return { kind: 'switchover-ack' }
    if (number === type.requestPagesWithBlock) this.#block = this.#name(payload, 12)
    if (this.#block === undefined) throw this.#error('block', 'a page request comes before any block was named')
    const offset = readU64(view, 0, { structure, field: 'start', offset: this.#offset + 4 })
    return { kind: 'request-pages', block: this.#block, offset, length: view.getUint32(8) }
  }

  /**
   * What stands behind the payload of RECV_BITMAP, not counted in its length:
   *
   * ```
   *  be64 n | n bytes of bits, n a multiple of 8 | be64 0x0123456789abcdef
   * ```
   */
  #parseBitmap(bytes: Uint8Array, payload: Uint8Array): Parsed {
    const block = this.#name(payload, 0)
    const at = 4 + payload.length
    if (bytes.length < at + 8) return at + 8
    const view = viewOf(bytes)
    const size = readU64(view, at, { structure, field: 'bitmap size', offset: this.#offset + at })
    if (size > this.#bitmapLimit || size % 8 !== 0) {
      const allowed = `allowed multiples of 8 up to ${this.#bitmapLimit}`
      throw this.#error('bitmap size', `bitmap size of block ${block} is ${size}, ${allowed}`)
    }
    const length = at + 8 + size + 8
    if (bytes.length < length) return length
    if (view.getUint32(length - 8) !== bitmapEnd[0] || view.getUint32(length - 4) !== bitmapEnd[1]) {
      throw this.#error('end mark', `bitmap of block ${block} does not end with its end mark`)
    }
    return { message: { kind: 'received-bitmap', block, bitmap: new Uint8Array(bytes.subarray(at + 8, length - 8)) }, length }
  }

  #name(payload: Uint8Array, at: number): string {
    const length = payload[at]!
    if (length === 0 || at + 1 + length !== payload.length) {
      throw this.#error('block', `block name of ${length} bytes does not fit a payload of ${payload.length}`)
    }
    return new TextDecoder().decode(payload.subarray(at + 1))
  }

  #error(field: string, detail: string): Error {
    return streamError(structure, field, detail, this.#offset)
  }
}

/** A message as bytes; a page request always names its block. */
export function encodeReturnPath(message: ReturnPathMessage): Uint8Array {
  switch (message.kind) {
    case 'shut':
      return framed(type.shut, word(message.value))
    case 'pong':
      return framed(type.pong, word(message.value))
    case 'resume-ack':
      return framed(type.resumeAck, word(message.value))
    case 'switchover-ack':
      return framed(type.switchoverAck, new Uint8Array(0))
    case 'request-pages': {
      const name = new TextEncoder().encode(message.block)
      const payload = new Uint8Array(13 + name.length)
      writeU64(viewOf(payload), 0, message.offset)
      viewOf(payload).setUint32(8, message.length)
      payload[12] = name.length
      payload.set(name, 13)
      return framed(type.requestPagesWithBlock, payload)
    }
    case 'received-bitmap':
      return encodeBitmap(message.block, message.bitmap)
  }
}

function encodeBitmap(block: string, bitmap: Uint8Array): Uint8Array {
  const name = new TextEncoder().encode(block)
  const head = framed(type.receivedBitmap, Uint8Array.of(name.length, ...name))
  const bytes = new Uint8Array(head.length + 16 + bitmap.length)
  const view = viewOf(bytes)
  bytes.set(head)
  writeU64(view, head.length, bitmap.length)
  bytes.set(bitmap, head.length + 8)
  view.setUint32(bytes.length - 8, bitmapEnd[0])
  view.setUint32(bytes.length - 4, bitmapEnd[1])
  return bytes
}

function framed(number: number, payload: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(4 + payload.length)
  viewOf(bytes).setUint16(0, number)
  viewOf(bytes).setUint16(2, payload.length)
  bytes.set(payload, 4)
  return bytes
}

function word(value: number): Uint8Array {
  const bytes = new Uint8Array(4)
  viewOf(bytes).setUint32(0, value)
  return bytes
}
