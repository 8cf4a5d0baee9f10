/**
 * Changing the size of the disk. New bytes read as zeroes, whatever a longer backing file, stale
 * clusters behind the old end, or VM state in the active L1 table hold. Runs while no request is in
 * flight. The size in the header changes last when growing and when shrinking: a crash leaves the old
 * size; while shrinking, with a tail that may be gone already. So does aborting.
 */
import type { CallOptions } from '../block/device.ts'
import { UnsupportedError } from '../core/errors.ts'
import type { Engine } from './engine.ts'
import { prepareResize } from './first-write.ts'
import { maxDiskSize, requiredL1Size } from './geometry.ts'
import { growL1 } from './l2-tables.ts'
import { PointerTable, tableBytes } from './pointer-table.ts'
import { lookupLoading, newRun } from './mapping.ts'
import { preallocateClusters, preallocateMapping } from './preallocate.ts'
import { settle } from './shutdown.ts'
import { adjustTree } from './tree.ts'
import { writeLocked } from './write.ts'
import { zeroLocked } from './zero.ts'

/** How the size of a disk changes. */
export interface ResizeOptions extends CallOptions {
  /**
   * `metadata`: every cluster that a growing disk gets has its place, and is a hole in the file, as in an image created
   * so. Default `off`.
   */
  readonly preallocation?: 'off' | 'metadata' | undefined
}

/**
 * Makes the disk `size` bytes, a multiple of 512.
 * @throws RangeError for a size that is not, or is past what the cluster size allows; UnsupportedError
 * for a version 2 image with snapshots.
 */
export async function resizeDisk(engine: Engine, size: number, options: ResizeOptions = {}): Promise<void> {
  const { signal } = options
  signal?.throwIfAborted()
  engine.assertSound()
  if (size % 512 !== 0) throw new RangeError(`size must be a multiple of 512, not ${size}`)
  if (size > maxDiskSize(engine.geometry)) {
    throw new RangeError(`size is ${size}; with clusters of ${engine.geometry.clusterSize} bytes at most ${maxDiskSize(engine.geometry)}`)
  }
  if (engine.header.version === 2 && engine.snapshots.length > 0) {
    throw new UnsupportedError('a version 2 image with snapshots cannot change its size', ['resize'])
  }
  if (size === engine.header.size) return
  if (engine.untouched) await engine.touch()
  await prepareResize(engine)
  await settle(engine)
  if (size > engine.header.size) await grow(engine, size, options)
  else await shrink(engine, size, signal)
}

async function grow(engine: Engine, size: number, { signal, preallocation }: ResizeOptions): Promise<void> {
  const { geometry } = engine
  const old = engine.header.size
  await cutL1(engine, requiredL1Size(geometry, old))
  await clearBehind(engine, old)
  const entries = requiredL1Size(geometry, size)
  if (entries > engine.l1Table.length) await engine.tableLock.run(() => growL1(engine, entries, entries))
  if (engine.hasDataFile) await engine.data.ensureSize(size)
  const below = Math.min(size, engine.backing?.size ?? 0)
  const end = Math.ceil(old / geometry.clusterSize) * geometry.clusterSize
  if (below > end) await zeroLocked(engine, end, below - end, 'keep', signal)
  const isMetadata = preallocation === 'metadata'
  if (engine.rawDataFile || (isMetadata && engine.hasDataFile)) await preallocateMapping(engine, old, size, signal)
  else if (isMetadata) await preallocateClusters(engine, old, size, signal)
  await settle(engine)
  await engine.writeHeader({ size })
}

/** Zeroes what the last cluster and the last L2 table hold behind the end of the disk. */
async function clearBehind(engine: Engine, size: number): Promise<void> {
  const { clusterSize, bytesPerL1Entry } = engine.geometry
  const end = Math.ceil(size / clusterSize) * clusterSize
  const tableEnd = Math.ceil(size / bytesPerL1Entry) * bytesPerL1Entry
  if (end < tableEnd) await zeroLocked(engine, end, tableEnd - end, 'forget')
  if (size === end) return
  const run = newRun()
  await lookupLoading(engine, engine.active, size, end - size, run)
  const shows = engine.backing !== undefined && engine.backing.size > size
  if (shows || run.kind === 'data' || run.kind === 'compressed' || run.length < end - size) {
    await writeLocked(engine, size, engine.host.allocate(end - size).fill(0))
  }
}

async function shrink(engine: Engine, size: number, signal: AbortSignal | undefined): Promise<void> {
  const { clusterSize, bytesPerL1Entry } = engine.geometry
  const entries = requiredL1Size(engine.geometry, size)
  const end = Math.ceil(size / clusterSize) * clusterSize
  const tableEnd = entries * bytesPerL1Entry
  if (end < tableEnd) await zeroLocked(engine, end, tableEnd - end, 'forget', signal)
  await cutL1(engine, entries)
  await settle(engine)
  await engine.writeHeader({ size })
  if (engine.hasDataFile) await engine.data.truncate(size)
}

/**
 * Empties the active L1 table from entry `from` on: the entries first, durably, then the counters of
 * what they reached. Behind the disk that is VM state of a snapshot that was applied.
 */
async function cutL1(engine: Engine, from: number): Promise<void> {
  const { l1Table } = engine
  const tail = new PointerTable(0, l1Table.length, tableBytes(l1Table.length))
  let found = false
  for (let index = from; index < l1Table.length; index++) {
    const offset = l1Table.offsetAt(index)
    if (offset === 0) continue
    tail.set(index, offset)
    l1Table.set(index, 0)
    found = true
  }
  if (!found) return
  await settle(engine)
  await adjustTree(engine, tail, tail.length, -1)
}
