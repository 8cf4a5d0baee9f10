/** Comparing bytes fast: `toEqual` looks at every element of a typed array as an object. */
import { expect } from 'vitest'

/** Expects equal bytes; a failure says where the first difference is. */
export function expectBytes(actual: Uint8Array, expected: Uint8Array): void {
  if (Buffer.compare(actual, expected) === 0) return
  const length = Math.min(actual.length, expected.length)
  let at = 0
  while (at < length && actual[at] === expected[at]) at++
  expect.fail(
    `bytes differ at ${at}: ${actual[at]} instead of ${expected[at]} (lengths ${actual.length} and ${expected.length})`,
  )
}
