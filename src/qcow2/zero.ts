/**
 * Making ranges of the active layer read as zeroes, and discarding them: whole clusters (or
 * subclusters) by their L2 entries, the rest by writing zeroes.
 *
 * An entry changes in memory; the host cluster it gave up is freed when the change is durable, see
 * `write-back.ts`. A crash before that leaves the old content.
 */
import { AbortPoints } from '../core/abort-points.ts'
import type { Engine } from './engine.ts'
import { clusterState, touchedSubclusters, type ClusterState } from './cluster-state.ts'
import { withEntry, type EntryPlace } from './l2-tables.ts'
import { setBitmaps, setEntry, setUnallocated, setZero } from './link.ts'
import { lookupLoading, newRun, type Run } from './mapping.ts'
import { lockClusters, readsZero, writeLocked } from './write.ts'

/** What happens to whole clusters. */
export type ZeroMode =
  /** They read as zeroes and keep the space they have. */
  | 'keep'
  /** They read as zeroes and give their space back. */
  | 'unmap'
  /** As `unmap`; partial clusters are left alone. */
  | 'discard'
  /** They are marked as zeroes even where nothing is below them yet: a backing file is to come. Partial clusters are left alone. */
  | 'cover'
  /** They become unallocated: the backing file shows through. Partial clusters are left alone. */
  | 'forget'

/** Applies a mode to a guest range; aborted, to a part of it. */
export async function zeroActive(engine: Engine, guest: number, length: number, mode: ZeroMode, signal?: AbortSignal): Promise<void> {
  engine.assertSound()
  if (engine.untouched) await engine.touch()
  await lockClusters(engine, guest, length, () => zeroLocked(engine, guest, length, mode, signal))
}

/** As `zeroActive`; the caller holds the locks of the clusters, or everything else waits. */
export async function zeroLocked(engine: Engine, guest: number, length: number, mode: ZeroMode, signal?: AbortSignal): Promise<void> {
  const { clusterSize, subclusterSize } = engine.geometry
  const end = guest + length
  const partial = mode === 'keep' || mode === 'unmap'
  const unit = partial ? subclusterSize : clusterSize
  const first = Math.ceil(guest / unit) * unit
  // what lies behind the end of the disk belongs to its last cluster
  const last = end >= engine.header.size ? Math.ceil(end / clusterSize) * clusterSize : Math.floor(end / unit) * unit
  const head = Math.min(first, end)
  if (partial && guest < head) await writeZeroBytes(engine, guest, head)
  if (first >= end) return
  if (first < last) await zeroWhole(engine, first, last, mode, signal)
  if (partial && last < end) await writeZeroBytes(engine, last, end)
}

async function writeZeroBytes(engine: Engine, from: number, to: number): Promise<void> {
  if (await readsZero(engine, from, to)) return
  await writeLocked(engine, from, engine.host.allocate(to - from).fill(0))
}

/** `[from, to)` begins and ends at subclusters, with `discard` and `forget` at clusters. */
async function zeroWhole(engine: Engine, from: number, to: number, mode: ZeroMode, signal: AbortSignal | undefined): Promise<void> {
  const { clusterSize } = engine.geometry
  const hidden = Math.ceil((engine.backing?.size ?? 0) / clusterSize) * clusterSize
  const run = newRun()
  const points = new AbortPoints(signal)
  for (let at = from; at < to; ) {
    await points.pass()
    // a run behind the end of the backing file has another answer than one before it
    await lookupLoading(engine, engine.active, at, (at < hidden ? Math.min(to, hidden) : to) - at, run)
    const end = at + run.length
    if (isDone(engine, run, at, mode)) {
      at = end
      continue
    }
    while (at < end) {
      const turn = points.pass()
      if (turn !== undefined) await turn
      // a run of subclusters begins anywhere in its cluster, which is given up as a whole if it may be
      const clusterStart = Math.floor(at / clusterSize) * clusterSize
      const clusterEnd = Math.min(to, clusterStart + clusterSize)
      const stored = storesZeroes(engine, at, mode)
      const next = stored ? Math.max(clusterEnd, Math.min(end, at + storedBytes)) : clusterEnd
      if (stored && mode !== 'discard') await writeLocked(engine, at, engine.host.allocate(next - at).fill(0))
      else if (!stored) await zeroCluster(engine, Math.max(from, clusterStart), next, mode)
      at = next
    }
  }
}

/** Bytes of zeroes written at once where the format has no entry for them. */
const storedBytes = 1 << 20

/** Version 2 cannot say "zeroes" over a backing file: they are data there. */
function storesZeroes(engine: Engine, guest: number, mode: ZeroMode): boolean {
  if (engine.header.version !== 2 || mode === 'forget' || engine.rawDataFile) return false
  return mode === 'cover' || (engine.backing !== undefined && guest < engine.backing.size)
}

/** `[from, to)` lies in one cluster. */
async function zeroCluster(engine: Engine, from: number, to: number, mode: ZeroMode): Promise<void> {
  if (mode !== 'forget' && (await zeroInData(engine, from, to))) return
  await withEntry(engine, from, (place) => zeroEntry(engine, place, from, to, mode))
}

/** True if nothing about the run has to change. */
function isDone(engine: Engine, run: Run, at: number, mode: ZeroMode): boolean {
  if (run.kind === 'data' || run.kind === 'compressed') return false
  if (run.host >= 0 && mode !== 'keep') return false
  if (mode === 'forget') return run.kind === 'unallocated'
  if (engine.rawDataFile) return run.kind === 'zero'
  if (run.kind === 'zero') return true
  if (mode === 'cover') return false
  return engine.backing === undefined || at >= engine.backing.size
}

/**
 * Zeroes by writing data where entries cannot say it: in part of a compressed cluster, and, besides the entry, in a data
 * file that has to read alone.
 * @returns true if nothing is left to do.
 */
async function zeroInData(engine: Engine, from: number, to: number): Promise<boolean> {
  const { clusterSize } = engine.geometry
  if (engine.rawDataFile) {
    await engine.data.writeZeroes(from, Math.min(to, engine.header.size) - from)
    return false
  }
  if (to - from === clusterSize) return false
  const run = newRun()
  await lookupLoading(engine, engine.active, from, 1, run)
  if (run.kind !== 'compressed') return false
  await writeLocked(engine, from, engine.host.allocate(to - from).fill(0))
  return true
}

/** Changes the entry of the cluster that holds `[from, to)`. */
function zeroEntry(engine: Engine, place: EntryPlace, from: number, to: number, mode: ZeroMode): void {
  const { clusterSize } = engine.geometry
  const state = clusterState(engine, place.slice.view, place.at, from)
  if (to - from < clusterSize) zeroSubclusters(engine, place, state, from, to)
  else if (mode === 'forget' || engine.header.version === 2) setUnallocated(engine, place, state)
  else setZero(engine, place, state, mode === 'keep' || engine.rawDataFile)
}

/** The host cluster stays, shared or not: only the bitmaps of this entry change. */
function zeroSubclusters(engine: Engine, place: EntryPlace, state: ClusterState, from: number, to: number): void {
  const { clusterSize } = engine.geometry
  const start = Math.floor(from / clusterSize) * clusterSize
  const mask = touchedSubclusters(engine, from - start, to - start)
  const { view } = place.slice
  setEntry(engine, place, view.getUint32(place.at), view.getUint32(place.at + 4))
  setBitmaps(place, (state.zero | mask) >>> 0, (state.alloc & ~mask) >>> 0)
}
