/**
 * L2 tables of the active layer that may be changed: making new ones, copying shared ones, growing
 * the L1 table. Knows nothing of what their entries map.
 */
import { Qcow2Error } from '../core/errors.ts'
import type { Engine } from './engine.ts'
import { copiedFlag, isCopied } from './l2-entry.ts'
import { maxL1Bytes } from './limits.ts'
import { PointerTable } from './pointer-table.ts'
import type { Slice } from './table-cache.ts'

/** Where the L2 entry of a guest cluster is, in a table that may be changed. */
export interface EntryPlace {
  readonly slice: Slice
  /** Byte position of the entry in the slice. */
  readonly at: number
}

/**
 * Sees to it that the L2 entry for a guest offset of the active layer is in memory, in a table owned
 * by that layer alone.
 */
async function prepareEntry(engine: Engine, guest: number): Promise<void> {
  const { geometry, l2Tables } = engine
  const index = Math.floor(guest / geometry.bytesPerL1Entry)
  if (!ownsTable(engine, index)) await makeWritable(engine, index)
  const entryAt = Math.floor((guest - index * geometry.bytesPerL1Entry) / geometry.clusterSize) * geometry.l2EntrySize
  await l2Tables.load(tableOffset(engine, index) + entryAt - (entryAt % l2Tables.sliceSize))
}

/** The entry if it can be had without waiting. Valid until the next `await`; see `l2Tables.modify`. */
export function peekEntry(engine: Engine, guest: number): EntryPlace | undefined {
  const { geometry, l2Tables } = engine
  const index = Math.floor(guest / geometry.bytesPerL1Entry)
  if (!ownsTable(engine, index)) return undefined
  const entryAt = Math.floor((guest - index * geometry.bytesPerL1Entry) / geometry.clusterSize) * geometry.l2EntrySize
  const at = entryAt % l2Tables.sliceSize
  const slice = l2Tables.peek(tableOffset(engine, index) + entryAt - at)
  return slice === undefined ? undefined : { slice, at }
}

/** Runs `use` on the entry for a guest offset, in the same turn in which the entry was looked up. */
export async function withEntry<T>(engine: Engine, guest: number, use: (place: EntryPlace) => T): Promise<T> {
  for (;;) {
    const place = peekEntry(engine, guest)
    if (place !== undefined) return use(place)
    await prepareEntry(engine, guest)
  }
}

function ownsTable(engine: Engine, index: number): boolean {
  return isCopied(engine.l1Table.high(index)) && engine.l1Table.offsetAt(index) !== 0
}

function tableOffset(engine: Engine, index: number): number {
  const offset = engine.l1Table.offsetAt(index)
  if (offset % engine.geometry.clusterSize !== 0) {
    const location = { structure: 'L1 table', offset: engine.l1Table.offset + index * 8 }
    throw engine.host.damaged(`entry ${index} is ${offset}, not the offset of a cluster`, location)
  }
  return offset
}

/** Gives an L1 entry an L2 table of its own: a new empty one, or a copy of the shared one. */
async function makeWritable(engine: Engine, index: number): Promise<void> {
  await engine.tableLock.run(async () => {
    if (index >= engine.l1Table.length) await growL1(engine, index + 1)
    if (ownsTable(engine, index)) return
    engine.host.assertWritable(engine.l1Table.offset + index * 8, 8)
    const { geometry, l2Tables } = engine
    const old = tableOffset(engine, index)
    const { offset } = await engine.allocator.allocateContiguous(1)
    for (let part = 0; part < geometry.clusterSize; part += l2Tables.sliceSize) {
      await l2Tables.makeRoom()
      const bytes = engine.host.allocate(l2Tables.sliceSize).fill(0)
      if (old !== 0) await l2Tables.with(old + part, (slice) => bytes.set(slice.bytes))
      l2Tables.create(offset + part, bytes)
    }
    engine.l1Table.set(index, offset, copiedFlag)
    engine.metadataMap.addL2Table(offset, geometry.clusterSize)
    if (old !== 0) {
      engine.metadataMap.remove(old, geometry.clusterSize)
      engine.allocator.free(old, geometry.clusterSize)
    }
  })
}

/**
 * Moves the active L1 table to a place for `wanted` entries, by default half as many again as before:
 *
 * 1. write the counters of the new place and everything else back;
 * 2. write the new table where nothing refers to it, flush;
 * 3. switch l1_size and l1_table_offset, which lie in one sector; 4. free the old table.
 *
 * A crash before 3 leaves the old table and leaked clusters; after 3, a leaked old table. Callers
 * hold `tableLock`.
 */
export async function growL1(engine: Engine, entries: number, wanted?: number): Promise<void> {
  const old = engine.l1Table
  const { clusterSize } = engine.geometry
  if (entries * 8 > maxL1Bytes) {
    throw new Qcow2Error('ERR_NO_SPACE', `L1 table: it would be ${entries * 8} bytes, at most ${maxL1Bytes}; larger clusters would address more`)
  }
  engine.host.assertWritable(old.offset, old.length * 8)
  const length = Math.min(wanted ?? Math.max(entries, Math.ceil(old.length * 1.5)), maxL1Bytes / 8)
  const { offset, clusters } = await engine.allocator.allocateContiguous(Math.ceil((length * 8) / clusterSize))
  await engine.flush()
  const bytes = new Uint8Array(clusters * clusterSize)
  bytes.set(old.bytes.subarray(0, old.length * 8))
  await engine.host.write(offset, bytes)
  await engine.host.flush()
  engine.metadataMap.add(offset, bytes.length)
  await engine.writeHeader({ l1Size: length, l1TableOffset: offset })
  engine.l1Table = new PointerTable(offset, length, bytes)
  if (old.length > 0) {
    engine.metadataMap.remove(old.offset, old.length * 8)
    engine.allocator.free(old.offset, old.length * 8)
  }
}
