/**
 * The parser's view of input that arrives in pieces of any size. Owns the carry: a structure cut by
 * the edge of a chunk is gathered in a small buffer, so at most one structure (a page, a name) is
 * copied for each chunk. Knows nothing of the stream's format.
 *
 * A structure is read between `begin()` and the next `begin()`. A read past the end of the input
 * throws {@link underrun}; the parser catches it, calls `refill()` and reads the structure again.
 */
import { streamError } from './format.ts'

/** Thrown (always this one object) when a structure is not complete yet. */
export const underrun: Error = new Error('more input is needed')

const nothing = new Uint8Array(0)
/** Least bytes of the carry: a page and its header. */
const carrySize = 8 << 10
const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** A window of contiguous input with a read position. */
export class ParserInput {
  /** The window; valid from `at` to `end`. */
  bytes: Uint8Array = nothing
  view: DataView = new DataView(nothing.buffer)
  at = 0
  end = 0
  /** Stream offset of `bytes[0]`. */
  base: number

  #start = 0
  #wanted = 0
  #carrying = false
  /** Used again for each chunk: by then nothing refers to the structure before. */
  #carry: Uint8Array = nothing
  #chunk: Uint8Array = nothing
  #chunkAt = 0
  #chunkBase: number

  constructor(offset: number) {
    this.base = offset
    this.#chunkBase = offset
  }

  /** Stream offset of the next byte. */
  get offset(): number {
    return this.base + this.at
  }

  /** Stream offset at which the structure being read began. */
  get startOffset(): number {
    return this.base + this.#start
  }

  /** Bytes of an incomplete structure that wait for more. */
  get pending(): number {
    return this.end - this.#start
  }

  /** Bytes the incomplete structure needs at least. */
  get wanted(): number {
    return this.#wanted
  }

  /** True when everything pushed was consumed or gathered for the next structure. */
  get exhausted(): boolean {
    return this.#carrying ? this.#chunkAt === this.#chunk.length : this.at === this.end
  }

  /** Appends a chunk. The one before must be exhausted. */
  push(chunk: Uint8Array): void {
    this.#chunkBase += this.#chunk.length
    // A Node Buffer's slice() does not copy; a plain array behaves as its type says.
    this.#chunk = new Uint8Array(chunk.buffer, chunk.byteOffset, chunk.byteLength)
    this.#chunkAt = 0
    if (!this.#carrying) this.#useChunk(0)
  }

  /** Passes over `length` bytes that will not be pushed. Everything pushed must be consumed. */
  skip(length: number): void {
    this.#chunkBase += this.#chunk.length + length
    this.#chunk = nothing
    this.#chunkAt = 0
    this.#useChunk(0)
    this.#start = 0
  }

  /** Begins a structure at the read position. */
  begin(): void {
    if (this.#carrying && this.end - this.at <= this.#chunkAt) this.#useChunk(this.#chunkAt - (this.end - this.at))
    this.#start = this.at
  }

  /** Back to the start of the structure; true when what it wanted is there now. */
  refill(): boolean {
    const wanted = this.#wanted
    const have = this.end - this.#start
    if (!this.#carrying || this.bytes.length - this.#start < wanted) {
      if (this.#carrying || this.#carry.length < wanted) this.#carry = new Uint8Array(Math.max(wanted, carrySize))
      this.#carry.set(this.bytes.subarray(this.#start, this.end))
      if (!this.#carrying) this.#chunkAt = this.#chunk.length
      this.base += this.#start
      this.#use(this.#carry, 0, have)
      this.#start = 0
      this.#carrying = true
    }
    const take = Math.min(wanted - have, this.#chunk.length - this.#chunkAt)
    this.bytes.set(this.#chunk.subarray(this.#chunkAt, this.#chunkAt + take), this.end)
    this.#chunkAt += take
    this.end += take
    this.at = this.#start
    return have + take >= wanted
  }

  /** Tells `refill` how many bytes the structure needs, for a reader that does not throw. */
  want(length: number): void {
    this.#wanted = length
  }

  /** Throws `underrun` unless `length` more bytes are in the window. */
  require(length: number): void {
    if (this.end - this.at >= length) return
    this.#wanted = this.at - this.#start + length
    throw underrun
  }

  u8(): number {
    this.require(1)
    return this.bytes[this.at++]!
  }

  u16(): number {
    this.require(2)
    this.at += 2
    return this.view.getUint16(this.at - 2)
  }

  u32(): number {
    this.require(4)
    this.at += 4
    return this.view.getUint32(this.at - 4)
  }

  /** A be64 that must be a safe integer; `structure` and `field` name it in the error. */
  u64(structure: string, field: string): number {
    this.require(8)
    const high = this.view.getUint32(this.at)
    if (high > 0x1f_ffff) throw streamError(structure, field, `${field} exceeds 2^53 - 1`, this.offset)
    this.at += 8
    return high * 0x1_0000_0000 + this.view.getUint32(this.at - 4)
  }

  /** The next `length` bytes, not copied. */
  take(length: number): Uint8Array {
    this.require(length)
    this.at += length
    return this.bytes.subarray(this.at - length, this.at)
  }

  /** The next `length` bytes as UTF-8. */
  text(length: number, structure: string, field: string): string {
    const offset = this.offset
    const bytes = this.take(length)
    try {
      return decoder.decode(bytes)
    } catch {
      throw streamError(structure, field, `${field} is not valid UTF-8`, offset)
    }
  }

  /** A counted string: one length byte, 1 to 255, then UTF-8. */
  counted(structure: string, field: string): string {
    const length = this.u8()
    if (length === 0) throw streamError(structure, field, `${field} is empty`, this.offset - 1)
    return this.text(length, structure, field)
  }

  #useChunk(at: number): void {
    this.#carrying = false
    this.base = this.#chunkBase
    this.#use(this.#chunk, at, this.#chunk.length)
  }

  #use(bytes: Uint8Array, at: number, end: number): void {
    this.bytes = bytes
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    this.at = at
    this.end = end
  }
}
