/**
 * Stands in for `node:zlib` where there is none: raw deflate and zlib streams inflated in plain
 * TypeScript (RFC 1951, RFC 1950). Owns decoding with a limit on the output; compresses nothing. The
 * browser build puts it in the place of `node:zlib`.
 */

/** What callers name of `node:zlib`'s constants. */
export const constants: Readonly<Record<'Z_SYNC_FLUSH' | 'Z_NO_FLUSH' | 'Z_FINISH', number>> = { Z_NO_FLUSH: 0, Z_SYNC_FLUSH: 2, Z_FINISH: 4 }

/** Options as `node:zlib` has them; only these are looked at. */
export interface InflateOptions {
  readonly maxOutputLength?: number
  /** With `Z_SYNC_FLUSH` a stream may end before its last block. */
  readonly finishFlush?: number
  readonly dictionary?: Uint8Array
}

/**
 * Inflates a raw deflate stream; bytes behind its end are ignored.
 * @throws Error for what is no deflate stream, ends early, or holds more than `maxOutputLength` bytes
 */
export function inflateRawSync(source: Uint8Array, options: InflateOptions = {}): Uint8Array {
  return new Inflater(source, 0, options).run()
}

/** Inflates a zlib stream. Its checksum is not looked at. @throws Error */
export function inflateSync(source: Uint8Array, options: InflateOptions = {}): Uint8Array {
  const [method = 0, flags = 0] = source
  if ((method & 15) !== 8 || ((method << 8) | flags) % 31 !== 0 || (flags & 32) !== 0) throw new Error('incorrect header check')
  return new Inflater(source, 2, options).run()
}

/** @throws Error always: compressing needs Node */
export function deflateRawSync(): never {
  throw new Error('compressing needs Node')
}

/** @throws Error always: streams of compressed files need Node */
export function createGunzip(): never {
  throw new Error('reading compressed streams needs Node')
}

/** Extra bits and base of the length codes 257 to 285 and the distance codes 0 to 29. */
const lengthBases = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258]
const lengthExtra = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0]
const distanceBases = [
  1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577,
]
const distanceExtra = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13]
/** The order in which the lengths of the code length codes are stored. */
const codeLengthOrder = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15]

/** A canonical Huffman code: how many codes of each length, and the symbols in order of their codes. */
interface Code {
  readonly counts: Uint16Array
  readonly symbols: Uint16Array
}

function buildCode(lengths: Uint8Array): Code {
  const counts = new Uint16Array(16)
  for (const length of lengths) counts[length]!++
  counts[0] = 0
  const next = new Uint16Array(16)
  let left = 1
  for (let length = 1; length < 16; length++) {
    left = left * 2 - counts[length]!
    if (left < 0) throw new Error('invalid code lengths set')
    next[length] = next[length - 1]! + counts[length - 1]!
  }
  const symbols = new Uint16Array(lengths.length)
  for (let symbol = 0; symbol < lengths.length; symbol++) {
    const length = lengths[symbol]!
    if (length > 0) symbols[next[length]!++] = symbol
  }
  return { counts, symbols }
}

const fixedLengths = new Uint8Array(288).fill(8).fill(9, 144, 256).fill(7, 256, 280)
const fixedCodes: readonly [Code, Code] = [buildCode(fixedLengths), buildCode(new Uint8Array(30).fill(5))]

class Ended extends Error {}

class Inflater {
  readonly #source: Uint8Array
  readonly #limit: number
  readonly #mayEnd: boolean
  readonly #dictionary: number
  #at: number
  #bits = 0
  #bitCount = 0
  #output: Uint8Array
  #length: number

  constructor(source: Uint8Array, at: number, options: InflateOptions) {
    const { maxOutputLength = 2 ** 31, finishFlush, dictionary = new Uint8Array(0) } = options
    this.#source = source
    this.#at = at
    this.#mayEnd = finishFlush === constants.Z_SYNC_FLUSH
    this.#dictionary = dictionary.length
    this.#limit = maxOutputLength + dictionary.length
    this.#output = new Uint8Array(Math.min(this.#limit, Math.max(1024, source.length * 4) + dictionary.length))
    this.#output.set(dictionary)
    this.#length = dictionary.length
  }

