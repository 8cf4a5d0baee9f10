/** Bytes that can be made again from a number: what a counterexample needs to be short. */

/** `length` bytes that look random and depend on `seed` alone. Seed 0 gives zeroes. */
export function seededBytes(length: number, seed: number): Uint8Array {
  const bytes = new Uint8Array(length)
  if (seed === 0) return bytes
  let state = Math.imul(seed, 0x9e37_79b1) >>> 0
  for (let at = 0; at < length; at++) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    bytes[at] = state >>> 24
  }
  return bytes
}
