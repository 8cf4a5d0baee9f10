/**
 * The ownership side of a check: the refcount table, its blocks, and the comparison of each stored
 * counter with the references that were found.
 */
import { viewOf } from '../bytes/view.ts'
import { isZero } from '../bytes/zero.ts'
import { UnsupportedError } from '../core/errors.ts'
import { describeOwners, owner, type ClusterCounters } from './check-counters.ts'
import type { CheckContext } from './check-context.ts'
import { offsetText, type CheckProblem } from './check-report.ts'

/** The counters as they are in the image. */
export class StoredRefcounts {
  readonly #context: CheckContext
  /** By refcount table index; a block of zeroes is left out. */
  readonly #blocks: (Uint8Array | undefined)[] = []
  /** Host offset of each block that could be read, by refcount table index. */
  readonly offsets: (number | undefined)[] = []
  /** Table entries whose offset is not aligned, or not even positive as a signed number: their block cannot be read. */
  readonly #unreadable = new Set<number>()
  /** Table entries with reserved bits set. */
  readonly #reserved = new Set<number>()
  readonly #perBlock: number
  #loaded = false

  constructor(context: CheckContext) {
    this.#context = context
    this.#perBlock = context.geometry.refcountsPerBlock
  }

  /** Reads the refcount table and the blocks that describe clusters of the file. */
  async load(): Promise<void> {
    this.#loaded = true
    const { header, geometry, fileClusters } = this.#context
    const length = header.refcountTableClusters * geometry.clusterSize
    const table = viewOf(await this.#context.read(header.refcountTableOffset, length))
    const indices = new Map<number, number[]>()
    const used = Math.min(length / 8, Math.ceil(fileClusters / this.#perBlock))
    for (let index = 0; index < length / 8; index++) {
      const high = table.getUint32(index * 8)
      const low = table.getUint32(index * 8 + 4)
      if (high === 0 && low === 0) continue
      const inLow = (low & 0xffff_fe00) >>> 0
      const offset = high * 0x1_0000_0000 + inLow
      this.offsets[index] = offset
      if ((low & 0x1ff) !== 0) this.#reserved.add(index)
      // beyond 2^53 the number has lost what tells whether it is aligned
      if (inLow % geometry.clusterSize !== 0 || high >= 0x8000_0000) {
        this.#unreadable.add(index)
      } else if (index < used && offset > 0 && offset < this.#context.host.size) {
        const cluster = offset / geometry.clusterSize
        const list = indices.get(cluster)
        if (list === undefined) indices.set(cluster, [index])
        else list.push(index)
      }
    }
    const clusters = [...indices.keys()].sort((a, b) => a - b)
    await this.#context.readClusters(clusters, (bytes, cluster) => {
      if (isZero(bytes)) return
      const block = bytes.slice()
      for (const index of indices.get(cluster)!) this.#blocks[index] = block
    })
  }

  /** The stored counter; undefined where its block cannot be read or nothing was loaded. */
  get(cluster: number): number | undefined {
    if (!this.#loaded) return undefined
    const index = Math.floor(cluster / this.#perBlock)
    const block = this.#blocks[index]
    if (block !== undefined) return this.#context.layout.get(block, cluster % this.#perBlock)
    return this.#unreadable.has(index) ? undefined : 0
  }

  /** Clusters below `end` whose counters cannot be read. */
  unreadable(end: number): number {
    let count = 0
    for (const index of this.#unreadable) count += Math.max(0, Math.min(end, (index + 1) * this.#perBlock) - index * this.#perBlock)
    return count
  }

  /** First cluster in `[from, to)` whose stored counter is not zero, or `to`. */
  nextUsed(from: number, to: number): number {
    // a file may claim to be far longer than its blocks reach
    const last = Math.min(to, this.#blocks.length * this.#perBlock)
    let cluster = from
    while (cluster < last) {
      const index = Math.floor(cluster / this.#perBlock)
      const base = index * this.#perBlock
      const end = Math.min(last, base + this.#perBlock)
      const block = this.#blocks[index]
      if (block !== undefined) {
        const found = base + this.#context.layout.findUsed(block, cluster - base, end - base)
        if (found < end) return found
      }
      cluster = end
    }
    return to
  }

  /** First cluster in `[from, to)` whose stored counter is not `count`, or `to`; it is enough that it may be so. */
  nextOther(from: number, to: number, count: number | undefined): number {
    if (count === 0) return this.nextUsed(from, to)
    const number = Math.floor(from / this.#perBlock)
    const block = this.#blocks[number]
    if (block === undefined) return from
    const base = number * this.#perBlock
    const end = Math.min(to, base + this.#perBlock)
    let cluster = from
    while (cluster < end && this.#context.layout.get(block, cluster - base) === count) cluster++
    return cluster
  }

  /** First cluster in `[from, to)` that is not in use, by one kind of owner and as often as stored; it is enough that it may be so. */
  nextUnlike(expected: ClusterCounters, from: number, to: number): number {
    const number = Math.floor(from / this.#perBlock)
    const block = this.#blocks[number]
    if (block === undefined) return from
    return expected.nextUnlike(from, Math.min(to, (number + 1) * this.#perBlock), this.#context.layout, block, from - number * this.#perBlock)
  }

  /** The block that describes `cluster`, to be changed and written back; undefined if there is none. */
  block(cluster: number): Uint8Array | undefined {
    return this.#blocks[Math.floor(cluster / this.#perBlock)]
  }

  /** A block of zeroes was left out when reading; this brings it back. */
  blockForWriting(cluster: number): Uint8Array | undefined {
    const index = Math.floor(cluster / this.#perBlock)
    if (this.offsets[index] === undefined || this.#unreadable.has(index)) return undefined
    return (this.#blocks[index] ??= new Uint8Array(this.#context.geometry.clusterSize))
  }

  /**
   * Counts the references to the table and to each block. True if the structures are beyond a repair
   * of single counters and must be built anew.
   */
  reference(): boolean {
    const { header, geometry, report, expected, host } = this.#context
    const { clusterSize } = geometry
    this.#context.reference(header.refcountTableOffset, header.refcountTableClusters * clusterSize, owner.refcountTable)
    let rebuild = header.refcountTableClusters === 0
    const corrupt = (index: number, problem: CheckProblem, value: number, detail: () => string): void => {
      rebuild = true
      const offset = header.refcountTableOffset + index * 8
      report.corruption(() => ({ structure: 'refcount table', offset, message: `refcount table entry ${index}: ${detail()}`, index, problem, value }))
    }
    this.offsets.forEach((offset, index) => {
      if (offset === undefined) return
      if (this.#reserved.has(index)) corrupt(index, 'reserved bits', offset, () => 'reserved bits are set')
      else if (offset % clusterSize !== 0) corrupt(index, 'unaligned', offset, () => `the block offset ${offsetText(offset)} is not a multiple of ${clusterSize}`)
      else if (offset >= Math.ceil(host.size / clusterSize) * clusterSize) corrupt(index, 'past end of file', offset, () => `the block offset ${offsetText(offset)} is past the end of the file`)
      else {
        this.#context.reference(offset, clusterSize, owner.refcountBlock)
        const count = expected.get(offset / clusterSize)
        if (count !== 1) corrupt(index, 'shared refcount block', count, () => `its block, cluster ${offset / clusterSize}, has ${count} references`)
      }
    })
    return rebuild
  }
}

/** Runs of clusters whose stored counter is wrong. */
export class RefcountDifferences {
  /** Quadruples of first cluster, number of clusters, stored counter, expected counter. */
  readonly runs: number[] = []
  /** There are more than are listed. */
  truncated = false

  /** The clusters follow those added before. */
  add(cluster: number, count: number, found: number, expected: number): void {
    const { runs } = this
    const last = runs.length - 4
    if (last >= 0 && runs[last]! + runs[last + 1]! === cluster && runs[last + 2] === found && runs[last + 3] === expected) runs[last + 1]! += count
    else if (runs.length < 4 * mostRuns) runs.push(cluster, count, found, expected)
    else this.truncated = true
  }
}

/** Clusters compared as one run; neighbours that differ alike are joined again. */
const longestStretch = 4096
/** Runs that are listed, 32 bytes each. */
const mostRuns = 1 << 18
/** Runs that are compared. No writer leaves so many: the counters are noise. */
const mostCompared = 1 << 24

/** What comparing stored and expected counters found. */
export interface RefcountComparison {
  /** Highest host cluster with a stored or an expected counter above zero; at least 0. */
  readonly highestCluster: number
  readonly differences: RefcountDifferences
  /** A cluster in use has no counter at all: single counters cannot be trusted. */
  readonly rebuild: boolean
}

/**
 * Compares every counter of the file's clusters and reports the differences.
 * @throws UnsupportedError if they are too many to be anything but noise
 */
export async function compareRefcounts(context: CheckContext, stored: StoredRefcounts): Promise<RefcountComparison> {
  const { expected, report, points } = context
  const end = Math.max(context.fileClusters, expected.highest + 1)
  const differences = new RefcountDifferences()
  let highestCluster = 0
  let rebuild = false
  report.checkErrors += stored.unreadable(end)
  let nextStored = stored.nextUsed(0, end)
  let nextExpected = expected.nextUsed(0, end)
  for (let compared = 0; ; compared++) {
    const turn = compared % 256 === 0 ? points.pass() : undefined
    if (turn !== undefined) await turn
    if (compared > mostCompared) {
      throw new UnsupportedError(`refcounts: they differ from the references in more than ${mostCompared} places; convert the image, which needs none of them`, ['refcounts'])
    }
    const cluster = Math.min(nextStored, nextExpected)
    if (cluster >= end) break
    let next = stored.nextUnlike(expected, cluster, end)
    if (next > cluster) {
      highestCluster = next - 1
    } else {
      const found = stored.get(cluster)
      const references = expected.get(cluster)
      const owners = expected.owners(cluster)
      // a stretch at a time: where one side changes at every cluster, the other is not looked at to its end each time
      const stretch = stored.nextOther(cluster + 1, Math.min(end, cluster + longestStretch), found)
      next = expected.nextOther(cluster + 1, stretch, references, owners)
      if (found !== undefined) highestCluster = next - 1
      if (found !== undefined && found !== references) {
        differences.add(cluster, next - cluster, found, references)
        rebuild ||= found === 0
        reportDifference(context, cluster, next - cluster, found, references)
      }
      if (!mayShare(owners)) reportOverlap(context, cluster, next - cluster, owners)
    }
    if (nextStored < next) nextStored = stored.nextUsed(next, end)
    if (nextExpected < next) nextExpected = expected.nextUsed(next, end)
  }
  return { highestCluster, differences, rebuild }
}

/** Each cluster of a run counts, and is listed as far as there is room. */
function reportDifference({ report, geometry }: CheckContext, cluster: number, count: number, found: number, expected: number): void {
  const structure = 'refcount'
  const listed = Math.min(count, report.room)
  for (let each = cluster; each < cluster + listed; each++) {
    const offset = each * geometry.clusterSize
    const finding = { structure, offset, message: `refcount of cluster ${each} is ${found}, references found: ${expected}`, expected, found }
    if (found > expected) report.leak(finding)
    else report.corruption(finding)
  }
  if (found > expected) report.leaks += count - listed
  else report.corruptions += count - listed
}

function reportOverlap({ report, geometry }: CheckContext, cluster: number, count: number, owners: number): void {
  for (let each = cluster; each < cluster + count; each++) {
    report.overlap(() => ({ structure: 'overlap', offset: each * geometry.clusterSize, message: `cluster ${each} is claimed by ${describeOwners(owners)}` }))
  }
}

/** One kind of owner, or guest data in both forms: a cluster with counted references is copied before it is written to. */
export function mayShare(owners: number): boolean {
  return (owners & (owners - 1)) === 0 || owners === (owner.data | owner.compressed)
}
