/** Recognises zeroes: the first and last bytes answer for most data, then eight words at a time. */

/** True if all `length` bytes from `at` on are zero. */
export function isZero(bytes: Uint8Array, at = 0, length: number = bytes.length - at): boolean {
  if (length === 0) return true
  const end = at + length
  if ((bytes[at]! | bytes[end - 1]!) !== 0) return false
  while (at < end && ((bytes.byteOffset + at) & 3) !== 0) if (bytes[at++] !== 0) return false
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
