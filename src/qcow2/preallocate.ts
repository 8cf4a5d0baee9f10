/** Mapping clusters of the active layer before anything is written to them. */
import { AbortPoints } from '../core/abort-points.ts'
import { clusterState } from './cluster-state.ts'
import type { Engine } from './engine.ts'
import { copiedFlag, offsetHigh, offsetLow, zeroFlag } from './l2-entry.ts'
import { withEntry, type EntryPlace } from './l2-tables.ts'
import { setBitmaps, setEntry } from './link.ts'

/**
 * Maps every unallocated cluster of `[from, to)` to its place in the external data file. Nothing is
 * written there: what was behind its end reads as zeroes.
 */
export async function preallocateMapping(engine: Engine, from: number, to: number, signal?: AbortSignal): Promise<void> {
  const { clusterSize } = engine.geometry
  const points = new AbortPoints(signal)
  for (let guest = Math.floor(from / clusterSize) * clusterSize; guest < to; guest += clusterSize) {
    const turn = points.pass()
    if (turn !== undefined) await turn
    await withEntry(engine, guest, (place) => {
      const { kind } = clusterState(engine, place.slice.view, place.at, guest)
      if (kind === 'unallocated') setEntry(engine, place, offsetHigh(guest) + copiedFlag, offsetLow(guest))
    })
  }
}

/**
 * Gives every whole cluster of `[from, to)` that reads as zeroes and has no place a host cluster of its own. It goes on
 * reading as zeroes: its place is a hole behind the end of the file, or is written with zeroes first; where bytes of the
 * file are encrypted its entry says so, which version 2 cannot.
 */
export async function preallocateClusters(engine: Engine, from: number, to: number, signal?: AbortSignal): Promise<void> {
  const { clusterSize, bytesPerL1Entry } = engine.geometry
  if (engine.cipher !== undefined && engine.header.version === 2) return
  const points = new AbortPoints(signal)
  let end = 0
  for (let guest = Math.ceil(from / clusterSize) * clusterSize; guest < to; ) {
    const tableEnd = (Math.floor(guest / bytesPerL1Entry) + 1) * bytesPerL1Entry
    const run = await engine.allocator.allocate(Math.ceil((Math.min(to, tableEnd) - guest) / clusterSize))
    if (!run.pristine) await engine.data.writeZeroes(run.offset, run.clusters * clusterSize)
    for (let host = run.offset; host < run.offset + run.clusters * clusterSize; host += clusterSize, guest += clusterSize) {
      const turn = points.pass()
      if (turn !== undefined) await turn
      const isPlaced = await withEntry(engine, guest, (place) => placeZeroes(engine, place, guest, host))
      if (!isPlaced) engine.allocator.free(host, clusterSize)
    }
    end = Math.max(end, run.offset + run.clusters * clusterSize)
  }
  await engine.data.ensureSize(end)
}

/** Gives the cluster its place, unless it has one. */
function placeZeroes(engine: Engine, place: EntryPlace, guest: number, host: number): boolean {
  const { kind } = clusterState(engine, place.slice.view, place.at, guest)
  if (kind !== 'unallocated' && kind !== 'zero-plain') return false
  const { extendedL2 } = engine.geometry
  const saysZero = engine.cipher !== undefined
  setEntry(engine, place, offsetHigh(host) + copiedFlag, offsetLow(host) + (saysZero && !extendedL2 ? zeroFlag : 0))
  if (extendedL2) setBitmaps(place, saysZero ? allOnes : 0, saysZero ? 0 : allOnes)
  return true
}

const allOnes = 0xffff_ffff
