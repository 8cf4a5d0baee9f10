/**
 * The order in which changed metadata reach the file. Nothing else in the engine orders writes of
 * the metadata caches; operations with an order of their own (a new header, a snapshot table) call
 * `flush` between their steps.
 *
 * One cycle takes everything that is dirty at one moment and writes it in this order, with a flush
 * of the file before each line that begins with `->`:
 *
 *       refcount blocks          counters of new clusters, also of new refcount blocks
 *   ->  refcount table           a new block becomes visible when its counters are durable
 *   ->  L2 tables                refer only to counted clusters, whose data is durable by now
 *   ->  L1 table                 refers only to durable L2 tables
 *   ->  frees                    clusters that nothing on disk refers to any more
 *
 * A crash between any two lines leaves counters that are too high, never too low: leaked clusters.
 * Data of a guest write is written before its L2 entry changes in memory, so the flush in front of
 * the L2 tables makes it durable: a crash never shows a new cluster without its data. Counters of
 * freed clusters fall only after the cycle that removed the last reference to them.
 */
import type { HostFile, Piece } from './host-file.ts'
import type { PointerTable } from './pointer-table.ts'
import type { TableCache } from './table-cache.ts'

/** What is written back; the tables are asked for at each cycle because they may be replaced. */
export interface Metadata {
  readonly refcountBlocks: TableCache
  readonly l2Tables: TableCache
  refcountTable: PointerTable
  l1Table: PointerTable
}

/** Clusters whose last reference was removed in memory. */
export interface Frees {
  /** Everything freed so far; counts as released unless given back to `restore`. */
  take(): readonly number[]
  restore(freed: readonly number[]): void
  /** The references are gone from the disk: lower the counters. */
  release(freed: readonly number[]): void
}

/** One line of the order: something to write, and how to record the outcome. */
interface Stage {
  readonly pieces: readonly Piece[]
  readonly written: () => void
  readonly failed: () => void
}

export class WriteBack {
  readonly #host: HostFile
  readonly #metadata: Metadata
  readonly #frees: Frees
  /** Flushes the guest data where it is in another file. */
  readonly #flushData: () => Promise<void>
  #running: Promise<void> = Promise.resolve()
  #queued: Promise<void> | undefined

  constructor(host: HostFile, metadata: Metadata, frees: Frees, flushData: () => Promise<void>) {
    this.#host = host
    this.#metadata = metadata
    this.#frees = frees
    this.#flushData = flushData
  }

  /**
   * Makes everything that changed before the call durable. Calls that come while a cycle runs share
   * the next one.
   */
  flush(): Promise<void> {
    if (this.#queued !== undefined) return this.#queued
    const start = (): Promise<void> => {
      this.#queued = undefined
      return this.#cycle()
    }
    this.#queued = this.#running.then(start, start)
    this.#running = this.#queued
    return this.#queued
  }

  async #cycle(): Promise<void> {
    const freed = this.#frees.take()
    const stages = this.#takeStages()
    const [blocks, table, l2, l1] = stages
    try {
      await this.#write(blocks)
      for (const stage of [table, l2, l1]) {
        if (stage.pieces.length === 0) continue
        await this.#flushAll()
        await this.#write(stage)
      }
      await this.#flushAll()
    } catch (error) {
      for (const stage of stages) stage.failed()
      this.#frees.restore(freed)
      throw error
    }
    for (const stage of stages) stage.written()
    if (freed.length > 0) this.#frees.release(freed)
  }

  #takeStages(): readonly [Stage, Stage, Stage, Stage] {
    const { refcountBlocks, refcountTable, l2Tables, l1Table } = this.#metadata
    return [refcountBlocks.takeDirty(), takeTable(refcountTable), l2Tables.takeDirty(), takeTable(l1Table)]
  }

  async #write(stage: Stage): Promise<void> {
    if (stage.pieces.length > 0) await this.#host.writeAll(stage.pieces)
  }

  async #flushAll(): Promise<void> {
    await Promise.all([this.#host.flush(), this.#flushData()])
  }
}

function takeTable(table: PointerTable): Stage {
  const pieces = table.takeDirty()
  return { pieces, written: () => undefined, failed: () => table.failed(pieces) }
}
