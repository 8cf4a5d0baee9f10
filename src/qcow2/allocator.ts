/**
 * Finds free host clusters and counts them in. First fit from a hint that moves up as clusters are
 * taken and down as they are freed: sequential writes get contiguous runs, holes are found again.
 * Grows the refcount structures. Knows nothing of what clusters are for.
 *
 * Everything here happens in memory; `write-back.ts` makes counters durable before anything on disk
 * refers to what they count. The one exception is growing the refcount table, see `#growTable`.
 */
import { Qcow2Error, type FormatError } from '../core/errors.ts'
import { Mutex } from '../core/lock.ts'
import type { Geometry } from './geometry.ts'
import type { HostFile } from './host-file.ts'
import { maxRefcountTableBytes } from './limits.ts'
import type { MetadataMap } from './metadata-map.ts'
import { PointerTable } from './pointer-table.ts'
import type { Refcounts } from './refcounts.ts'
import type { Frees } from './write-back.ts'

/** Contiguous host clusters. */
export interface ClusterRun {
  /** Host offset in bytes. */
  readonly offset: number
  readonly clusters: number
  /** The range was never written, neither by us nor before: it reads as zeroes. */
  readonly pristine: boolean
}

/** What the allocator needs of the rest of the engine. */
export interface AllocatorHost {
  readonly host: HostFile
  readonly metadataMap: MetadataMap
  refcountTable: PointerTable
  /** Writes everything back. */
  flush(): Promise<void>
  /** Points the header at a new refcount table, durably. */
  switchRefcountTable(table: PointerTable): Promise<void>
  /** Resolves when all requests in flight now have ended. */
  drained(): Promise<void>
  /** The image turned out to be corrupt. */
  corrupt(error: FormatError): Promise<never>
}

/** Freed clusters that wait for a flush beyond which allocation asks for one. */
const manyFreed = 4096

export class Allocator implements Frees {
  readonly #parts: AllocatorHost
  readonly #refcounts: Refcounts
  readonly #geometry: Geometry
  readonly #mutex = new Mutex()
  /** No cluster below this one is free. */
  #hint = 1
  /** Clusters from here on were never handed out and lie past the end of the file. */
  #pristineFrom: number
  /** Pairs of first cluster and count whose references are gone in memory. */
  #freed: number[] = []
  #freedClusters = 0
  #releasing: Promise<void> = Promise.resolve()
  #failure: Error | undefined
  /** The counters were found to count the header. */
  #counted = false

  constructor(parts: AllocatorHost, refcounts: Refcounts) {
    this.#parts = parts
    this.#refcounts = refcounts
    this.#geometry = refcounts.geometry
    this.#pristineFrom = Math.ceil(parts.host.size / this.#geometry.clusterSize)
  }

