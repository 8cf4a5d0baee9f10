/** Whether the part of a stream that no VM description takes apart ends as a stream does. */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { sectionByte } from './format.ts'

/** Padding that is looked through for the end. */
const searched = 1 << 20

/**
 * Why device state from `from` to `end` of a device is not whole: a stream ends with the footer of its last section, of five
 * bytes, and the EOF byte, a zero; more zeroes may follow. Undefined if it does.
 * @param footers false for machine types up to 2.3, which write none: then only the zero is asked for
 */
export async function cutOf(device: BlockDevice, { from, end, footers }: { readonly from: number; readonly end: number; readonly footers: boolean }, options?: CallOptions): Promise<string | undefined> {
  const start = Math.max(from, end - searched)
  const bytes = await device.read(start, end - start, options)
  if (bytes.at(-1) !== sectionByte.eof) return `it ends within a device section or its VM description, without the EOF byte (offset ${end - 1})`
  if (!footers) return undefined
  let last = bytes.length - 1
  while (last > 0 && bytes[last] === 0) last--
  for (let footer = Math.max(0, last - 4); footer <= last; footer++) {
    if (bytes[footer] === sectionByte.footer && bytes[footer + 5] === sectionByte.eof) return undefined
  }
  return `it ends within a device section or its VM description (offset ${start + last})`
}
