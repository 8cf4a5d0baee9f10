/** The parts of a RAM block that a revert has to send. */
import type { BlockDevice } from '../block/device.ts'

/** A run of bytes that may hold something else than zeroes. */
export interface DataRange {
  readonly offset: number
  readonly length: number
}

/**
 * The runs of `content` that are not known to be zero, in order and disjoint: grown to multiples of `align` (cut at
 * the end of the content), neighbours merged, in pieces of at most `most` bytes, a multiple of `align`.
 */
export async function* dataRanges(
  content: BlockDevice,
  align: number,
  most: number,
  signal?: AbortSignal,
): AsyncGenerator<DataRange, void, undefined> {
  let start = 0
  let end = 0
  for await (const extent of content.map({ signal })) {
    if (extent.zero || !(extent.data || extent.compressed)) continue
    const first = extent.start - (extent.start % align)
    if (first > end) {
      if (end > start) yield { offset: start, length: end - start }
      start = first
    }
    end = Math.min(Math.ceil((extent.start + extent.length) / align) * align, content.size)
    for (; end - start >= most; start += most) yield { offset: start, length: most }
  }
  if (end > start) yield { offset: start, length: end - start }
}
