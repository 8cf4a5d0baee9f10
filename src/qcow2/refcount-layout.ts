/**
 * How counters of 1 to 64 bits lie in a refcount block (spec "Host cluster management").
 *
 *   bits   counter i
 *   1      byte i >> 3, bit (i & 7) from the least significant end
 *   2      byte i >> 2, shift 2 * (i & 3)
 *   4      byte i >> 1, shift 4 * (i & 1): even counters are the low nibble
 *   8      byte i
 *   16     bytes 2i, 2i + 1, big-endian        32, 64: likewise
 *
 * Knows nothing of where blocks are or what a counter counts.
 */
import { viewOf } from '../bytes/view.ts'

/** Access to the counters of a block. Indices are not checked. */
export interface RefcountLayout {
  /** Width of a counter. */
  readonly bits: number
  /** Largest value a counter may take; at 64 bits the largest this library counts to, 2^53 - 1. */
  readonly max: number
  /** Counter `index`. A 64-bit counter above {@link max} comes back rounded, still above it. */
  get(block: Uint8Array, index: number): number
  /** Stores `value`, an integer from 0 to {@link max}. */
  set(block: Uint8Array, index: number, value: number): void
  /** Index of the first zero counter in `[from, to)`, or `to`. */
  findFree(block: Uint8Array, from: number, to: number): number
  /** Index of the first counter in `[from, to)` that is not zero, or `to`. */
  findUsed(block: Uint8Array, from: number, to: number): number
}

/** The layout for counters of `1 << order` bits, order 0 to 6. */
export function refcountLayout(order: number): RefcountLayout {
  const bits = 2 ** order
  if (order < 3) return subByte(bits)
  if (order === 3) return eight
  if (order === 4) return sixteen
  if (order === 5) return thirtyTwo
  if (order === 6) return sixtyFour
  throw new RangeError(`refcount_order must be 0 to 6, not ${order}`)
}

function subByte(bits: number): RefcountLayout {
  const perByte = 8 / bits
  const indexMask = perByte - 1
  const byteShift = Math.log2(perByte)
  const max = 2 ** bits - 1
  const get = (block: Uint8Array, index: number): number =>
    (block[index >> byteShift]! >> (bits * (index & indexMask))) & max
  return {
    bits,
    max,
    get,
    set(block, index, value) {
      const shift = bits * (index & indexMask)
      const at = index >> byteShift
      block[at] = (block[at]! & ~(max << shift)) | (value << shift)
    },
    findFree(block, from, to) {
      let index = from
      while (index < to && get(block, index) !== 0) index++
      return index
    },
    findUsed(block, from, to) {
      let index = from
      while (index < to && get(block, index) === 0) {
        const skips = (index & indexMask) === 0 && index + perByte <= to && block[index >> byteShift] === 0
        index += skips ? perByte : 1
      }
      return index
    },
  }
}

/** Zero has the same bytes in every order, so a search may use the machine's own. */
function search(
  words: (block: Uint8Array) => ArrayLike<number>,
  width: number,
): Pick<RefcountLayout, 'findFree' | 'findUsed'> {
  return {
    findFree(block, from, to) {
      const table = words(block)
      for (let index = from; index < to; index++) {
        let any = 0
        for (let word = index * width; word < (index + 1) * width; word++) any |= table[word]!
        if (any === 0) return index
      }
      return to
    },
    findUsed(block, from, to) {
      const table = words(block)
      for (let index = from; index < to; index++) {
        for (let word = index * width; word < (index + 1) * width; word++) if (table[word] !== 0) return index
      }
      return to
    },
  }
}

const bytes = (block: Uint8Array): ArrayLike<number> => block

const eight: RefcountLayout = {
  bits: 8,
  max: 0xff,
  get: (block, index) => block[index]!,
  set: (block, index, value) => {
    block[index] = value
  },
  ...search(bytes, 1),
}

const sixteen: RefcountLayout = {
  bits: 16,
  max: 0xffff,
  get: (block, index) => (block[2 * index]! << 8) | block[2 * index + 1]!,
  set: (block, index, value) => {
    block[2 * index] = value >> 8
    block[2 * index + 1] = value & 0xff
  },
  findFree(block, from, to) {
    for (let index = from; index < to; index++) if ((block[2 * index]! | block[2 * index + 1]!) === 0) return index
    return to
  },
  findUsed(block, from, to) {
    for (let index = from; index < to; index++) if ((block[2 * index]! | block[2 * index + 1]!) !== 0) return index
    return to
  },
}

const thirtyTwo: RefcountLayout = {
  bits: 32,
  max: 0xffff_ffff,
  get: (block, index) => viewOf(block).getUint32(4 * index),
  set: (block, index, value) => viewOf(block).setUint32(4 * index, value),
  ...search(bytes, 4),
}

const sixtyFour: RefcountLayout = {
  bits: 64,
  max: Number.MAX_SAFE_INTEGER,
  get: (block, index) => {
    const view = viewOf(block)
    return view.getUint32(8 * index) * 0x1_0000_0000 + view.getUint32(8 * index + 4)
  },
  set: (block, index, value) => {
    const view = viewOf(block)
    view.setUint32(8 * index, Math.floor(value / 0x1_0000_0000))
    view.setUint32(8 * index + 4, value % 0x1_0000_0000)
  },
  ...search(bytes, 8),
}
