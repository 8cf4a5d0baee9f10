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

/** Something in an L1 or L2 table that a repair can set right. Offsets are bytes in the image file. */
export type MappingRepair =
  | { readonly kind: 'copied'; readonly entryOffset: number; readonly cluster: number }
  | { readonly kind: 'zero'; readonly entryOffset: number }

/** An L1 table to walk. */
export interface L1Location {
  readonly offset: number
  /** Entries. */
  readonly size: number
  readonly active: boolean
  /** The entries of a table that is in memory only: its own clusters are not counted. */
  readonly entries?: Uint8Array
}

/** Walks all L1 tables and then each L2 table once. COPIED flags are checked against `stored`. */
export async function checkMapping(context: CheckContext, tables: readonly L1Location[], stored: StoredRefcounts): Promise<readonly MappingRepair[]> {
  const walk = new MappingWalk(context, stored)
  for (const table of tables) await walk.l1(table)
  await walk.l2()
  return walk.repairs
}

class MappingWalk {
  readonly repairs: MappingRepair[] = []
  readonly #context: CheckContext
  readonly #stored: StoredRefcounts
  /** References to each aligned L2 table, by host cluster: from all L1 tables, and from the active one. */
  readonly #all = new ClusterCounters()
  readonly #active = new ClusterCounters()
  /** Where L1 entries name tables that are not aligned; these are damaged, but read nonetheless. */
  readonly #unaligned: { readonly offset: number; readonly active: boolean }[] = []

  constructor(context: CheckContext, stored: StoredRefcounts) {
    this.#context = context
    this.#stored = stored
  }

  /** Counts an L1 table and the L2 tables it names. */
  async l1(table: L1Location): Promise<void> {
    const { geometry, report } = this.#context
    if (table.size === 0) return
    if (table.entries === undefined) this.#context.reference(table.offset, table.size * 8, owner.l1Table)
    const bytes = table.entries ?? await this.#context.read(table.offset, table.size * 8)
    const view = viewOf(bytes)
    for (let index = 0; index < table.size; index++) {
      const high = view.getUint32(index * 8)
      const low = view.getUint32(index * 8 + 4)
      if (high === 0 && low === 0) continue
      const at = table.offset + index * 8
      if ((high & (reservedHigh | compressedFlag)) !== 0 || (low & (reservedLow | zeroFlag)) !== 0) {
        report.corruption({ structure: 'L1 entry', offset: at, message: `L1 entry ${index} has reserved bits set: ${hex(high, low)}`, entry: hex(high, low), index, problem: 'reserved bits' })
      }
      const offset = entryOffset(high, low)
      this.#context.reference(offset, geometry.clusterSize, owner.l2Table)
      if (offset % geometry.clusterSize !== 0) {
        const message = `L1 entry ${index}: the L2 table offset ${offsetText(offset)} is not a multiple of ${geometry.clusterSize}`
        report.corruption({ structure: 'L1 entry', offset: at, message, entry: hex(high, low), index, problem: 'unaligned', value: offset })
        this.#unaligned.push({ offset, active: table.active })
      } else if (offset < this.#context.host.size) {
        this.#all.add(offset / geometry.clusterSize, 1)
        if (table.active) this.#active.add(offset / geometry.clusterSize, 1)
      }
      if (table.active && offset > 0) this.#copied({ structure: 'L1 entry', offset: at, index }, high, low, Math.floor(offset / geometry.clusterSize), 1)
    }
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
        report.corruption({ structure: 'L2 entry', offset: at, message: `reserved bits are set: ${hex(high, low)}`, entry: hex(high, low), problem: 'reserved bits' }, times)
      }
      const kind = clusterKind(high, low, kindContext)
      if (header.version === 2 && (low & zeroFlag) !== 0) {
        const message = `the ZERO flag is set, which version 2 does not have: ${hex(high, low)}`
        report.corruption({ structure: 'L2 entry', offset: at, message, entry: hex(high, low) }, times)
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
        const message = `the cluster offset ${offsetText(offset)} is not a multiple of ${clusterSize}`
        const problem = holdsData ? 'unaligned' : 'unaligned preallocation'
        report.corruption({ structure: 'L2 entry', offset: at, message, entry: hex(high, low), problem, value: offset }, times)
        if (!holdsData) this.repairs.push({ kind: 'zero', entryOffset: at })
      }
      if (!hasDataFile) {
        this.#context.reference(offset, clusterSize, owner.data, times)
        if (active > 0 && start > 0) this.#copied({ structure: 'L2 entry', offset: at }, high, low, Math.floor(offset / clusterSize), active)
      } else if (active > 0 && !isCopied(high)) {
        const message = `COPIED is not set, though the data file's clusters have one owner: ${hex(high, low)}`
        report.corruption({ structure: 'L2 entry', offset: at, message, flag: 'COPIED', entry: hex(high, low) }, active)
        this.repairs.push({ kind: 'copied', entryOffset: at, cluster: -1 })
      }
    }
  }

  #compressed(at: number, high: number, low: number, hasBitmap: boolean, times: number, active: number): void {
    const { report, geometry, hasDataFile } = this.#context
    const corrupt = (message: string): void => report.corruption({ structure: 'L2 entry', offset: at, message, entry: hex(high, low) }, times)
    if (isCopied(high)) {
      const entry = hex(high, low)
      const place = { problem: 'compressed with COPIED', value: decodeCompressed(high, low, geometry.clusterBits).offset } as const
      report.corruption({ structure: 'L2 entry', offset: at, message: `COPIED is set on a compressed cluster: ${entry}`, flag: 'COPIED', entry, ...place }, times)
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
    const message = `the subcluster bitmap is invalid: ZERO ${zero.toString(16)}, ALLOC ${alloc.toString(16)}`
    this.#context.report.corruption({ structure: 'L2 entry', offset: at, message, ...(problem === undefined ? {} : { problem }) }, times)
  }

  /** In the active layer COPIED must be set exactly where the stored refcount is 1. */
  #copied(place: Pick<CheckFinding, 'structure' | 'offset' | 'index'>, high: number, low: number, cluster: number, times: number): void {
    const refcount = this.#stored.get(cluster)
    if (refcount === undefined || isCopied(high) === (refcount === 1)) return
    const entry = hex(high, low)
    const name = place.index === undefined ? '' : `L1 entry ${place.index}: `
    const message = `${name}COPIED is ${isCopied(high) ? 'set' : 'not set'}, but the refcount of cluster ${cluster} is ${refcount}: ${entry}`
    this.#context.report.corruption({ ...place, message, flag: 'COPIED', entry, found: refcount }, times)
    this.repairs.push({ kind: 'copied', entryOffset: place.offset, cluster })
  }
}

function hex(high: number, low: number): string {
  return high.toString(16).padStart(8, '0') + low.toString(16).padStart(8, '0')
}
