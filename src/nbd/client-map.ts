/** Block status as extents: the runs of two contexts joined. Owns their meaning; knows no connection. */
import { viewOf } from '../bytes/view.ts'
import { extent, type Extent } from '../block/device.ts'
import { FormatError } from '../core/errors.ts'
import { allocationStates, maxStatusRuns } from './protocol.ts'

/** The runs of one context as they came, `length:32 flags:32` each: a million of them cost no object. */
export class StatusRuns {
  readonly #view: DataView
  /** Runs. */
  readonly count: number
  /** Bytes that the runs describe, at most what was asked and a part of the last run. */
  readonly covered: number

  /**
   * Those runs that start within `asked` bytes.
   * @throws FormatError for a run of no bytes, or too many runs
   */
  constructor(bytes: Uint8Array, asked: number) {
    if (bytes.length > maxStatusRuns * 8) throw new FormatError(`${bytes.length / 8} runs, at most ${maxStatusRuns}`, { structure: 'NBD block status' })
    this.#view = viewOf(bytes)
    const sent = Math.floor(bytes.length / 8)
    let count = 0
    let covered = 0
    for (; count < sent && covered < asked; count++) {
      if (this.length(count) === 0) throw new FormatError('a run of 0 bytes', { structure: 'NBD block status' })
      covered += this.length(count)
    }
    this.count = count
    this.covered = covered
  }

  /** Bytes of a run. */
  length(index: number): number {
    return this.#view.getUint32(index * 8)
  }

  flags(index: number): number {
    return this.#view.getUint32(index * 8 + 4)
  }
}

/** A run with both contexts' states. */
export interface Status {
  length: number
  flags: number
  depth: number | undefined
}

/** Two contexts' runs cut at each other's borders, no further than `limit` bytes and than both reach. */
export function* combine(runs: StatusRuns, depths: StatusRuns | undefined, limit: number): Generator<Status, void, undefined> {
  const end = Math.min(limit, runs.covered, depths?.covered ?? Infinity)
  let at = 0
  let next = 0
  let depthLeft = depths === undefined || depths.count === 0 ? Infinity : depths.length(0)
  for (let index = 0; index < runs.count && at < end; index++) {
    for (let left = Math.min(runs.length(index), end - at); left > 0; ) {
      const length = Math.min(left, depthLeft)
      yield { length, flags: runs.flags(index), depth: depths?.flags(next) }
      left -= length
      at += length
      depthLeft -= length
      if (depthLeft === 0 && ++next < (depths?.count ?? 0)) depthLeft = depths!.length(next)
    }
  }
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
