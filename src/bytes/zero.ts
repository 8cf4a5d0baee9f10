/** Recognises zeroes: the first and last bytes answer for most data, then whole pages are compared at memory speed. */
import { compare, worthCalling } from './compare.ts'

const zeroes = new Uint8Array(4096)

/** True if all `length` bytes from `at` on are zero. */
export function isZero(bytes: Uint8Array, at = 0, length: number = bytes.length - at): boolean {
  if (length === 0) return true
  const end = at + length
  if ((bytes[at]! | bytes[end - 1]!) !== 0) return false
  if (compare === undefined || length < worthCalling) return isZeroByWords(bytes, at, end)
  for (; at < end; at += zeroes.length) {
    const stop = Math.min(end, at + zeroes.length)
    if (bytes[at] !== 0 || compare.call(bytes, zeroes, 0, stop - at, at, stop) !== 0) return false
  }
  return true
}

/** How many bytes from `at` on are zero; none at `end` or behind it is looked at. */
export function zeroLength(bytes: Uint8Array, at: number, end: number): number {
  let next = at
  for (let step = zeroes.length; step >= worthCalling; step >>= 3) while (next + step <= end && isZero(bytes, next, step)) next += step
  while (next < end && bytes[next] === 0) next++
  return next - at
}

/** `isZero` with a loop over eight words at a time. */
export function isZeroByWords(bytes: Uint8Array, at: number, end: number): boolean {
  while (at < end && ((bytes.byteOffset + at) & 3) !== 0) if (bytes[at++] !== 0) return false
  if (at === end) return true
  const count = (end - at) >>> 2
  const words = new Int32Array(bytes.buffer, bytes.byteOffset + at, count)
  let word = 0
  for (const stop = count - 7; word < stop; word += 8) {
    const any =
      words[word]! | words[word + 1]! | words[word + 2]! | words[word + 3]! | words[word + 4]! | words[word + 5]! | words[word + 6]! | words[word + 7]!
    if (any !== 0) return false
  }
  for (; word < count; word++) if (words[word] !== 0) return false
  for (at += count * 4; at < end; at++) if (bytes[at] !== 0) return false
  return true
}
