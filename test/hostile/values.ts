/** Values that a length, a count or an offset may claim, and random damage around them. */

/** A number in a binary format. */
export interface Field {
  readonly name: string
  readonly at: number
  readonly bytes: 1 | 2 | 4 | 8
  /** Little-endian; everything else is big-endian. */
  readonly little?: boolean
}

/** The extremes of a field of `width` bytes, and what borders on the size of the file. */
export function extremes(width: number, fileSize: number): bigint[] {
  const max = (1n << BigInt(8 * width)) - 1n
  const sign = 1n << BigInt(8 * width - 1)
  const file = BigInt(fileSize)
  const values = [0n, 1n, 2n, max, max - 1n, sign, sign - 1n, sign + 1n, file - 1n, file, file + 1n, 512n, 1n << 20n, 1n << 31n, 1n << 40n, (1n << 53n) - 1n, 1n << 53n, (1n << 56n) - 512n]
  return [...new Set(values.filter((value) => value >= 0n && value <= max))]
}

/** A copy with one field changed. */
export function withField(bytes: Uint8Array, { at, bytes: width, little = false }: Field, value: bigint): Uint8Array {
  const copy = bytes.slice()
  for (let i = 0; i < width; i++) {
    const shift = BigInt(8 * (little ? i : width - 1 - i))
    if (at + i < copy.length) copy[at + i] = Number((value >> shift) & 0xffn)
  }
  return copy
}

/** Numbers from a seed: 0 or more, less than `limit`. */
export type Random = (limit: number) => number

export function randomFrom(seed: number): Random {
  let state = seed >>> 0
  return (limit) => {
    state = (state + 0x6d2b_79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return Math.floor((((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32) * limit)
  }
}

/** One to four changes: mostly fields, else bits, runs, pieces left out, repeated or cut off. */
export function mutated(original: Uint8Array, fields: readonly Field[], random: Random): Uint8Array {
  let bytes: Uint8Array = original.slice()
  for (let left = 1 + random(4); left > 0; left--) {
    const at = random(2) === 0 ? random(bytes.length + 1) : random(Math.min(bytes.length, 1024) + 1)
    const kind = random(fields.length > 0 ? 12 : 6)
    if (kind >= 6) {
      const field = fields[random(fields.length)]!
      const values = extremes(field.bytes, original.length)
      const value = random(4) === 0 ? BigInt(random(2 ** 32)) << BigInt(random(32)) : values[random(values.length)]!
      bytes = withField(bytes, field, value & ((1n << BigInt(8 * field.bytes)) - 1n))
    } else if (kind <= 1 && at < bytes.length) bytes[at] = bytes[at]! ^ (1 << random(8))
    else if (kind === 2) bytes.subarray(at, at + [1, 2, 4, 8][random(4)]!).fill([0, 0x7f, 0x80, 0xff][random(4)]!)
    else if (kind === 3) bytes = joined(bytes.subarray(0, at), bytes.subarray(at + random(64)))
    else if (kind === 4) bytes = joined(bytes.subarray(0, at), bytes.subarray(random(bytes.length), random(bytes.length)).subarray(0, 4096), bytes.subarray(at))
    else if (random(4) === 0) bytes = bytes.slice(0, at)
  }
  return bytes
}

function joined(...parts: Uint8Array[]): Uint8Array {
  return new Uint8Array(Buffer.concat(parts))
}

/** What stands in JSON where another value is expected. */
const literals = ['0', '-1', '1', '1.5', '1e308', '9007199254740993', '4294967296', 'null', 'true', '""', '"x"', '[]', '{}', '[null]', '"\\u001b[2J"', '"__proto__"', '{"__proto__":null}']

/** Each value of a JSON text replaced by each of `literals`, in turn. */
export function* claimedJson(text: string): Generator<string, void, undefined> {
  for (const { index, 0: token } of text.matchAll(tokens)) {
    for (const literal of literals) yield text.slice(0, index) + literal + text.slice(index + token.length)
  }
}

export function mutatedJson(text: string, random: Random): string {
  const all = [...text.matchAll(tokens)]
  const { index, 0: token } = all[random(all.length)]!
  const changed = text.slice(0, index) + literals[random(literals.length)]! + text.slice(index + token.length)
  return random(3) === 0 ? Buffer.from(mutated(Buffer.from(changed), [], random)).toString('utf8') : changed
}

/** Numbers, words and strings, keys too; every list and object comes by its parts. */
const tokens = /"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null/g
