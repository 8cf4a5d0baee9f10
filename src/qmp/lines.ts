/**
 * Cuts a byte stream into JSON messages, however they are laid out: one a line, or over several lines as a monitor with
 * `pretty=on` writes them. Owns the framing only: braces and brackets outside strings; what begins with neither is a line
 * of text, for the caller to refuse. Each byte is looked at once and kept once, in chunks of any size.
 */
import { QmpError } from './error.ts'

/** The longest message accepted, in bytes; QEMU's schema, the largest known answer, has well under 1 MiB. */
export const maxMessage: number = 64 << 20

/** Values in one message: parsed they take far more memory than as text. */
const maxValues = 1 << 20

/** Brackets within brackets; QEMU itself takes 1024. */
const maxDepth = 1024

const [lineFeed, quote, backslash, comma] = [10, 0x22, 0x5c, 0x2c]
const [openBracket, closeBracket, openBrace, closeBrace] = [0x5b, 0x5d, 0x7b, 0x7d]

/** Collects chunks of any size and hands out whole messages. */
export class MessageSplitter {
  /** The start of a message whose end has not come; it grows by doubling. */
  #kept = new Uint8Array(0)
  #length = 0
  /** Within a line of text, or how many brackets are open. */
  #state: 'between' | 'text' | 'json' = 'between'
  #depth = 0
  #values = 0
  #inString = false
  #escaped = false

  /**
   * The messages completed by `chunk`.
   * @throws QmpError for a message longer than {@link maxMessage}, or with too many values or levels.
   */
  push(chunk: Uint8Array): string[] {
    const messages: string[] = []
    let start = 0
    for (let at = 0; at < chunk.length; at++) {
      const byte = chunk[at]!
      if (this.#state === 'between' && byte > 0x20) {
        this.#begin(byte)
        start = at
      }
      if (this.#state === 'between') start = at + 1
      else if (this.#ends(byte)) {
        messages.push(this.#take(chunk.subarray(start, at + 1)).trim())
        start = at + 1
      }
    }
    // also blanks between messages are counted: they end nothing
    this.#keep(this.#state === 'between' ? chunk.subarray(messages.length === 0 ? 0 : chunk.length) : chunk.subarray(start))
    return messages
  }

  #begin(byte: number): void {
    this.#length = 0
    this.#state = byte === openBrace || byte === openBracket ? 'json' : 'text'
    this.#depth = 0
    this.#values = 0
    this.#inString = false
  }

  /** True if this byte is the last of a message. */
  #ends(byte: number): boolean {
    if (this.#state === 'text') return byte === lineFeed
    if (this.#inString) {
      if (this.#escaped) this.#escaped = false
      else if (byte === backslash) this.#escaped = true
      else if (byte === quote) this.#inString = false
      return false
    }
    if (byte === quote) this.#inString = true
    else if (byte === openBrace || byte === openBracket) this.#count(1)
    else if (byte === comma) this.#count(0)
    else if (byte === closeBrace || byte === closeBracket) return --this.#depth === 0
    return false
  }

  #count(levels: number): void {
    this.#depth += levels
    if (this.#depth > maxDepth) throw new QmpError(`QMP: a message has more than ${maxDepth} levels; is this a QMP monitor?`)
    if (++this.#values > maxValues) throw new QmpError(`QMP: a message has more than ${maxValues} values; is this a QMP monitor?`)
  }

  #keep(bytes: Uint8Array): void {
    const length = this.#length + bytes.length
    if (length > maxMessage) {
      throw new QmpError(`QMP: a message exceeds ${maxMessage} bytes without a line end; is this a QMP monitor?`)
    }
    if (this.#state !== 'between') {
      if (length > this.#kept.length) this.#grow(length)
      this.#kept.set(bytes, this.#length)
    }
    this.#length = length
  }

  #grow(length: number): void {
    const larger = new Uint8Array(Math.min(maxMessage, Math.max(length, 2 * this.#kept.length, 4096)))
    larger.set(this.#kept.subarray(0, this.#length))
    this.#kept = larger
  }

  /** What was kept and the message's last bytes. */
  #take(last: Uint8Array): string {
    let whole = last
    if (this.#length > 0) {
      this.#keep(last)
      whole = this.#kept.subarray(0, this.#length)
    }
    this.#state = 'between'
    this.#length = 0
    const text = new TextDecoder().decode(whole)
    if (this.#kept.length > 1 << 20) this.#kept = new Uint8Array(0)
    return text
  }
}
