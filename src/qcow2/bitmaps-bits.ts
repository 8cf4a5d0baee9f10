/**
 * The bits of one bitmap (spec "Bitmaps"): its table, the clusters it names, and the ranges of the disk they stand for.
 * Owns where bits are stored; which bitmaps there are, and in which order a change of them is made, is elsewhere.
 */
import { viewOf } from '../bytes/view.ts'
import { writeU64 } from '../bytes/u64.ts'
import type { CallOptions } from '../block/device.ts'
import { AbortPoints } from '../core/abort-points.ts'
import { FormatError } from '../core/errors.ts'
import { bitmapBytes, bitmapTableSize, decodeBitmapTableEntry, type BitmapRecord } from './bitmaps-directory.ts'
import type { Engine } from './engine.ts'

/** A range of the disk whose bits are set. Bytes. */
export interface DirtyRange {
  /** First byte on the guest's disk. */
  readonly offset: number
  /** Bytes. */
  readonly length: number
}

/** Clusters that belong to a bitmap, as pairs of offset and length in bytes. */
export type Space = [offset: number, length: number][]

/** The ranges whose bits are set, in ascending order, neighbours merged. */
export async function* dirtyRanges(engine: Engine, record: BitmapRecord): AsyncGenerator<DirtyRange, void, undefined> {
  const granularity = 2 ** record.granularityBits
  const { size } = engine.header
  let start = -1
  let bit = 0
  for await (const bits of bitsOf(engine, record)) {
    for (let at = 0; at < bits.length; at++) {
      const byte = bits[at]!
      // a byte like the run it continues is eight bits at once
      if (byte === (start < 0 ? 0 : 0xff)) {
        bit += 8
        continue
      }
      for (let i = 0; i < 8; i++, bit++) {
        const set = ((byte >> i) & 1) !== 0
        if (set === start >= 0) continue
        if (set) {
          start = bit
          continue
        }
        yield rangeOf(start, bit, granularity, size)
        start = -1
      }
    }
  }
  if (start >= 0 && start * granularity < size) yield rangeOf(start, bit, granularity, size)
}

function rangeOf(from: number, to: number, granularity: number, size: number): DirtyRange {
  const offset = from * granularity
  return { offset, length: Math.min(size, to * granularity) - offset }
}

/** The bits of a bitmap, cluster by cluster. */
async function* bitsOf(engine: Engine, record: BitmapRecord): AsyncGenerator<Uint8Array, void, undefined> {
  const { geometry, header, host } = engine
  const table = await tableOf(engine, record)
  const total = bitmapBytes(header.size, record.granularityBits)
  for (let index = 0; index < record.tableSize; index++) {
    const entry = decodeBitmapTableEntry(table, index, geometry.clusterSize)
    if (entry === 'invalid') {
      const location = { structure: 'bitmap table', offset: record.tableOffset + index * 8 }
      throw new FormatError(`entry ${index} of bitmap ${record.name} is invalid`, location, 'ERR_CORRUPT')
    }
    const bits = new Uint8Array(Math.min(geometry.clusterSize, total - index * geometry.clusterSize))
    if (typeof entry === 'number') await host.readInto(entry, bits)
    else if (entry === 'ones') bits.fill(0xff)
    yield bits
  }
}

async function tableOf(engine: Engine, record: BitmapRecord): Promise<DataView> {
  const { header, geometry, host } = engine
  const needed = bitmapTableSize(header.size, record.granularityBits, geometry.clusterSize)
  if (record.tableSize !== needed) {
    const detail = `bitmap ${record.name}: bitmap_table_size is ${record.tableSize}, the disk needs ${needed}`
    throw new FormatError(detail, { structure: 'bitmap directory', field: 'bitmap_table_size' }, 'ERR_CORRUPT')
  }
  const table = new Uint8Array(record.tableSize * 8)
  if (record.tableSize > 0) await host.readInto(record.tableOffset, table)
  return viewOf(table)
}

/** All clusters of a bitmap. What damage hides stays behind as a leak. */
export async function spaceOf(engine: Engine, record: BitmapRecord): Promise<Space> {
  if (record.tableSize === 0) return []
  const { geometry, host } = engine
  const space: Space = [[record.tableOffset, record.tableSize * 8]]
  const bytes = new Uint8Array(record.tableSize * 8)
  await host.readInto(record.tableOffset, bytes)
  for (let index = 0; index < record.tableSize; index++) {
    const entry = decodeBitmapTableEntry(viewOf(bytes), index, geometry.clusterSize)
    if (typeof entry === 'number') space.push([entry, geometry.clusterSize])
  }
  return space
}

/** Writes the clusters of bits that are not all zero, and a table that names them. */
export async function writeBits(engine: Engine, bits: Uint8Array, tableSize: number): Promise<number> {
  const { clusterSize } = engine.geometry
  const table = new Uint8Array(tableSize * 8)
  for (let index = 0; index < tableSize; index++) {
    const part = bits.subarray(index * clusterSize, (index + 1) * clusterSize)
    if (part.some((byte) => byte !== 0)) writeU64(viewOf(table), index * 8, await writeNew(engine, part))
  }
  return writeNew(engine, table)
}

/** Writes bytes into new neighbouring clusters; where they are, 0 for none. */
export async function writeNew(engine: Engine, bytes: Uint8Array): Promise<number> {
  if (bytes.length === 0) return 0
  const { allocator, host, geometry } = engine
  const clusters = Math.ceil(bytes.length / geometry.clusterSize)
  const { offset } = await allocator.allocateContiguous(clusters)
  const padded = host.allocate(clusters * geometry.clusterSize).fill(0)
  padded.set(bytes)
  await host.write(offset, padded)
  return offset
}

/** Sets the bits of the ranges; what lies behind the last bit is left out. */
export async function setBits(
  ranges: AsyncIterable<DirtyRange> | readonly DirtyRange[],
  bits: Uint8Array,
  granularity: number,
  { signal }: CallOptions,
): Promise<void> {
  const points = new AbortPoints(signal)
  for await (const { offset, length } of ranges) {
    const end = Math.min(Math.ceil((offset + length) / granularity), bits.length * 8)
    await points.pass()
    for (let bit = Math.floor(offset / granularity); bit < end; bit++) bits[bit >>> 3]! |= 1 << (bit & 7)
  }
}
