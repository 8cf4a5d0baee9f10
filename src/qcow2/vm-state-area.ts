/**
 * Host clusters for the VM state of a snapshot that is being written: an append-only area of its own,
 * independent of the active layer and of other areas. Owns where each of its clusters is; knows
 * nothing of the stream.
 *
 * While it is written only counters change, and nothing on disk refers to the clusters: a crash leaves
 * leaked clusters. Data goes out in large contiguous requests without any metadata write between.
 */
import type { WriteSink } from '../block/write-queue.ts'
import { UnsupportedError } from '../core/errors.ts'
import type { Engine } from './engine.ts'
import { InFlight } from '../core/in-flight.ts'
import { copiedFlag, offsetHigh, offsetLow } from './l2-entry.ts'
import { vmStateBase } from './geometry.ts'
import type { HeldSpace } from './snapshot-holds.ts'
import { writeData } from './write.ts'
import type { StoredVmState } from './snapshot-operations.ts'

/** Contiguous clusters of the area. */
interface Run {
  /** First cluster, counted from the start of the area. */
  readonly first: number
  /** Host offset in bytes. */
  readonly host: number
  clusters: number
}

/**
 * Bytes allocated ahead at most, so that guest writes in between do not scatter the area. Never more than the area
 * has already: what is not used in the end stays behind as a hole in the file.
 */
const reserveBytes = 16 << 20

export class VmStateArea implements WriteSink {
  readonly alignment: number
  readonly #engine: Engine
  readonly #guestBase: number
  readonly #runs: Run[] = []
  /** Offsets of L2 tables written by `finish`. */
  readonly #tables: number[] = []
  /** Clusters that have a place. */
  #placed = 0
  #reserve = { offset: 0, clusters: 0 }
  #placing: Promise<void> = Promise.resolve()

  constructor(engine: Engine) {
    this.#engine = engine
    this.alignment = engine.geometry.clusterSize
    this.#guestBase = vmStateBase(engine.geometry, engine.header.size)
  }

  /** Stores whole clusters at an offset in the area; the same cluster may be stored again. */
  submit(offset: number, bytes: Uint8Array): Promise<void> {
    return this.#engine.requests.run(() => this.#store(offset, bytes))
  }

  /** The counters of what was stored follow the data at the next flush. */
  flush(): Promise<void> {
    return this.#engine.flush()
  }

  #store(offset: number, bytes: Uint8Array): Promise<void> {
    const { clusterSize } = this.#engine.geometry
    const end = (offset + bytes.length) / clusterSize
    this.#placing = this.#placing.then(() => (end > this.#placed ? this.#place(end) : undefined))
    return this.#placing.then(() => this.#write(offset / clusterSize, bytes))
  }

  async #place(end: number): Promise<void> {
    const { clusterSize } = this.#engine.geometry
    while (this.#placed < end) {
      const reserve = this.#reserve
      if (reserve.clusters === 0) {
        const wanted = Math.max(end - this.#placed, Math.min(this.#placed, Math.ceil(reserveBytes / clusterSize)))
        const { offset, clusters } = await this.#engine.allocator.allocate(wanted)
        this.#reserve = { offset, clusters }
        continue
      }
      const taken = Math.min(reserve.clusters, end - this.#placed)
      const last = this.#runs[this.#runs.length - 1]
      if (last !== undefined && last.host + last.clusters * clusterSize === reserve.offset) last.clusters += taken
      else this.#runs.push({ first: this.#placed, host: reserve.offset, clusters: taken })
      this.#reserve = { offset: reserve.offset + taken * clusterSize, clusters: reserve.clusters - taken }
      this.#placed += taken
    }
  }

  /** One request for each run the clusters lie in: nearly always one. */
  #write(first: number, bytes: Uint8Array): Promise<void> {
    const { clusterSize } = this.#engine.geometry
    let index = this.#runs.length - 1
    while (this.#runs[index]!.first > first) index--
    const run = this.#runs[index]!
    const host = run.host + (first - run.first) * clusterSize
    const guest = this.#guestBase + first * clusterSize
    const left = (run.first + run.clusters - first) * clusterSize
    if (bytes.length <= left) return writeData(this.#engine, guest, host, bytes)
    const writes = new InFlight()
    writes.add(writeData(this.#engine, guest, host, bytes.subarray(0, left)))
    writes.add(this.#write(first + left / clusterSize, bytes.subarray(left)))
    return writes.settle()
  }

  /**
   * Writes the L2 tables for a state of `size` bytes, behind a disk of `diskSize`, and gives back what was reserved and
   * not used.
   */
  async finish(size: number, diskSize: number): Promise<StoredVmState> {
    const engine = this.#engine
    // where the state is in the guest does not matter until then, except to this cipher
    if (engine.header.cryptMethod === 'aes' && size > 0 && vmStateBase(engine.geometry, diskSize) !== this.#guestBase) {
      throw new UnsupportedError('legacy AES encryption ties VM state to the size of the disk, which changed meanwhile; take the snapshot again', ['encryption aes'])
    }
    const { clusterSize, l2Entries } = engine.geometry
    this.#giveBackReserve()
    const bytes = engine.host.allocate(clusterSize)
    for (let first = 0; first * clusterSize < size; first += l2Entries) {
      this.#fillTable(bytes, first)
      const { offset } = await engine.allocator.allocateContiguous(1)
      this.#tables.push(offset)
      engine.l2Tables.forget(offset, clusterSize)
      await engine.host.write(offset, bytes)
    }
    return { tables: this.#tables, size }
  }

  /** The L2 table for the clusters from `first` on. */
  #fillTable(bytes: Uint8Array, first: number): void {
    const { clusterSize, l2Entries, l2EntrySize, extendedL2 } = this.#engine.geometry
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
    bytes.fill(0)
    for (const run of this.#runs) {
      const from = Math.max(first, run.first)
      const to = Math.min(first + l2Entries, run.first + run.clusters)
      for (let cluster = from; cluster < to; cluster++) {
        const host = run.host + (cluster - run.first) * clusterSize
        const at = (cluster - first) * l2EntrySize
        view.setUint32(at, offsetHigh(host) + copiedFlag)
        view.setUint32(at + 4, offsetLow(host))
        if (extendedL2) view.setUint32(at + 12, 0xffff_ffff)
      }
    }
  }

  /** What the area holds, as long as no snapshot names it. Nothing may be in flight. */
  held(): Pick<HeldSpace, 'tables' | 'data'> {
    const { clusterSize } = this.#engine.geometry
    const runs = [...this.#runs.map(({ host, clusters }) => ({ offset: host, clusters })), this.#reserve]
    return { tables: this.#tables, data: runs.map(({ offset, clusters }) => ({ offset, length: clusters * clusterSize })) }
  }

  /** Gives everything back. Nothing may be in flight. */
  async discard(): Promise<void> {
    await this.#placing.catch(() => undefined)
    const { allocator, geometry } = this.#engine
    this.#giveBackReserve()
    for (const { host, clusters } of this.#runs.splice(0)) allocator.free(host, clusters * geometry.clusterSize)
    for (const offset of this.#tables.splice(0)) allocator.free(offset, geometry.clusterSize)
  }

  #giveBackReserve(): void {
    const { offset, clusters } = this.#reserve
    if (clusters > 0) this.#engine.allocator.free(offset, clusters * this.#engine.geometry.clusterSize)
    this.#reserve = { offset: 0, clusters: 0 }
  }
}
