/** Zeroes are recognised wherever they lie: against a plain look at every byte. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { isZero, isZeroByWords, zeroLength } from '../../src/bytes/zero.ts'

const implementations: [string, (bytes: Uint8Array, at: number, length: number) => boolean][] = [
  ['isZero', isZero],
  ['isZeroByWords', (bytes, at, length) => isZeroByWords(bytes, at, at + length)],
]

describe.each(implementations)('%s', (_name, zeroes) => {
  test('sees every byte of the range and none outside, at any alignment', () => {
    const range = fc.tuple(fc.nat(70), fc.oneof(fc.nat(200), fc.nat(13_000)), fc.array(fc.nat(13_300), { maxLength: 3 }))
    fc.assert(
      fc.property(range, fc.nat(15), ([at, length, marks], phase) => {
        const bytes = new Uint8Array(new ArrayBuffer(13_400), phase, 13_300)
        for (const mark of marks) bytes[mark] = 1
        expect(zeroes(bytes, at, length)).toBe(bytes.subarray(at, at + length).every((byte) => byte === 0))
      }),
    )
  })

  test.each([1, 2, 63, 64, 65, 4095, 4096, 4097, 8192, 8200])('a single set byte anywhere in %i bytes is found', (length) => {
    const bytes = new Uint8Array(length + 2)
    bytes[0] = bytes[length + 1] = 1
    expect(zeroes(bytes, 1, length)).toBe(true)
    for (let at = 1; at <= length; at++) {
      bytes[at] = 0x80
      expect(zeroes(bytes, 1, length), `byte ${at - 1}`).toBe(false)
      bytes[at] = 0
    }
  })
})

test('without a range all bytes count', () => {
  expect(isZero(new Uint8Array(0))).toBe(true)
  expect(isZero(new Uint8Array(100))).toBe(true)
  expect(isZero(new Uint8Array(100).fill(1, 50, 51))).toBe(false)
  expect(isZero(new Uint8Array(100).fill(1, 50, 51), 51)).toBe(true)
})

test('the length of zeroes ends with the first set byte or the range', () => {
  const range = fc.tuple(fc.nat(70), fc.oneof(fc.nat(200), fc.nat(13_000)), fc.array(fc.nat(13_300), { maxLength: 3 }))
  fc.assert(
    fc.property(range, ([at, length, marks]) => {
      const bytes = new Uint8Array(13_300)
      for (const mark of marks) bytes[mark] = 1
      const first = bytes.subarray(at, at + length).findIndex((byte) => byte !== 0)
      expect(zeroLength(bytes, at, at + length)).toBe(first < 0 ? length : first)
    }),
  )
})
