/**
 * Bytes of known length that the parser hands on without looking at them, in pieces as large as the
 * input allows. Nothing is copied or gathered.
 */
import type { ParserInput } from './input.ts'
import type { BytesOf, BytesRecord } from './records.ts'

/** A length still to be passed through. */
export interface Passage {
  readonly of: BytesOf
  length: number
}

/** The next piece of the first unfinished passage; undefined when all are done, which empties the list. */
export function passThrough(input: ParserInput, passages: Passage[]): BytesRecord | undefined {
  while (passages.length > 0) {
    const passage = passages[0]!
    if (passage.length === 0) {
      passages.shift()
      continue
    }
    input.require(1)
    const length = Math.min(passage.length, input.end - input.at)
    passage.length -= length
    return bytesRecord(input, passage.of, length)
  }
  return undefined
}

/** The next `length` bytes of the window as a record. */
export function bytesRecord(input: ParserInput, of: BytesOf, length: number): BytesRecord {
  const offset = input.offset
  return { kind: 'bytes', of, offset, length, bytes: input.take(length) }
}
