/** Every length, count and offset that an NBD server states, at its extremes, and valid conversations with bytes changed: a typed error in bounded time and memory. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { converse, valid } from './support/conversation.ts'

test('the conversation itself is right', async () => {
  expect(await converse(valid)).toBe('right')
})

test('any field of one, two, four or eight bytes at its extremes', async () => {
  const before = process.memoryUsage().arrayBuffers
  const extremes: readonly (readonly number[])[] = [[0xff], [0], [0x80], [0xff, 0xff], [0x7f, 0xff, 0xff, 0xff], [0xff, 0xff, 0xff, 0xff], [0, 0, 0, 0], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], [0, 0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]]
  const interesting = valid.length - 3072 - (20 + 4 + 16)
  for (let at = 0; at < valid.length; at++) {
    if (at > interesting && at < interesting + 3072) continue
    for (const extreme of extremes) {
      const bytes = valid.slice()
      bytes.set(extreme.slice(0, valid.length - at), at)
      await converse(bytes)
    }
  }
  expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(150 << 20)
}, 120_000)

test('bytes changed, left out and repeated anywhere', async () => {
  const change = fc.record({ at: fc.nat(valid.length - 1), kind: fc.constantFrom('set', 'cut', 'repeat'), bytes: fc.uint8Array({ minLength: 1, maxLength: 12 }) })
  await fc.assert(fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 4 }), async (changes) => {
    let bytes: Uint8Array = valid.slice()
    for (const { at, kind, bytes: other } of changes) {
      if (kind === 'set') bytes.set(other.subarray(0, Math.max(0, bytes.length - at)), Math.min(at, bytes.length))
      else if (kind === 'cut') bytes = new Uint8Array(Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + other.length)]))
      else bytes = new Uint8Array(Buffer.concat([bytes.subarray(0, at), bytes.subarray(Math.max(0, at - other.length * 4), at), bytes.subarray(at)]))
    }
    const start = performance.now()
    await converse(bytes)
    expect(performance.now() - start).toBeLessThan(2000)
  }), { numRuns: process.env['QCOW2_LONG'] === '1' ? 100_000 : 1500 })
}, 120_000)
