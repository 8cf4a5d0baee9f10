/**
 * Changing L2 entries of the active layer in memory, and giving up what they referred to before.
 * Callers hold the locks of the clusters and have written the data already.
 */
import { allSubclusters, clusterState, touchedSubclusters, type ClusterState } from './cluster-state.ts'
import type { Engine } from './engine.ts'
import { copiedFlag, offsetHigh, offsetLow, zeroFlag } from './l2-entry.ts'
import { peekEntry, withEntry, type EntryPlace } from './l2-tables.ts'

/** Host clusters that now hold the guest bytes `[from, to)`. */
export interface Link {
  readonly from: number
  readonly to: number
  /** Host offset of the cluster that holds `from`; the others follow it. */
  readonly host: number
}

/** Points the entries of all clusters of the range at their new data. */
export async function linkClusters(engine: Engine, link: Link): Promise<void> {
  const { clusterSize } = engine.geometry
  for (let guest = Math.floor(link.from / clusterSize) * clusterSize; guest < link.to; guest += clusterSize) {
    const place = peekEntry(engine, guest)
    if (place !== undefined) linkCluster(engine, link, guest, place)
    else await withEntry(engine, guest, (loaded) => linkCluster(engine, link, guest, loaded))
  }
}

function linkCluster(engine: Engine, link: Link, guest: number, place: EntryPlace): void {
  const { clusterSize, extendedL2 } = engine.geometry
  const old = clusterState(engine, place.slice.view, place.at, guest)
  const written = touchedSubclusters(engine, Math.max(0, link.from - guest), Math.min(clusterSize, link.to - guest))
  const before = old.kind === 'compressed' ? allSubclusters(engine) : old.alloc
  const host = link.host + guest - Math.floor(link.from / clusterSize) * clusterSize
  setEntry(engine, place, offsetHigh(host) + copiedFlag, offsetLow(host))
  if (extendedL2) setBitmaps(place, (old.zero & ~written) >>> 0, (before | written) >>> 0)
  if (old.host !== host) release(engine, old)
}

/** Sets both halves of an entry's first word. */
export function setEntry(engine: Engine, place: EntryPlace, high: number, low: number): void {
  const { view } = engine.l2Tables.modify(place.slice)
  view.setUint32(place.at, high)
  view.setUint32(place.at + 4, low)
}

/** Sets the subcluster bitmaps of an extended entry that `setEntry` just changed. */
export function setBitmaps(place: EntryPlace, zero: number, alloc: number): void {
  place.slice.view.setUint32(place.at + 8, zero)
  place.slice.view.setUint32(place.at + 12, alloc)
}

/** Gives up the host space an entry referred to. */
export function release(engine: Engine, old: ClusterState): void {
  if (old.host >= 0 && old.hostLength > 0) engine.allocator.free(old.host, old.hostLength)
}

/** Makes an entry read as zeroes: with its host cluster kept if `keep` and it is ours alone. */
export function setZero(engine: Engine, place: EntryPlace, old: ClusterState, keep: boolean): void {
  const kept = keep && old.copied && old.kind !== 'compressed' && (old.hostLength > 0 || old.kind === 'normal')
  const high = kept ? offsetHigh(old.host) + copiedFlag : 0
  const low = kept ? offsetLow(old.host) : 0
  const { extendedL2 } = engine.geometry
  setEntry(engine, place, high, extendedL2 ? low : low + zeroFlag)
  if (extendedL2) setBitmaps(place, 0xffff_ffff, 0)
  if (!kept) release(engine, old)
}

/** Makes an entry unallocated: the backing file decides again. */
export function setUnallocated(engine: Engine, place: EntryPlace, old: ClusterState): void {
  setEntry(engine, place, 0, 0)
  if (engine.geometry.extendedL2) setBitmaps(place, 0, 0)
  release(engine, old)
}
