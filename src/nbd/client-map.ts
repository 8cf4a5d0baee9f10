/** Block status as extents: the runs of two contexts joined. Owns their meaning; knows no connection. */
import { extent, type Extent } from '../block/device.ts'
import { allocationStates, type StatusRun } from './protocol.ts'

/** A run with both contexts' states. */
export interface Status {
  length: number
  flags: number
  depth: number | undefined
}

/** Two contexts' runs cut at each other's borders, no further than `limit` bytes. */
export function combine(runs: readonly StatusRun[], depths: readonly StatusRun[] | undefined, limit: number): Status[] {
  const combined: Status[] = []
  let at = 0
  let next = 0
  let depthLeft = depths?.[0]?.length ?? 0
  for (const run of runs) {
    for (let left = Math.min(run.length, limit - at); left > 0; ) {
      const depth = depths?.[next]
      if (depths !== undefined && depth === undefined) return combined
      const length = depth === undefined ? left : Math.min(left, depthLeft)
      if (length === 0) return combined
      combined.push({ length, flags: run.flags, depth: depth?.flags })
      left -= length
      at += length
      depthLeft -= length
      if (depthLeft === 0) depthLeft = depths?.[++next]?.length ?? 0
    }
  }
  return combined
}

/** A run at `start` as an extent. */
export function toExtent(start: number, { length, flags, depth }: Status): Extent {
  const data = (flags & allocationStates.hole) === 0
  const zero = (flags & allocationStates.zero) !== 0
  if (depth === undefined) {
    const present = data || zero
    return extent({ start, length, depth: 0, present, zero, data, compressed: false, ...(present ? { offset: start } : {}) })
  }
  return extent({ start, length, depth: Math.max(depth - 1, 0), present: depth > 0, zero, data, compressed: false })
}

/** True if two neighbours differ in nothing but place. */
export function sameKind(a: Extent, b: Extent): boolean {
  return a.depth === b.depth && a.present === b.present && a.zero === b.zero && a.data === b.data
}