  run(): Uint8Array {
    try {
      while (!this.#block()) {
        // one block after the other, until the last
      }
    } catch (error) {
      if (!(error instanceof Ended) || !this.#mayEnd) throw error
    }
    return this.#output.subarray(this.#dictionary, this.#length)
  }

  /** Decodes one block; true if it was the last. */
  #block(): boolean {
    const last = this.#take(1) === 1
    const type = this.#take(2)
    if (type === 0) this.#stored()
    else if (type === 1) this.#codes(...fixedCodes)
    else if (type === 2) this.#codes(...this.#dynamicCodes())
    else throw new Error('invalid block type')
    return last
  }

  #stored(): void {
    this.#bits = 0
    this.#bitCount = 0
    const source = this.#source
    if (this.#at + 4 > source.length) throw new Ended('unexpected end of file')
    const length = source[this.#at]! | (source[this.#at + 1]! << 8)
    if ((length ^ 0xffff) !== (source[this.#at + 2]! | (source[this.#at + 3]! << 8))) throw new Error('invalid stored block lengths')
    this.#at += 4
    const bytes = source.subarray(this.#at, this.#at + length)
    this.#reserve(bytes.length)
    this.#output.set(bytes, this.#length)
    this.#length += bytes.length
    this.#at += bytes.length
    if (bytes.length < length) throw new Ended('unexpected end of file')
  }

  #dynamicCodes(): [Code, Code] {
    const literals = this.#take(5) + 257
    const distances = this.#take(5) + 1
    const stored = this.#take(4) + 4
    if (literals > 286 || distances > 30) throw new Error('too many length or distance symbols')
    const lengths = new Uint8Array(19)
    for (let i = 0; i < stored; i++) lengths[codeLengthOrder[i]!] = this.#take(3)
    const code = buildCode(lengths)
    const all = new Uint8Array(literals + distances)
    for (let i = 0; i < all.length; ) {
      const symbol = this.#symbol(code)
      if (symbol < 16) {
        all[i++] = symbol
        continue
      }
      if (symbol === 16 && i === 0) throw new Error('invalid bit length repeat')
      const value = symbol === 16 ? all[i - 1]! : 0
      const count = symbol === 16 ? 3 + this.#take(2) : symbol === 17 ? 3 + this.#take(3) : 11 + this.#take(7)
      if (i + count > all.length) throw new Error('invalid bit length repeat')
      all.fill(value, i, i + count)
      i += count
    }
    return [buildCode(all.subarray(0, literals)), buildCode(all.subarray(literals))]
  }

  #codes(literals: Code, distances: Code): void {
    for (;;) {
      const symbol = this.#symbol(literals)
      if (symbol === 256) return
      if (symbol < 256) {
        this.#reserve(1)
        this.#output[this.#length++] = symbol
        continue
      }
      const base = lengthBases[symbol - 257]
      if (base === undefined) throw new Error('invalid literal/length code')
      const length = base + this.#take(lengthExtra[symbol - 257]!)
      const code = this.#symbol(distances)
      const far = distanceBases[code]
      if (far === undefined) throw new Error('invalid distance code')
      const distance = far + this.#take(distanceExtra[code]!)
      if (distance > this.#length) throw new Error('invalid distance too far back')
      this.#reserve(length)
      for (let end = this.#length + length; this.#length < end; this.#length++) this.#output[this.#length] = this.#output[this.#length - distance]!
    }
  }

  #symbol({ counts, symbols }: Code): number {
    let code = 0
    let first = 0
    let index = 0
    for (let length = 1; length < 16; length++) {
      code |= this.#take(1)
      const count = counts[length]!
      if (code - count < first) return symbols[index + code - first]!
      index += count
      first = (first + count) << 1
      code <<= 1
    }
    throw new Error('invalid code')
  }

  #take(count: number): number {
    while (this.#bitCount < count) {
      const byte = this.#source[this.#at]
      if (byte === undefined) throw new Ended('unexpected end of file')
      this.#at++
      this.#bits |= byte << this.#bitCount
      this.#bitCount += 8
    }
    const value = this.#bits & ((1 << count) - 1)
    this.#bits >>>= count
    this.#bitCount -= count
    return value
  }

  #reserve(more: number): void {
    const needed = this.#length + more
    if (needed > this.#limit) throw new Error(`Cannot create a Buffer larger than ${this.#limit - this.#dictionary} bytes`)
    if (needed <= this.#output.length) return
    const grown = new Uint8Array(Math.min(this.#limit, Math.max(needed, this.#output.length * 2)))
    grown.set(this.#output.subarray(0, this.#length))
    this.#output = grown
  }
}
