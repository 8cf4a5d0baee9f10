/** Recognises pages of zeroes. */

/** True if all `length` bytes from `at` are zero. Most pages with content answer after a few bytes. */
export function isZero(bytes: Uint8Array, at: number, length: number): boolean {
  const end = at + length
  if (length > 0 && bytes[end - 1] !== 0) return false
  while (at < end && ((bytes.byteOffset + at) & 3) !== 0) if (bytes[at++] !== 0) return false
  const words = new Int32Array(bytes.buffer, bytes.byteOffset + at, (end - at) >>> 2)
  for (let i = 0; i < words.length; i++) if (words[i] !== 0) return false
  for (at += words.length * 4; at < end; at++) if (bytes[at] !== 0) return false
  return true
}
