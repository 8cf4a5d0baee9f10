/**
 * The mapping side of a check: every L1 table, L2 table and data cluster, of the active layer and of
 * all snapshots. An L2 table that many L1 tables share is read once and counted as often as it is named.
 */
import { owner } from './check-counters.ts'
import type { CheckContext } from './check-context.ts'
import type { StoredRefcounts } from './check-refcounts.ts'
import { offsetText, type CheckFinding, type CheckProblem } from './check-report.ts'
import { ClusterCounters } from './check-counters.ts'
import { viewOf } from '../bytes/view.ts'
import { zeroLength } from '../bytes/zero.ts'
import {
  clusterKind,
  compressedFlag,
  decodeCompressed,
  entryOffset,
  isCopied,
  reservedHigh,
  reservedLow,
  zeroFlag,
} from './l2-entry.ts'
import { validSubclusters } from './subcluster.ts'

/** Entries of one kind that a repair can set right, counted, and listed as far as {@link mostListed}. */
export class EntryList {
  /** Byte offsets in the image file. */
  readonly offsets: number[] = []
  count = 0

  add(offset: number): void {
    this.count++
    if (this.offsets.length < mostListed) this.offsets.push(offset)
  }
}

/** More are repaired in another pass. */
const mostListed = 1 << 20

/** What in L1 and L2 tables a repair can set right. */
export interface MappingRepairs {
  /** Entries whose COPIED flag contradicts the stored refcount. */
  readonly copied: EntryList
  /** Entries of a zero cluster with an impossible offset. */
  readonly zero: EntryList
}

/** An L1 table to walk. */
export interface L1Location {
  readonly offset: number
  /** Entries. */
  readonly size: number
  readonly active: boolean
  /** The entries of a table that is in memory only: its own clusters are not counted. */
  readonly entries?: Uint8Array
}

/** Entries of an L1 table between two looks at the clock. */
const pointsEvery = 1024

/** L2 tables at offsets that are not aligned are looked at too, but no more than so many. */
const mostUnaligned = 1024

/**
 * Walks all L1 tables and then each L2 table once. COPIED flags are checked against `stored`. Tables of snapshots that
 * are one and the same are read once; together they are no longer than the file, or some overlap and are left out.
 */
export async function checkMapping(context: CheckContext, tables: readonly L1Location[], stored: StoredRefcounts): Promise<MappingRepairs> {
  const walk = new MappingWalk(context, stored)
  const same = new Map<string, { readonly table: L1Location; times: number }>()
  for (const table of tables) {
    if (table.active || table.entries !== undefined) {
      await walk.l1(table, 1)
      continue
    }
    const key = `${table.offset}+${table.size}`
    const known = same.get(key)
    if (known === undefined) same.set(key, { table, times: 1 })
    else known.times++
  }
  let bytes = 0
  for (const { table, times } of same.values()) {
    // one alone may be cut off by the end of the file
    if (bytes > context.host.size) {
      const message = `the L1 tables of snapshots take more than ${bytes} bytes of a file of ${context.host.size}: some overlap, and not all are looked at`
      context.report.corruption({ structure: 'L1 table', offset: table.offset, message })
      context.report.checkErrors++
      break
    }
    bytes += table.size * 8
    await walk.l1(table, times)
  }
  await walk.l2()
  return walk.repairs
}

class MappingWalk {
  readonly repairs: MappingRepairs = { copied: new EntryList(), zero: new EntryList() }
  readonly #context: CheckContext
  readonly #stored: StoredRefcounts
  /** References to each aligned L2 table, by host cluster: from all L1 tables, and from the active one. */
  readonly #all: ClusterCounters
  readonly #active: ClusterCounters
  /** Where L1 entries name tables that are not aligned; these are damaged, but read nonetheless. */
  readonly #unaligned: { readonly offset: number; readonly active: boolean }[] = []

  constructor(context: CheckContext, stored: StoredRefcounts) {
    this.#context = context
    this.#stored = stored
    this.#all = new ClusterCounters(context.budget)
    this.#active = new ClusterCounters(context.budget)
  }

