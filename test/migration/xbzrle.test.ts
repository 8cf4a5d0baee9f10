import fc from 'fast-check'
import { expect, test } from 'vitest'
import { applyXbzrle } from '../../src/migration/xbzrle.ts'

/** The delta that makes `next` of `previous`, plainly. */
function encodeXbzrle(previous: Uint8Array, next: Uint8Array): Uint8Array {
  const out: number[] = []
  const run = (length: number): number => (length > 0x7f ? out.push((length & 0x7f) | 0x80, length >> 7) : out.push(length))
  for (let at = 0; ; ) {
    const start = at
    while (at < next.length && next[at] === previous[at]) at++
    if (at === next.length) return Uint8Array.from(out)
    const changed = at
    while (at < next.length && next[at] !== previous[at]) at++
    run(changed - start)
    run(at - changed)
    out.push(...next.subarray(changed, at))
  }
}

const page = fc.uint8Array({ minLength: 4096, maxLength: 4096 })

test('the delta of a real stream', () => {
  const hex = (text: string): Uint8Array => Uint8Array.from(Buffer.from(text, 'hex'))
  const old = new Uint8Array(4096)
  old.set(hex('34125a5ab0000000b0a923c6'))
  old.set(hex('b0a923c6'), 0xffc)
  const next = Uint8Array.from(old)
  next.set(hex('34125a5a9801000018f26928'))
  next.set(hex('18f26928'), 0xffc)
  const delta = hex('04029801020418f26928f01f0418f26928')
  const target = Uint8Array.from(old)
  applyXbzrle(delta, target)
  expect(target).toEqual(next)
  expect(encodeXbzrle(old, next)).toEqual(delta)
})

test('a delta makes the new page of the old', () => {
  const edits = fc.array(fc.tuple(fc.nat(4095), fc.uint8Array({ minLength: 1, maxLength: 300 })), { maxLength: 20 })
  fc.assert(
    fc.property(page, edits, (old, changes) => {
      const next = Uint8Array.from(old)
      for (const [at, bytes] of changes) next.set(bytes.subarray(0, 4096 - at), at)
      const delta = encodeXbzrle(old, next)
      const target = Uint8Array.from(old)
      applyXbzrle(delta, target)
      expect(Buffer.from(target).equals(next)).toBe(true)
    }),
  )
})

test('any bytes are applied within the page or refused', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 200 }), (delta) => {
      try {
        applyXbzrle(delta, new Uint8Array(1024))
      } catch (error) {
        expect(error).toMatchObject({ code: 'ERR_STREAM', structure: 'XBZRLE delta' })
      }
    }),
    { numRuns: 1000 },
  )
})

test.each<[string, number[], RegExp]>([
  ['a run past the page', [0xff, 0x07, 2, 1, 1], /a run ends at byte 1025/],
  ['a run past the delta', [0, 5, 1], /a run of 5 bytes reaches past the delta \(offset 100\)/],
  ['an empty changed run', [1, 0], /an empty changed run/],
  ['an empty unchanged run', [0, 1, 7, 0, 1, 7], /an empty unchanged run \(offset 103\)/],
  ['a length of three bytes', [0x80, 0x80, 1], /more than 14 bits/],
])('%s is refused', (_what, delta, message) => {
  expect(() => applyXbzrle(Uint8Array.from(delta), new Uint8Array(1024), 100)).toThrow(message)
})