  /** Takes 1 to `most` contiguous clusters, wherever the first free one is. */
  allocate(most: number): Promise<ClusterRun> {
    return this.#mutex.run(async () => {
      await this.#assertSound()
      if (this.#freedClusters > manyFreed) await this.#recycle()
      for (;;) {
        const run = this.#refcounts.runAt(this.#hint, this.#geometry.refcountsPerBlock)
        if (run.slice === 0) {
          await this.#roomFor(1)
          continue
        }
        const { cache, layout } = this.#refcounts
        const end = run.index + run.count
        const [first, last] = await cache.with(run.slice, ({ bytes }) => {
          const free = layout.findFree(bytes, run.index, end)
          return [free, layout.findUsed(bytes, free, Math.min(end, free + most))]
        })
        if (first < end) return await this.#take(this.#hint + first - run.index, last - first, true)
        this.#hint += run.count
      }
    })
  }

  /** Takes exactly `clusters` contiguous clusters. Holes that are too small stay free. */
  allocateContiguous(clusters: number): Promise<ClusterRun> {
    return this.#mutex.run(async () => {
      await this.#assertSound()
      const start = await this.#roomFor(clusters)
      return await this.#take(start, clusters, clusters === 1)
    })
  }

  /** Adds `delta` to counters, in turn with allocations. See {@link Refcounts.adjust}. */
  adjust(cluster: number, count: number, delta: number): Promise<void> {
    return this.#mutex.run(async () => {
      const freed = await this.#refcounts.adjust(cluster, count, delta)
      if (freed !== undefined) this.#hint = Math.min(this.#hint, freed)
    })
  }

  /** As `adjust`, for pairs of first cluster and count. All or nothing. */
  adjustAll(pairs: readonly number[], delta: number): Promise<void> {
    return this.#mutex.run(async () => {
      let done = 0
      try {
        for (; done < pairs.length; done += 2) {
          const freed = await this.#refcounts.adjust(pairs[done]!, pairs[done + 1]!, delta)
          if (freed !== undefined) this.#hint = Math.min(this.#hint, freed)
        }
      } catch (error) {
        for (let i = 0; i < done; i += 2) await this.#refcounts.adjust(pairs[i]!, pairs[i + 1]!, -delta)
        throw error
      }
    })
  }

  /**
   * Gives up one reference to each cluster of a host range, whose last mention was just removed in
   * memory. The counters fall when that removal is durable and no earlier request still runs.
   */
  free(offset: number, length: number): void {
    const { clusterSize } = this.#geometry
    const cluster = Math.floor(offset / clusterSize)
    const count = Math.floor((offset + length - 1) / clusterSize) - cluster + 1
    const freed = this.#freed
    const last = freed.length
    if (last > 0 && freed[last - 2]! + freed[last - 1]! === cluster) freed[last - 1]! += count
    else freed.push(cluster, count)
    this.#freedClusters += count
  }

  get hasFreed(): boolean {
    return this.#freed.length > 0
  }

  take(): readonly number[] {
    const freed = this.#freed
    this.#freed = []
    this.#freedClusters = 0
    return freed
  }

  restore(freed: readonly number[]): void {
    for (let i = 0; i < freed.length; i += 2) this.free(freed[i]! * this.#geometry.clusterSize, freed[i + 1]! * this.#geometry.clusterSize)
  }

  release(freed: readonly number[]): void {
    const drained = this.#parts.drained()
    const lower = async (): Promise<void> => {
      await drained
      for (let i = 0; i < freed.length; i += 2) await this.adjust(freed[i]!, freed[i + 1]!, -1)
    }
    this.#releasing = this.#releasing.then(lower).catch((error: unknown) => {
      // a counter that cannot fall is a leak, or a corruption that the next allocation reports
      this.#failure ??= error as Error
    })
  }

  /** Resolves when the counters of everything released have fallen. */
  released(): Promise<void> {
    return this.#releasing
  }

  /** Forgets the search position, after counters changed around the allocator. */
  rescan(): void {
    this.#hint = 1
    this.#failure = undefined
    this.#counted = false
    this.#pristineFrom = Math.max(this.#pristineFrom, Math.ceil(this.#parts.host.size / this.#geometry.clusterSize))
  }

  async #assertSound(): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure
    if (this.#counted) return
    // the first counter of all: where it is 0 the counters are not those of this image, and nothing is known to be free
    if ((await this.#refcounts.get(0)) === 0) await this.#refuse(0)
    this.#counted = true
  }

  #refuse(offset: number): Promise<never> {
    return this.#parts.corrupt(this.#parts.host.damaged('a cluster in use by metadata has counter 0', { structure: 'refcount block', offset }))
  }

  /** Lets freed clusters be found again. Requests in flight may need the mutex, so nobody waits for them. */
  async #recycle(): Promise<void> {
    await this.#parts.flush()
  }

  /** Counts a free run in. `moves`: the hint may pass it. */
  async #take(cluster: number, count: number, moves: boolean): Promise<ClusterRun> {
    const { clusterSize } = this.#geometry
    const offset = cluster * clusterSize
    if (cluster === 0 || this.#parts.metadataMap.overlaps(offset, count * clusterSize)) {
      return this.#refuse(offset)
    }
    await this.#refcounts.adjust(cluster, count, 1)
    if (moves) this.#hint = cluster + count
    const pristine = cluster >= this.#pristineFrom
    this.#pristineFrom = Math.max(this.#pristineFrom, cluster + count)
    return { offset, clusters: count, pristine }
  }

  /**
   * The first of `clusters` contiguous free clusters that can be counted. Refcount structures that are
   * missing for that are placed right before them.
   */
  async #roomFor(clusters: number): Promise<number> {
    let wanted = clusters
    for (;;) {
      const start = await this.#findRun(wanted)
      const missing = this.#missing(start, clusters)
      if (clusters + missing.total <= wanted) {
        await this.#cover(start, missing)
        return start + missing.total
      }
      wanted = clusters + missing.total
    }
  }

  /** The first of `count` contiguous free clusters; clusters without a refcount block are free. */
  async #findRun(count: number): Promise<number> {
    let start = this.#hint
    for (;;) {
      const used = await this.#refcounts.firstUsed(start, count)
      if (used === start + count) return start
      start = await this.#firstFree(used + 1)
    }
  }

  async #firstFree(cluster: number): Promise<number> {
    for (let at = cluster; ; ) {
      const run = this.#refcounts.runAt(at, this.#geometry.refcountsPerBlock)
      if (run.slice === 0) return at
      const { cache, layout } = this.#refcounts
      const end = run.index + run.count
      const found = await cache.with(run.slice, ({ bytes }) => layout.findFree(bytes, run.index, end))
      if (found < end) return at + found - run.index
      at += run.count
    }
  }

  /** The refcount structures missing to count themselves from `start` on and `clusters` behind them. */
  #missing(start: number, clusters: number): MissingStructures {
    const { refcountsPerBlock, clusterSize } = this.#geometry
    let total = 0
    for (;;) {
      const end = start + total + clusters
      const blocks: number[] = []
      for (let block = Math.floor(start / refcountsPerBlock); block * refcountsPerBlock < end; block++) {
        if (this.#refcounts.blockOffset(block) === 0) blocks.push(block)
      }
      const entries = Math.ceil(end / refcountsPerBlock)
      const grows = entries > this.#parts.refcountTable.length
      const tableClusters = grows ? Math.ceil((entries * 1.5 * 8) / clusterSize) : 0
      if (blocks.length + tableClusters <= total) return { blocks, tableClusters, total }
      total = blocks.length + tableClusters
    }
  }

  /** Puts missing structures at `start`: the blocks, then a larger table. */
  async #cover(start: number, missing: MissingStructures): Promise<void> {
    const { blocks, tableClusters, total } = missing
    if (total === 0) return
    const { clusterSize } = this.#geometry
    const { host, metadataMap, refcountTable } = this.#parts
    if (metadataMap.overlaps(start * clusterSize, total * clusterSize)) await this.#refuse(start * clusterSize)
    host.assertWritable(refcountTable.offset, refcountTable.length * 8)
    try {
      if (tableClusters > 0) await this.#growTable(start, missing)
      else {
        this.#addBlocks(this.#parts.refcountTable, blocks, start)
        await this.#refcounts.adjust(start, total, 1)
      }
    } catch (error) {
      // the new structures are in use and perhaps not counted: nothing may be allocated on top of them
      this.#failure ??= error as Error
      throw error
    }
    metadataMap.add(start * clusterSize, total * clusterSize)
    this.#pristineFrom = Math.max(this.#pristineFrom, start + total)
  }

  /** New empty blocks from `start` on; visible in the file when the refcount table is written back. */
  #addBlocks(table: PointerTable, blocks: readonly number[], start: number): void {
    const { clusterSize } = this.#geometry
    const { cache } = this.#refcounts
    blocks.forEach((block, index) => {
      const offset = (start + index) * clusterSize
      for (let at = 0; at < clusterSize; at += cache.sliceSize) {
        cache.create(offset + at, this.#parts.host.allocate(cache.sliceSize).fill(0))
      }
      table.set(block, offset)
    })
  }

  /**
   * Replaces the refcount table by a larger one, which counts itself in new blocks:
   *
   * 1. write everything back: the blocks of the old table are durable;
   * 2. write the new blocks and the new table where nothing refers to them, flush;
   * 3. switch the header, flush; 4. free the old table.
   *
   * A crash before 3 leaves the old table and bytes nobody counts; after 3, a leaked old table.
   */
  async #growTable(start: number, missing: MissingStructures): Promise<void> {
    const { host, metadataMap } = this.#parts
    const { clusterSize } = this.#geometry
    const bytes = missing.tableClusters * clusterSize
    if (bytes > Math.max(maxRefcountTableBytes, clusterSize)) {
      throw new Qcow2Error('ERR_NO_SPACE', `refcount table: it would be ${bytes} bytes, at most ${maxRefcountTableBytes}; the image cannot grow`)
    }
    await this.#parts.flush()
    const old = this.#parts.refcountTable
    const table = new PointerTable((start + missing.blocks.length) * clusterSize, bytes / 8)
    table.bytes.set(old.bytes.subarray(0, old.length * 8))
    this.#addBlocks(table, missing.blocks, start)
    this.#parts.refcountTable = table
    await this.#refcounts.adjust(start, missing.total, 1)
    await this.#parts.flush()
    await host.write(table.offset, table.bytes)
    await host.flush()
    await this.#parts.switchRefcountTable(table)
    metadataMap.remove(old.offset, old.length * 8)
    this.free(old.offset, old.length * 8)
  }
}

interface MissingStructures {
  /** Indices of refcount blocks that do not exist. */
  readonly blocks: readonly number[]
  /** Clusters of a new refcount table; 0 if the present one is long enough. */
  readonly tableClusters: number
  /** Clusters of all of them. */
  readonly total: number
}
