/** Bytes damaged at random, and the errors that may come of it. */
import fc from 'fast-check'
import { Qcow2Error } from '../../src/core/errors.ts'

/** A way to damage bytes. */
const edit = fc.oneof(
  fc.record({ kind: fc.constant('flip' as const), at: fc.double({ min: 0, max: 1, noNaN: true }), bit: fc.nat(7) }),
  fc.record({ kind: fc.constant('cut' as const), at: fc.double({ min: 0, max: 1, noNaN: true }) }),
  fc.record({ kind: fc.constant('remove' as const), at: fc.double({ min: 0, max: 1, noNaN: true }), length: fc.nat(5000) }),
  fc.record({ kind: fc.constant('copy' as const), at: fc.double({ min: 0, max: 1, noNaN: true }), from: fc.double({ min: 0, max: 1, noNaN: true }), length: fc.nat(5000) }),
  fc.record({ kind: fc.constant('fill' as const), at: fc.double({ min: 0, max: 1, noNaN: true }), length: fc.constantFrom(1, 2, 4, 8), value: fc.constantFrom(0, 0x7f, 0x80, 0xff) }),
)
type Edit = typeof edit extends fc.Arbitrary<infer T> ? T : never

/** One to four ways at once. */
export const edits: fc.Arbitrary<Edit[]> = fc.array(edit, { minLength: 1, maxLength: 4 })

/** A damaged copy. */
export function damaged(original: Uint8Array, list: readonly Edit[]): Uint8Array {
  let bytes = Buffer.from(original)
  for (const edit of list) {
    // structure is dense at the start: prefer it to the pages
    const at = Math.floor(edit.at ** 3 * bytes.length)
    switch (edit.kind) {
      case 'flip':
        if (at < bytes.length) bytes[at] = bytes[at]! ^ (1 << edit.bit)
        break
      case 'cut':
        bytes = bytes.subarray(0, at)
        break
      case 'remove':
        bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + edit.length)])
        break
      case 'copy': {
        const from = Math.floor(edit.from * bytes.length)
        bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(from, from + edit.length), bytes.subarray(at)])
        break
      }
      case 'fill':
        bytes.subarray(at, at + edit.length).fill(edit.value)
    }
  }
  return bytes
}

/** An error that says what is wrong with the bytes. */
export function isTyped(error: unknown): boolean {
  return Qcow2Error.is(error) && ['ERR_STREAM', 'ERR_UNSUPPORTED', 'ERR_FORMAT', 'ERR_CORRUPT', 'ERR_NOT_FOUND'].includes(error.code)
}
