/**
 * What stands between an image and version 2: features that version does not have, which are refused, and zero
 * clusters, which are replaced.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { viewOf } from '../bytes/view.ts'
import { UnsupportedError } from '../core/errors.ts'
import { owner } from './check-counters.ts'
import type { CheckState } from './check.ts'
import type { Engine } from './engine.ts'
import { incompatible } from './features.ts'
import { clusterKind, copiedFlag, entryOffset, offsetHigh, offsetLow, zeroFlag } from './l2-entry.ts'
import { openMetadata } from './open.ts'
import { settle } from './shutdown.ts'
import { decodeSnapshot } from './snapshot-table.ts'

/** What a downgrade takes. */
export interface DowngradeOptions extends CallOptions {
  /** Called in a downgrade before every L1 entry whose zero clusters are replaced, and at the end: entries, done and in all. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined
}

/** @throws UnsupportedError for what version 2 does not have. */
export function refuseDowngrade(state: CheckState): void {
  const { header } = state.context
  const missing: string[] = []
  if ((header.incompatibleFeatures & incompatible.dataFile) !== 0n) missing.push('external data file')
  if ((header.incompatibleFeatures & incompatible.extendedL2) !== 0n) missing.push('extended L2 entries')
  if (header.compressionType !== 'zlib' && hasCompressedClusters(state)) missing.push('compressed clusters of type zstd')
  if (header.cryptMethod === 'luks') missing.push('LUKS encryption')
  for (const snapshot of snapshotsOf(state)) {
    if (snapshot.diskSize !== undefined && snapshot.diskSize !== header.size) missing.push(`the disk size of snapshot ${snapshot.id}`)
    if (snapshot.vmStateSize >= 2 ** 32) missing.push(`the VM state size of snapshot ${snapshot.id}`)
  }
  if (missing.length > 0) throw new UnsupportedError(`amend: version 2 does not have: ${missing.join(', ')}`, missing)
}

/** In the active layer or any snapshot. */
function hasCompressedClusters({ context: { expected } }: CheckState): boolean {
  const end = expected.highest + 1
  for (let at = expected.nextUsed(0, end); at < end; at = expected.nextUsed(at + 1, end)) {
    if ((expected.owners(at) & owner.compressed) !== 0) return true
  }
  return false
}

function snapshotsOf(state: CheckState): { id: string; diskSize: number | undefined; vmStateSize: number }[] {
  const found = []
  for (let next = 0; next < state.snapshots.table.length; ) {
    const decoded = decodeSnapshot(state.snapshots.table, next, state.context.header.snapshotsOffset)
    found.push(decoded.record)
    next = decoded.next
  }
  return found
}

/**
 * Goes through every L2 table of the active layer and the snapshots. A zero cluster with a host cluster that nothing
 * else refers to gets written zeroes there. Any other becomes unallocated, or, where a backing file would show
 * through, a new cluster of zeroes. All of that reads the same, so a crash in between leaves a sound version 3,
 * perhaps with leaks.
 * @returns whether clusters were left that are still counted.
 * @throws UnsupportedError for an encrypted image with a backing file: zeroes of it cannot be written without its key.
 */
export async function removeZeroClusters(host: BlockDevice, state: CheckState, { onProgress, signal }: DowngradeOptions): Promise<boolean> {
  const { context } = state
  const { clusterSize } = context.geometry
  const encrypted = context.header.cryptMethod !== 'none'
  const hasBacking = context.cluster0.backingFile !== undefined
  const zeroes = new Uint8Array(clusterSize)
  let engine: Engine | undefined
  let leaks = false
  for await (const cluster of l2Clusters(state, onProgress)) {
    signal?.throwIfAborted()
    const view = viewOf(await context.read(cluster * clusterSize, clusterSize))
    const homeless: number[] = []
    let changed = false
    for (let at = 0; at < clusterSize; at += 8) {
      const [high, low] = [view.getUint32(at), view.getUint32(at + 4)]
      const kind = clusterKind(high, low, { extendedL2: false, dataFile: false })
      if (kind !== 'zero-plain' && kind !== 'zero-allocated') continue
      changed = true
      if (kind === 'zero-allocated' && !encrypted && context.expected.get(entryOffset(high, low) / clusterSize) === 1) {
        await host.write(entryOffset(high, low), zeroes)
        view.setUint32(at + 4, low - zeroFlag)
        continue
      }
      if (kind === 'zero-allocated') leaks = true
      view.setUint32(at, 0)
      view.setUint32(at + 4, 0)
      if (hasBacking) homeless.push(at)
    }
    if (!changed) continue
    if (homeless.length > 0) {
      if (encrypted) throw new UnsupportedError('amend: zero clusters hide the backing file of an encrypted image; flatten it first', ['zero clusters'])
      engine ??= await openMetadata(host)
      await placeZeroes(engine, view, homeless, context.expected.get(cluster))
    }
    await host.flush()
    await host.write(cluster * clusterSize, new Uint8Array(view.buffer, view.byteOffset, clusterSize))
  }
  await host.flush()
  return leaks
}

/** The L2 tables of the active layer and the snapshots, each once, by their host clusters. */
async function* l2Clusters({ context, snapshots }: CheckState, onProgress: DowngradeOptions['onProgress']): AsyncGenerator<number, void, undefined> {
  const { header, geometry } = context
  const tables = [{ offset: header.l1TableOffset, size: header.l1Size }, ...snapshots.l1Tables]
  const total = tables.reduce((sum, { size }) => sum + size, 0)
  const visited = new Set<number>()
  let done = 0
  for (const { offset, size } of tables) {
    const entries = viewOf(await context.read(offset, size * 8))
    for (let at = 0; at < size * 8; at += 8) {
      onProgress?.({ done: done++, total })
      const cluster = entryOffset(entries.getUint32(at), entries.getUint32(at + 4)) / geometry.clusterSize
      if (cluster === 0 || visited.has(cluster)) continue
      visited.add(cluster)
      yield cluster
    }
  }
  onProgress?.({ done, total })
}

/** Gives entries of an L2 table, by their places in it, clusters of zeroes, durably counted as often as the table is referred to. */
async function placeZeroes(engine: Engine, table: DataView, entries: readonly number[], references: number): Promise<void> {
  const { clusterSize } = engine.geometry
  for (let next = 0; next < entries.length; ) {
    const { offset, clusters } = await engine.allocator.allocate(entries.length - next)
    await engine.host.ensureSize(offset + clusters * clusterSize)
    await engine.host.writeZeroes(offset, clusters * clusterSize)
    if (references > 1) await engine.allocator.adjust(offset / clusterSize, clusters, references - 1)
    for (let i = 0; i < clusters; i++, next++) {
      const place = offset + i * clusterSize
      table.setUint32(entries[next]!, offsetHigh(place) + (references === 1 ? copiedFlag : 0))
      table.setUint32(entries[next]! + 4, offsetLow(place))
    }
  }
  await settle(engine)
}
