/** Appends big-endian fields to a growing array. */
import { writeU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'

const encoder = new TextEncoder()

/** Every method appends and gives the writer itself. */
export class ByteWriter {
  #buffer: Uint8Array
  #view: DataView
  #length = 0

  /** @param capacity Bytes expected; more grow the array. */
  constructor(capacity = 64) {
    this.#buffer = new Uint8Array(capacity)
    this.#view = viewOf(this.#buffer)
  }

  /** What was written so far; shares memory with the writer. */
  get bytes(): Uint8Array {
    return this.#buffer.subarray(0, this.#length)
  }

  u8(value: number): this {
    const at = this.#grow(1)
    this.#view.setUint8(at, value)
    return this
  }

  u16(value: number): this {
    const at = this.#grow(2)
    this.#view.setUint16(at, value)
    return this
  }

  u32(value: number): this {
    const at = this.#grow(4)
    this.#view.setUint32(at, value)
    return this
  }

  /** @param value An integer from 0 to 2^53 - 1. */
  u64(value: number): this {
    const at = this.#grow(8)
    writeU64(this.#view, at, value)
    return this
  }

  raw(bytes: Uint8Array): this {
    const at = this.#grow(bytes.length)
    this.#buffer.set(bytes, at)
    return this
  }

  /** One length byte, then UTF-8. @throws RangeError unless it has 1 to 255 bytes. */
  counted(text: string): this {
    const bytes = encoder.encode(text)
    if (bytes.length < 1 || bytes.length > 255) throw new RangeError(`name '${text}' has ${bytes.length} bytes, allowed 1 to 255`)
    return this.u8(bytes.length).raw(bytes)
  }

  /** Makes room for `length` bytes and gives their position. Call it before taking the view: it may renew it. */
  #grow(length: number): number {
    const at = this.#length
    this.#length += length
    if (this.#length > this.#buffer.length) {
      const larger = new Uint8Array(Math.max(this.#length, this.#buffer.length * 2))
      larger.set(this.#buffer.subarray(0, at))
      this.#buffer = larger
      this.#view = viewOf(larger)
    }
    return at
  }
}
