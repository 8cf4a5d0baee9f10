/**
 * Pages that a stream did not have: they read as zeroes whatever a backing file holds there, and the map
 * says that there is nothing.
 */
import { extent, type BlockDevice, type CallOptions, type Extent, type MapOptions } from '../block/device.ts'
import { FilterDevice } from '../block/filter.ts'
import type { AbsentRange } from './ram-image-layout.ts'

/** The device with the ranges, in ascending order, read as zeroes and mapped as unallocated. */
export function absentAsZero(device: BlockDevice, absent: readonly AbsentRange[]): BlockDevice {
  return new AbsentFilter(device, absent)
}

class AbsentFilter extends FilterDevice {
  readonly #absent: readonly AbsentRange[]

  constructor(inner: BlockDevice, absent: readonly AbsentRange[]) {
    super(inner)
    this.#absent = absent
  }

  protected override async onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    await this.inner.readInto(offset, target, options)
    for (const [start, end] of this.#within(offset, offset + target.length)) target.fill(0, start - offset, end - offset)
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    const end = offset + length
    let at = offset
    for (const [start, stop] of [...this.#within(offset, end), [end, end] as const]) {
      if (start > at) yield* this.inner.map({ ...options, offset: at, length: start - at })
      if (stop > start) yield extent({ start, length: stop - start, depth: 0, present: false, zero: true, data: false, compressed: false })
      at = stop
    }
  }

  /** The parts of the ranges within `[from, to)`, as start and end. */
  #within(from: number, to: number): (readonly [number, number])[] {
    const found: (readonly [number, number])[] = []
    for (const [offset, length] of this.#absent) {
      if (offset < to && offset + length > from) found.push([Math.max(from, offset), Math.min(to, offset + length)])
    }
    return found
  }
}

/**
 * The runs of pages of a block that did not come.
 * @param seen One bit for each page of the disk: it came.
 * @param position Where the block begins in the disk.
 */
export function absentRanges(seen: Uint8Array, position: number, length: number, pageSize: number): AbsentRange[] {
  const ranges: [number, number][] = []
  for (let offset = 0; offset < length; offset += pageSize) {
    const page = (position + offset) / pageSize
    if ((seen[page >>> 3]! & (1 << (page & 7))) !== 0) continue
    const last = ranges.at(-1)
    if (last !== undefined && last[0] + last[1] === offset) last[1] += pageSize
    else ranges.push([offset, pageSize])
  }
  return ranges
}
