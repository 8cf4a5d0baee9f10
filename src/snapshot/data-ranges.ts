/** The parts of a RAM block that a revert has to send. */
import type { BlockDevice } from '../block/device.ts'

/** A run of bytes that may hold something else than zeroes. */
export interface DataRange {
  readonly offset: number
  readonly length: number
}

/**
 * The runs of `content` that are not known to be zero, in order, disjoint, grown to multiples of `align`
 * (cut at the end of the content) and cut into pieces of at most `most` bytes, a multiple of `align`.
 */
export async function* dataRanges(
  content: BlockDevice,
  align: number,
  most: number,
  signal?: AbortSignal,
): AsyncGenerator<DataRange, void, undefined> {
  let next = 0
  for await (const { start, length, zero, data, present, compressed } of content.map({ signal })) {
    if (zero || !(data || compressed || present)) continue
    const end = Math.min(Math.ceil((start + length) / align) * align, content.size)
    next = Math.max(next, start - (start % align))
    for (; next < end; next += most) yield { offset: next, length: Math.min(most, end - next) }
    next = Math.min(next, end)
  }
}
