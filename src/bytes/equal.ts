/** Compares bytes: four at a time where both lie alike in memory, which pages and clusters do. */

/** True if `length` bytes of `a` and of `b`, from `at` on in both, are the same. */
export function equalBytes(a: Uint8Array, b: Uint8Array, at: number, length: number): boolean {
  const end = at + length
  if (((a.byteOffset + at) & 3) === 0 && ((b.byteOffset + at) & 3) === 0) {
    const count = length >>> 2
    const left = new Int32Array(a.buffer, a.byteOffset + at, count)
    const right = new Int32Array(b.buffer, b.byteOffset + at, count)
    for (let word = 0; word < count; word++) if (left[word] !== right[word]) return false
    at += count * 4
  }
  for (; at < end; at++) if (a[at] !== b[at]) return false
  return true
}