  /** Counts an L1 table, which is named `times` times, and the L2 tables it names. */
  async l1(table: L1Location, times: number): Promise<void> {
    if (table.size === 0) return
    if (table.entries === undefined) this.#context.reference(table.offset, table.size * 8, owner.l1Table, times)
    const bytes = table.entries ?? (await this.#context.read(table.offset, table.size * 8))
    const view = viewOf(bytes)
    for (let index = 0; index < table.size; index++) {
      const high = view.getUint32(index * 8)
      const low = view.getUint32(index * 8 + 4)
      if (high === 0 && low === 0) index += Math.floor(zeroLength(bytes, index * 8, table.size * 8) / 8) - 1
      else this.#l1Entry(table, index, high, low, times)
      if (index % pointsEvery !== 0) continue
      const turn = this.#context.points.pass()
      if (turn !== undefined) await turn
    }
  }

  #l1Entry(table: L1Location, index: number, high: number, low: number, times: number): void {
    const { geometry, report, host } = this.#context
    const at = table.offset + index * 8
    const place = { structure: 'L1 entry', offset: at, index } as const
    if ((high & (reservedHigh | compressedFlag)) !== 0 || (low & (reservedLow | zeroFlag)) !== 0) {
      report.corruption(() => {
        const entry = hex(high, low)
        return { ...place, message: `L1 entry ${index} has reserved bits set: ${entry}`, entry, problem: 'reserved bits' }
      }, times)
    }
    const offset = entryOffset(high, low)
    this.#context.reference(offset, geometry.clusterSize, owner.l2Table, times)
    if (offset % geometry.clusterSize !== 0) {
      report.corruption(() => {
        const message = `L1 entry ${index}: the L2 table offset ${offsetText(offset)} is not a multiple of ${geometry.clusterSize}`
        return { ...place, message, entry: hex(high, low), problem: 'unaligned', value: offset }
      }, times)
      if (this.#unaligned.length < mostUnaligned) this.#unaligned.push({ offset, active: table.active })
      else report.checkErrors++
    } else if (offset < host.size) {
      this.#all.add(offset / geometry.clusterSize, times)
      if (table.active) this.#active.add(offset / geometry.clusterSize, 1)
    }
    if (table.active && offset > 0) this.#copied(place, high, low, Math.floor(offset / geometry.clusterSize), 1)
  }

  /** Reads every L2 table named so far and counts what it maps. */
  async l2(): Promise<void> {
    const { clusterSize } = this.#context.geometry
    await this.#context.readClusters(this.#l2Clusters(), (bytes, cluster) => {
      this.#table(bytes, cluster * clusterSize, this.#all.get(cluster), this.#active.get(cluster))
    })
    const table = new Uint8Array(clusterSize)
    for (const { offset, active } of this.#unaligned) {
      await this.#context.readInto(offset, table)
      this.#table(table, offset, 1, active ? 1 : 0)
    }
  }

  /** Host clusters of the aligned L2 tables named so far, ascending. */
  *#l2Clusters(): Generator<number, void, undefined> {
    const end = this.#all.highest + 1
    for (let cluster = this.#all.nextUsed(0, end); cluster < end; cluster = this.#all.nextUsed(cluster + 1, end)) yield cluster
  }

  /** The L2 table at host offset `start`, which is reached `times` times, `active` of these from the active layer. */
  #table(table: Uint8Array, start: number, times: number, active: number): void {
    const { geometry, report, header, hasDataFile } = this.#context
    const { clusterSize, l2EntrySize, extendedL2 } = geometry
    const kindContext = { extendedL2, dataFile: hasDataFile }
    const view = viewOf(table)
    let next = 0
    for (let entry = 0; entry < table.length; entry += l2EntrySize) {
      const high = view.getUint32(entry)
      const low = view.getUint32(entry + 4)
      const zero = extendedL2 ? view.getUint32(entry + 8) : 0
      const alloc = extendedL2 ? view.getUint32(entry + 12) : 0
      if ((high | low | zero | alloc) === 0) {
        // most entries by far are empty: the following ones are skipped at memory speed
        const empty = zeroLength(table, entry, table.length)
        entry += empty - (empty % l2EntrySize) - l2EntrySize
        continue
      }
      const at = start + entry
      if ((high & compressedFlag) !== 0) {
        this.#compressed(at, high, low, (zero | alloc) !== 0, times, active)
        continue
      }
      if ((high & reservedHigh) !== 0 || (low & reservedLow) !== 0) {
        report.corruption(() => {
          const entry = hex(high, low)
          return { structure: 'L2 entry', offset: at, message: `reserved bits are set: ${entry}`, entry, problem: 'reserved bits' }
        }, times)
      }
      const kind = clusterKind(high, low, kindContext)
      if (header.version === 2 && (low & zeroFlag) !== 0) {
        report.corruption(() => {
          const entry = hex(high, low)
          return { structure: 'L2 entry', offset: at, message: `the ZERO flag is set, which version 2 does not have: ${entry}`, entry }
        }, times)
      }
      if (kind === 'unallocated' || kind === 'zero-plain') {
        if (alloc !== 0) this.#invalidSubclusters(at, zero, alloc, times, 'subclusters without cluster')
        continue
      }
      const offset = entryOffset(high, low)
      report.allocatedClusters += active
      if (next !== 0 && offset !== next) report.fragmentedClusters += active
      next = offset + clusterSize
      if (extendedL2 && !validSubclusters(true, zero, alloc)) this.#invalidSubclusters(at, zero, alloc, times)
      const holdsData = extendedL2 ? alloc !== 0 : kind === 'normal'
      if (offset % clusterSize !== 0) {
        report.corruption(() => {
          const message = `the cluster offset ${offsetText(offset)} is not a multiple of ${clusterSize}`
          const problem = holdsData ? 'unaligned' : 'unaligned preallocation'
          return { structure: 'L2 entry', offset: at, message, entry: hex(high, low), problem, value: offset }
        }, times)
        if (!holdsData) this.repairs.zero.add(at)
      }
      if (!hasDataFile) {
        this.#context.reference(offset, clusterSize, owner.data, times)
        if (active > 0 && start > 0) this.#copied({ structure: 'L2 entry', offset: at }, high, low, Math.floor(offset / clusterSize), active)
      } else if (active > 0 && !isCopied(high)) {
        report.corruption(() => {
          const entry = hex(high, low)
          const message = `COPIED is not set, though the data file's clusters have one owner: ${entry}`
          return { structure: 'L2 entry', offset: at, message, flag: 'COPIED', entry }
        }, active)
        this.repairs.copied.add(at)
      }
    }
  }

  #compressed(at: number, high: number, low: number, hasBitmap: boolean, times: number, active: number): void {
    const { report, geometry, hasDataFile } = this.#context
    const corrupt = (message: string): void =>
      report.corruption(() => ({ structure: 'L2 entry', offset: at, message, entry: hex(high, low) }), times)
    if (isCopied(high)) {
      report.corruption(() => {
        const entry = hex(high, low)
        const { offset } = decodeCompressed(high, low, geometry.clusterBits)
        const message = `COPIED is set on a compressed cluster: ${entry}`
        return { structure: 'L2 entry', offset: at, message, flag: 'COPIED', entry, problem: 'compressed with COPIED', value: offset }
      }, times)
    }
    if (hasDataFile) {
      corrupt('a compressed cluster in an image with an external data file')
    } else if (hasBitmap) {
      corrupt('a compressed cluster with a subcluster bitmap that is not 0')
    } else {
      const { offset, length } = decodeCompressed(high, low, geometry.clusterBits)
      this.#context.reference(offset, length, owner.compressed, times)
      // reading one always takes a request of its own
      report.allocatedClusters += active
      report.compressedClusters += active
      report.fragmentedClusters += active
    }
  }

  #invalidSubclusters(at: number, zero: number, alloc: number, times: number, problem?: CheckProblem): void {
    this.#context.report.corruption(() => {
      const message = `the subcluster bitmap is invalid: ZERO ${zero.toString(16)}, ALLOC ${alloc.toString(16)}`
      return { structure: 'L2 entry', offset: at, message, ...(problem === undefined ? {} : { problem }) }
    }, times)
  }

  /** In the active layer COPIED must be set exactly where the stored refcount is 1. */
  #copied(place: Pick<CheckFinding, 'structure' | 'offset' | 'index'>, high: number, low: number, cluster: number, times: number): void {
    const refcount = this.#stored.get(cluster)
    if (refcount === undefined || isCopied(high) === (refcount === 1)) return
    this.#context.report.corruption(() => {
      const entry = hex(high, low)
      const name = place.index === undefined ? '' : `L1 entry ${place.index}: `
      const message = `${name}COPIED is ${isCopied(high) ? 'set' : 'not set'}, but the refcount of cluster ${cluster} is ${refcount}: ${entry}`
      return { ...place, message, flag: 'COPIED', entry, found: refcount }
    }, times)
    this.repairs.copied.add(place.offset)
  }
}

function hex(high: number, low: number): string {
  return high.toString(16).padStart(8, '0') + low.toString(16).padStart(8, '0')
}
