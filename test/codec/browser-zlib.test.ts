/** The browser's inflate against Node's. */
import zlib from 'node:zlib'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { constants, inflateRawSync, inflateSync } from '../../src/codec/browser-zlib.ts'

const content = fc.oneof(
  fc.uint8Array({ maxLength: 5000 }),
  fc.tuple(fc.uint8Array({ minLength: 1, maxLength: 40 }), fc.nat(300)).map(([unit, times]) => new Uint8Array(Buffer.concat(Array.from({ length: times }, () => unit)))),
)

test('what Node deflates comes out again, at every level, strategy and window', () => {
  fc.assert(
    fc.property(content, fc.integer({ min: 0, max: 9 }), fc.constantFrom(0, 1, 2, 3, 4), fc.integer({ min: 9, max: 15 }), (bytes, level, strategy, windowBits) => {
      const options = { level, strategy, windowBits }
      expect(Buffer.compare(inflateRawSync(zlib.deflateRawSync(bytes, options)), bytes)).toBe(0)
      expect(Buffer.compare(inflateSync(zlib.deflateSync(bytes, options)), bytes)).toBe(0)
    }),
  )
})

test('bytes behind the stream are ignored, a dictionary is used, a flushed stream may end', () => {
  const bytes = Buffer.from('abcabcabc'.repeat(100))
  expect(Buffer.compare(inflateRawSync(Buffer.concat([zlib.deflateRawSync(bytes), Buffer.alloc(50, 0xff)])), bytes)).toBe(0)
  const dictionary = bytes.subarray(0, 300)
  expect(Buffer.compare(inflateRawSync(zlib.deflateRawSync(bytes, { dictionary }), { dictionary }), bytes)).toBe(0)
  const flushed = zlib.deflateRawSync(bytes, { finishFlush: zlib.constants.Z_SYNC_FLUSH })
  expect(Buffer.compare(inflateRawSync(flushed, { finishFlush: constants.Z_SYNC_FLUSH }), bytes)).toBe(0)
  expect(() => inflateRawSync(flushed)).toThrow('unexpected end')
})

test('the output is limited', () => {
  const bomb = zlib.deflateRawSync(Buffer.alloc(1 << 20))
  expect(() => inflateRawSync(bomb, { maxOutputLength: 1000 })).toThrow('larger than 1000')
})

test('damaged streams give an error or some bytes, as Node does, and end', () => {
  fc.assert(
    fc.property(content, fc.nat(), fc.integer({ min: 1, max: 255 }), (bytes, where, change) => {
      const damaged = zlib.deflateRawSync(bytes)
      damaged[where % damaged.length]! ^= change
      let expected: Uint8Array | undefined
      try {
        expected = zlib.inflateRawSync(damaged, { maxOutputLength: 100_000 })
      } catch {
        expected = undefined
      }
      let actual: Uint8Array | undefined
      try {
        actual = inflateRawSync(damaged, { maxOutputLength: 100_000 })
      } catch {
        actual = undefined
      }
      if (expected !== undefined) expect(Buffer.compare(actual!, expected)).toBe(0)
    }),
  )
})
