import fc from 'fast-check'
import { expect, test } from 'vitest'
import { zeroRun } from '../../src/bytes/zero-run.ts'

test('runs cover everything, change at each border, and are as long as grains of one kind go', () => {
  const chunk = fc.array(fc.constantFrom(0, 0, 0, 0, 1), { minLength: 1, maxLength: 200 })
  fc.assert(
    fc.property(chunk, fc.integer({ min: 0, max: 20 }), fc.integer({ min: 0, max: 50 }), (list, grain, offset) => {
      const bytes = Uint8Array.from(list)
      const kinds = Array.from(bytes, (_, at) => grain > 0 && bytes.every((byte, other) => byte === 0 || Math.floor((offset + other) / grain) !== Math.floor((offset + at) / grain)))
      let before: boolean | undefined
      for (let from = 0; from < bytes.length; ) {
        const { end, zero } = zeroRun(bytes, from, grain, offset)
        expect(end).toBeGreaterThan(from)
        expect(zero).not.toBe(before)
        expect(kinds.slice(from, end)).toEqual(new Array<boolean>(end - from).fill(zero))
        before = zero
        from = end
      }
    }),
  )
})
