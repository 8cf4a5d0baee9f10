/** Comparing and joining bytes. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { concat } from '../../src/bytes/concat.ts'
import { equalByWords, equalBytes } from '../../src/bytes/equal.ts'

test.each([equalBytes, equalByWords])('%o sees every difference, wherever the bytes lie in memory', (equal) => {
  const piece = fc.uint8Array({ minLength: 1, maxLength: 200, size: 'max' })
  const run = fc.tuple(piece, fc.nat(7), fc.nat(7), fc.nat(199), fc.nat(199), fc.integer({ min: 1, max: 255 }))
  fc.assert(
    fc.property(run, ([bytes, before, behind, first, length, change]) => {
      const at = first % bytes.length
      const end = at + Math.min(length, bytes.length - at)
      const a = new Uint8Array([...new Uint8Array(before), ...bytes]).subarray(before)
      const b = new Uint8Array([...new Uint8Array(behind), ...bytes]).subarray(behind)
      expect(equal(a, b, at, end - at)).toBe(true)
      for (let i = 0; i < bytes.length; i++) {
        b[i] = b[i]! ^ change
        expect(equal(a, b, at, end - at)).toBe(i < at || i >= end)
        b[i] = b[i]! ^ change
      }
    }),
  )
})

test('concat keeps the order', () => {
  expect(concat([new Uint8Array([1, 2]), new Uint8Array(0), new Uint8Array([3])])).toEqual(new Uint8Array([1, 2, 3]))
  expect(concat([])).toEqual(new Uint8Array(0))
})
