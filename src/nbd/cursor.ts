/** Reading fields from untrusted bytes, in order; every surprise is a typed error. */
import { readU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'
import { FormatError } from '../core/errors.ts'
import { maxNameLength } from './numbers.ts'

/** Reads fields one after the other from untrusted bytes, with a typed error at their end. */
export class Cursor {
  readonly #bytes: Uint8Array
  readonly #view: DataView
  readonly #structure: string
  #at = 0

  constructor(bytes: Uint8Array, structure: string) {
    this.#bytes = bytes
    this.#view = viewOf(bytes)
    this.#structure = structure
  }

  /** Bytes not read yet. */
  get left(): number {
    return this.#bytes.length - this.#at
  }

  u16(): number {
    return this.#view.getUint16(this.#take(2))
  }

  u32(): number {
    return this.#view.getUint32(this.#take(4))
  }

  u64(): number {
    return readU64(this.#view, this.#take(8), { structure: this.#structure })
  }

  bytes(length: number): Uint8Array {
    const at = this.#take(length)
    return this.#bytes.subarray(at, at + length)
  }

  /** `length:32 text`. */
  string(): string {
    const length = this.u32()
    if (length > maxNameLength) throw wrong(this.#structure, `a name of ${length} bytes, at most ${maxNameLength}`)
    return decodeText(this.bytes(length), this.#structure)
  }

  /** `count` if that many items of at least `size` bytes can still follow. */
  fits(count: number, size: number): number {
    if (count * size > this.left) throw wrong(this.#structure, `${count} items do not fit in the ${this.left} bytes left`)
    return count
  }

  /** Throws unless everything was read. */
  end(): void {
    if (this.left > 0) throw wrong(this.#structure, `${this.left} bytes too many`)
  }

  #take(length: number): number {
    if (length > this.left) throw wrong(this.#structure, `ends ${length - this.left} bytes early`)
    const at = this.#at
    this.#at += length
    return at
  }
}

/** UTF-8 of at most 4096 bytes. */
export function decodeText(bytes: Uint8Array, structure: string): string {
  if (bytes.length > maxNameLength) throw wrong(structure, `a name of ${bytes.length} bytes, at most ${maxNameLength}`)
  try {
    return text.decode(bytes)
  } catch (cause) {
    throw new FormatError('a name is not UTF-8', { structure }, 'ERR_FORMAT', { cause })
  }
}

/** The error of a structure that breaks the protocol. */
export function wrong(structure: string, detail: string): FormatError {
  return new FormatError(detail, { structure })
}

const text = new TextDecoder('utf-8', { fatal: true })
