/**
 * Create, apply, delete and rename internal snapshots. Each runs while no guest request is in flight
 * and begins with everything settled; each function says in which order it writes and what a crash
 * leaves.
 */
import { FormatError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import type { Engine } from './engine.ts'
import { prepareResize } from './first-write.ts'
import { clustersFor, requiredL1Size } from './geometry.ts'
import { maxSnapshots } from './limits.ts'
import { PointerTable, tableBytes } from './pointer-table.ts'
import { settle } from './shutdown.ts'
import { readSnapshotL1 } from './snapshot-list.ts'
import { encodeSnapshotTable, nextSnapshotId, type SnapshotRecord } from './snapshot-table.ts'
import { adjustTree, recomputeCopied, shareTree, unshareTree } from './tree.ts'

/** What the caller says about a new snapshot. */
export interface SnapshotDetails {
  readonly name: string
  readonly dateSeconds: number
  readonly dateNanoseconds: number
  readonly vmClockNanoseconds: bigint
  readonly icount: bigint | undefined
}

/** The disk as it was at one moment, held by its counters. Nothing on disk refers to it yet. */
export interface CapturedDisk {
  /** L1 entries of the disk, without COPIED flags, padded. */
  readonly l1: Uint8Array
  readonly entries: number
  readonly size: number
}

/** VM state that is stored and counted. */
export interface StoredVmState {
  /** Offsets of its L2 tables: the L1 entries behind those of the disk. */
  readonly tables: readonly number[]
  /** Bytes. */
  readonly size: number
}

/** Refuses what no snapshot operation can be done on. */
export function assertSnapshotsPossible(engine: Engine): void {
  engine.assertSound()
  if (engine.hasDataFile) {
    throw new UnsupportedError('internal snapshots and an external data file exclude each other', ['external data file'])
  }
}

/**
 * Holds the disk as it is now: raises the counters of its tree, clears COPIED in L2, then in L1, each
 * durable before the next. A crash leaves counters that are too high, and flags that are too careful;
 * what fails or is aborted is undone.
 */
export function captureDisk(engine: Engine, signal?: AbortSignal): Promise<CapturedDisk> {
  return capture(engine, requiredL1Size(engine.geometry, engine.header.size), signal)
}

/** As {@link captureDisk}, with VM state that lies behind the disk of the active layer: for a snapshot that gets none of its own. */
export function captureAll(engine: Engine, signal?: AbortSignal): Promise<CapturedDisk> {
  const { l1Table, geometry, header } = engine
  let entries = l1Table.length
  while (entries > 0 && l1Table.offsetAt(entries - 1) === 0) entries--
  return capture(engine, Math.max(entries, requiredL1Size(geometry, header.size)), signal)
}

async function capture(engine: Engine, entries: number, signal: AbortSignal | undefined): Promise<CapturedDisk> {
  signal?.throwIfAborted()
  assertSnapshotsPossible(engine)
  if (engine.unchanged) await engine.change()
  await settle(engine)
  const { l1Table, header } = engine
  await shareTree(engine, l1Table, entries, signal)
  for (let index = 0; index < entries; index++) {
    const offset = l1Table.offsetAt(index)
    if (offset !== 0 && l1Table.high(index) >= 0x8000_0000) l1Table.set(index, offset)
  }
  await engine.flush()
  return { l1: l1Table.sharedCopy(entries), entries, size: header.size }
}

/** Gives up a captured disk that did not become a snapshot. */
export async function releaseDisk(engine: Engine, disk: CapturedDisk): Promise<void> {
  if (engine.damage !== undefined) return
  await settle(engine)
  await unshareTree(engine, new PointerTable(0, disk.entries, disk.l1), disk.entries)
}

/**
 * Makes a captured disk, and VM state with it, a snapshot: writes its L1 table, then a new snapshot
 * table, both durable with their counters before the header names the new table. A crash before that
 * leaves leaked clusters.
 */
export async function addSnapshot(
  engine: Engine,
  details: SnapshotDetails,
  disk: CapturedDisk,
  vmState: StoredVmState | undefined,
): Promise<SnapshotRecord> {
  if (engine.snapshots.length >= maxSnapshots) {
    throw new Qcow2Error('ERR_RANGE', `the image has ${engine.snapshots.length} snapshots, at most ${maxSnapshots}`)
  }
  const tables = vmState?.tables ?? []
  const l1Size = disk.entries + tables.length
  const l1 = new PointerTable(0, l1Size, tableBytes(l1Size))
  l1.bytes.set(disk.l1.subarray(0, disk.entries * 8))
  tables.forEach((offset, index) => l1.set(disk.entries + index, offset))
  const l1TableOffset = await writeTable(engine, l1.bytes.subarray(0, l1Size * 8))
  try {
    return await listSnapshot(engine, details, disk, { l1TableOffset, l1Size, vmStateSize: vmState?.size ?? 0 })
  } catch (error) {
    engine.metadataMap.remove(l1TableOffset, l1Size * 8)
    if (l1Size > 0) engine.allocator.free(l1TableOffset, l1Size * 8)
    throw error
  }
}

type Stored = Pick<SnapshotRecord, 'l1TableOffset' | 'l1Size' | 'vmStateSize'>

async function listSnapshot(engine: Engine, details: SnapshotDetails, disk: CapturedDisk, stored: Stored): Promise<SnapshotRecord> {
  const record: SnapshotRecord = {
    ...details,
    ...stored,
    id: nextSnapshotId(engine.snapshots),
    diskSize: disk.size,
    unknownExtraData: new Uint8Array(0),
    extraDataLength: 24,
  }
  await replaceSnapshots(engine, [...engine.snapshots, record])
  return record
}

/** Writes bytes to new contiguous clusters; returns their offset, 0 for no bytes. */
async function writeTable(engine: Engine, bytes: Uint8Array): Promise<number> {
  if (bytes.length === 0) return 0
  const clusters = clustersFor(engine.geometry, bytes.length)
  const { offset } = await engine.allocator.allocateContiguous(clusters)
  const padded = engine.host.allocate(clusters * engine.geometry.clusterSize).fill(0)
  padded.set(bytes)
  await engine.host.write(offset, padded)
  engine.metadataMap.add(offset, padded.length)
  return offset
}

/**
 * Replaces the snapshot table: the new one goes to new clusters, is made durable with their counters,
 * then number and offset change in one sector of the header; then the old one is freed.
 */
export async function replaceSnapshots(engine: Engine, records: readonly SnapshotRecord[]): Promise<void> {
  const old = engine.header
  engine.host.assertWritable(old.snapshotsOffset, engine.snapshotTableLength)
  const table = encodeSnapshotTable(records)
  const snapshotsOffset = await writeTable(engine, table)
  await engine.flush()
  await engine.writeHeader({ snapshotCount: records.length, snapshotsOffset })
  engine.snapshots = records
  if (old.snapshotCount > 0) {
    engine.metadataMap.remove(old.snapshotsOffset, engine.snapshotTableLength)
    engine.allocator.free(old.snapshotsOffset, engine.snapshotTableLength)
  }
  engine.snapshotTableLength = table.length
}

/**
 * Deletes a snapshot: takes it off the table, durably; then lowers the counters of its tree, then
 * recomputes COPIED. A crash on the way leaves leaked clusters.
 */
export async function deleteSnapshot(engine: Engine, record: SnapshotRecord): Promise<void> {
  assertSnapshotsPossible(engine)
  if (engine.unchanged) await engine.change()
  await settle(engine)
  const l1 = await readSnapshotL1(engine.host, record, engine.geometry.clusterSize)
  engine.host.assertWritable(l1.offset, l1.length * 8)
  await replaceSnapshots(
    engine,
    engine.snapshots.filter((each) => each !== record),
  )
  await adjustTree(engine, l1, l1.length, -1)
  await giveUpTable(engine, l1)
  await engine.flush()
  await recomputeCopied(engine)
}

/** Lowers the counters of an L1 table's own clusters. */
async function giveUpTable(engine: Engine, table: PointerTable): Promise<void> {
  if (table.length === 0) return
  const { clusterSize } = engine.geometry
  await engine.allocator.adjust(table.offset / clusterSize, Math.ceil((table.length * 8) / clusterSize), -1)
  engine.metadataMap.remove(table.offset, table.length * 8)
}

/**
 * Makes the active layer what a snapshot holds:
 *
 * 1. share the snapshot's tree (counters, then COPIED flags, durable);
 * 2. write a new active L1 table, durable with its counters;
 * 3. switch size, l1_size and l1_table_offset, which lie in one sector of the header, durable;
 * 4. lower the counters of the old tree; 5. recompute COPIED.
 *
 * A crash before 3 leaves the old disk and counters that are too high, after it the snapshot's. Aborting
 * undoes step 1; from then on it goes through.
 */
export async function applySnapshot(engine: Engine, record: SnapshotRecord, signal?: AbortSignal): Promise<void> {
  signal?.throwIfAborted()
  assertSnapshotsPossible(engine)
  const size = record.diskSize ?? engine.header.size
  if (size !== engine.header.size && engine.header.version === 2) {
    throw new UnsupportedError(`snapshot ${record.name} is of a disk of ${size} bytes; a version 2 image cannot change its size`, ['resize'])
  }
  if (engine.untouched) await engine.touch()
  if (size !== engine.header.size) await prepareResize(engine)
  await settle(engine)
  const needed = requiredL1Size(engine.geometry, size)
  if (record.l1Size < needed) {
    throw new FormatError(`l1_size of snapshot ${record.id} is ${record.l1Size}, its disk needs ${needed}`, { structure: 'snapshot table' }, 'ERR_CORRUPT')
  }
  engine.host.assertWritable(engine.l1Table.offset, engine.l1Table.length * 8)
  const source = await readSnapshotL1(engine.host, record, engine.geometry.clusterSize)
  // VM state saved with a snapshot stays in it; what lay behind the disk when it was taken comes back
  const entries = record.vmStateSize > 0 ? needed : record.l1Size
  await shareTree(engine, source, entries, signal)
  const old = engine.l1Table
  const length = Math.max(old.length, entries)
  const bytes = tableBytes(length)
  bytes.set(source.sharedCopy(entries).subarray(0, entries * 8))
  const offset = await writeTable(engine, bytes.subarray(0, length * 8))
  await engine.flush()
  await engine.writeHeader({ size, l1Size: length, l1TableOffset: offset })
  engine.l1Table = new PointerTable(offset, length, bytes)
  await adjustTree(engine, old, old.length, -1)
  await giveUpTable(engine, old)
  await engine.flush()
  await recomputeCopied(engine)
}
