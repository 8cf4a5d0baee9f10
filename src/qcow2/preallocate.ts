/** Mapping clusters of the active layer before anything is written to them. */
import { AbortPoints } from '../core/abort-points.ts'
import { clusterState } from './cluster-state.ts'
import type { Engine } from './engine.ts'
import { copiedFlag, offsetHigh, offsetLow } from './l2-entry.ts'
import { withEntry } from './l2-tables.ts'
import { setEntry } from './link.ts'

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
