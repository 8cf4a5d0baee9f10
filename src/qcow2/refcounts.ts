/**
 * The counters of host clusters: reading and changing them in cached refcount blocks. Blocks that do
 * not exist count nothing; making new ones is the allocator's work.
 */
import { Qcow2Error, type FormatError } from '../core/errors.ts'
import type { Geometry } from './geometry.ts'
import type { HostFile } from './host-file.ts'
import { maxHostOffset } from './limits.ts'
import type { PointerTable } from './pointer-table.ts'
import type { RefcountLayout } from './refcount-layout.ts'
import type { Slice, TableCache } from './table-cache.ts'

/** A stretch of counters within one slice of a refcount block. */
export interface CounterRun {
  /** Host cluster of the first counter. */
  readonly cluster: number
  /** Index of the first counter within the slice. */
  readonly index: number
  /** Counters from there to the end of the slice or of the range asked for. */
  readonly count: number
  /** Host offset of the slice; 0 if the block does not exist. */
  readonly slice: number
}

/** The file whose clusters are counted. */
interface CountedFile {
  readonly host: HostFile
  readonly refcountTable: PointerTable
}

export class Refcounts {
  readonly layout: RefcountLayout
  readonly geometry: Geometry
  readonly cache: TableCache
  readonly #tables: CountedFile
  readonly #perSlice: number

  constructor(geometry: Geometry, layout: RefcountLayout, cache: TableCache, tables: CountedFile) {
    this.geometry = geometry
    this.layout = layout
    this.cache = cache
    this.#tables = tables
    this.#perSlice = (cache.sliceSize * 8) / layout.bits
  }

  /** Host offset of a refcount block, 0 if it does not exist. */
  blockOffset(block: number): number {
    const table = this.#tables.refcountTable
    if (block >= table.length) return 0
    const high = table.high(block)
    const low = table.low(block)
    if (high === 0 && low === 0) return 0
    const offset = high * 0x1_0000_0000 + low
    if (offset % this.geometry.clusterSize !== 0 || offset >= maxHostOffset) {
      const location = { structure: 'refcount table', offset: table.offset + block * 8 }
      throw this.#tables.host.damaged(`entry ${block} is ${offset}, not the offset of a cluster`, location)
    }
    return offset
  }

  /** The longest stretch of `[cluster, cluster + count)` from its start that lies in one slice. */
  runAt(cluster: number, count: number): CounterRun {
    const { refcountsPerBlock } = this.geometry
    const block = Math.floor(cluster / refcountsPerBlock)
    const inBlock = cluster - block * refcountsPerBlock
    const offset = this.blockOffset(block)
    if (offset === 0) return { cluster, index: 0, count: Math.min(count, refcountsPerBlock - inBlock), slice: 0 }
    const part = Math.floor(inBlock / this.#perSlice)
    const index = inBlock - part * this.#perSlice
    return { cluster, index, count: Math.min(count, this.#perSlice - index), slice: offset + part * this.cache.sliceSize }
  }

  /** The counter of a host cluster. */
  async get(cluster: number): Promise<number> {
    const run = this.runAt(cluster, 1)
    if (run.slice === 0) return 0
    return this.cache.with(run.slice, ({ bytes }) => this.layout.get(bytes, run.index))
  }

  /** The counter of a host cluster if its block is in memory or does not exist. */
  peek(cluster: number): number | undefined {
    const run = this.runAt(cluster, 1)
    if (run.slice === 0) return 0
    const slice = this.cache.peek(run.slice)
    return slice === undefined ? undefined : this.layout.get(slice.bytes, run.index)
  }

  /** Index of the first counter of the range that differs from zero, as a host cluster, or its end. */
  async firstUsed(cluster: number, count: number): Promise<number> {
    for (let at = cluster; at < cluster + count; ) {
      const run = this.runAt(at, cluster + count - at)
      if (run.slice !== 0) {
        const end = run.index + run.count
        const found = await this.cache.with(run.slice, ({ bytes }) => this.layout.findUsed(bytes, run.index, end))
        if (found < end) return at + found - run.index
      }
      at += run.count
    }
    return cluster + count
  }

  /**
   * Adds `delta` to each counter of the range, in memory.
   * @returns the first cluster of the range whose counter fell to 0, or undefined.
   * @throws Qcow2Error `ERR_RANGE` if a counter would exceed its width, FormatError `ERR_CORRUPT` if
   * it would fall below 0; the range is then unchanged.
   */
  async adjust(cluster: number, count: number, delta: number): Promise<number | undefined> {
    let freed: number | undefined
    for (let at = cluster; at < cluster + count; ) {
      const run = this.runAt(at, cluster + count - at)
      try {
        if (run.slice === 0) throw this.#belowZero(at)
        const slice = this.cache.peek(run.slice)
        const first =
          slice === undefined
            ? await this.cache.with(run.slice, (loaded) => this.#adjustRun(loaded, run, delta))
            : this.#adjustRun(slice, run, delta)
        freed ??= first
      } catch (error) {
        if (at > cluster) await this.adjust(cluster, at - cluster, -delta)
        throw error
      }
      at += run.count
    }
    return freed
  }

  #adjustRun(slice: Slice, run: CounterRun, delta: number): number | undefined {
    const { layout } = this
    for (let i = run.index; i < run.index + run.count; i++) {
      const value = layout.get(slice.bytes, i) + delta
      if (value < 0) throw this.#belowZero(run.cluster + i - run.index)
      if (value > layout.max) throw this.#overflow(run.cluster + i - run.index)
    }
    const { bytes } = this.cache.modify(slice)
    let freed: number | undefined
    for (let i = run.index; i < run.index + run.count; i++) {
      const value = layout.get(bytes, i) + delta
      layout.set(bytes, i, value)
      if (value === 0) freed ??= run.cluster + i - run.index
    }
    return freed
  }

  #belowZero(cluster: number): FormatError {
    return this.#tables.host.damaged(`cluster ${cluster} is in use but its counter is 0; repair the image`, { structure: 'refcount block' })
  }

  #overflow(cluster: number): Qcow2Error {
    return new Qcow2Error(
      'ERR_RANGE',
      `refcount block: the counter of cluster ${cluster} (offset ${cluster * this.geometry.clusterSize}) is at ${this.layout.max}, the most ${this.layout.bits}-bit refcounts hold; the image needs wider refcounts`,
    )
  }
}
