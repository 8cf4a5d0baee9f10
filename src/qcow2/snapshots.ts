/**
 * The internal snapshots of an image: the collection users see. Owns names and handles; the order of
 * writes is in `snapshot-operations.ts`.
 */
import type { CallOptions } from '../block/device.ts'
import { Qcow2Error } from '../core/errors.ts'
import type { Engine } from './engine.ts'
import { vmStateBase } from './geometry.ts'
import { SnapshotDevice } from './snapshot-device.ts'
import {
  addSnapshot,
  applySnapshot,
  assertSnapshotsPossible,
  captureAll,
  deleteSnapshot,
  releaseDisk,
  replaceSnapshots,
} from './snapshot-operations.ts'
import { infoOf, type SnapshotInfo } from './snapshot-info.ts'
import { readSnapshotL1 } from './snapshot-list.ts'
import type { SnapshotRecord } from './snapshot-table.ts'
import { assertSnapshotName, detailsOf, SnapshotWriter, type FinishOptions } from './snapshot-writer.ts'

/** Options of {@link Snapshots.create}. */
export interface CreateSnapshotOptions extends FinishOptions, CallOptions {
  /** Not empty. */
  readonly name: string
  /** The VM state to store with the snapshot: the bytes of a migration stream. */
  readonly vmState?: AsyncIterable<Uint8Array> | Iterable<Uint8Array> | undefined
}

/** Options of {@link Snapshots.begin}. */
export interface BeginSnapshotOptions extends CallOptions {
  readonly name: string
  /** Most requests for VM state in flight. Default 4. */
  readonly depth?: number | undefined
}

/**
 * The internal snapshots of an image. Iterates, oldest first, without I/O.
 *
 * Aborting `signal` undoes what `create`, `finish` and `apply` have done so far, until they write the new
 * table; from then on, and `delete` once it has begun, they complete, for half of it would be leaks.
 */
export class Snapshots implements Iterable<SnapshotInfo> {
  readonly #engine: Engine
  #closed = false

  /** @internal Made by the image. */
  constructor(engine: Engine) {
    this.#engine = engine
  }

  /** Number of snapshots. */
  get count(): number {
    return this.#engine.snapshots.length
  }

  /** The snapshots, oldest first. */
  *[Symbol.iterator](): Iterator<SnapshotInfo> {
    for (const record of this.#engine.snapshots) yield infoOf(record)
  }

  /** The snapshot with this id, else the first with this name; undefined if there is none. */
  find(idOrName: string): SnapshotInfo | undefined {
    const record = this.#find(idOrName)
    return record === undefined ? undefined : infoOf(record)
  }

  /**
   * Takes a snapshot of the disk, and of VM state where it is given: that is stored first, while the
   * disk may be written; the disk is taken as it is at the end of it. Several snapshots may have one name, as
   * in QEMU: the `id` of the result tells them apart.
   * @throws TypeError without a name; Qcow2Error `ERR_RANGE` if refcounts are too narrow for one more reference, `ERR_UNSUPPORTED`
   * with an external data file, `ERR_READ_ONLY`.
   */
  async create(options: CreateSnapshotOptions): Promise<SnapshotInfo> {
    this.#assertWritable(options)
    if (options.vmState !== undefined) return this.#createWithState(options, options.vmState)
    const engine = this.#engine
    const details = detailsOf(options.name, options)
    return engine.requests.exclusive(async () => {
      const disk = await captureAll(engine, options.signal)
      try {
        return infoOf(await addSnapshot(engine, details, disk, undefined))
      } catch (error) {
        await releaseDisk(engine, disk)
        throw error
      }
    })
  }

  async #createWithState(options: CreateSnapshotOptions, state: AsyncIterable<Uint8Array> | Iterable<Uint8Array>): Promise<SnapshotInfo> {
    const writer = await this.begin(options)
    try {
      for await (const bytes of state) await writer.write(bytes)
      return await writer.finish(options)
    } finally {
      await writer.close()
    }
  }

  /**
   * Begins a snapshot whose VM state is written piece by piece, while the image goes on being used, and
   * while other snapshots are being written. Until it is finished the image does not know it.
   */
  async begin(options: BeginSnapshotOptions): Promise<SnapshotWriter> {
    this.#assertWritable(options)
    const engine = this.#engine
    return engine.requests.run(async () => {
      if (engine.unchanged) await engine.change()
      this.#assertWritable(options)
      return new SnapshotWriter(engine, options.name, { depth: options.depth, signal: options.signal })
    })
  }

  /**
   * Makes the disk what it was at the snapshot, its size too. What was written since and is in no
   * snapshot is gone. Aborting `signal` while the snapshot's clusters are being counted leaves the disk as it was;
   * after that, from the new L1 table on, it goes through.
   * @throws Qcow2Error `ERR_NOT_FOUND`
   */
  async apply(idOrName: string, options: CallOptions = {}): Promise<void> {
    this.#assertWritable(options)
    const engine = this.#engine
    await engine.requests.exclusive(() => applySnapshot(engine, this.#get(idOrName), options.signal))
  }

  /**
   * Deletes a snapshot and frees what only it held. `signal` is looked at before it begins: stopped half-way it
   * would leave clusters that nothing frees, so from then on it goes through.
   * @throws Qcow2Error `ERR_NOT_FOUND`, or `ERR_BUSY` while it is open.
   */
  async delete(idOrName: string, options: CallOptions = {}): Promise<void> {
    this.#assertWritable(options)
    const engine = this.#engine
    await engine.requests.exclusive(async () => {
      options.signal?.throwIfAborted()
      const record = this.#get(idOrName)
      if (engine.snapshotHolds.isOpen(record.id)) throw new Qcow2Error('ERR_BUSY', `snapshot ${record.name} is open; close it first`)
      await deleteSnapshot(engine, record)
    })
  }

  /** Gives a snapshot another name. */
  async rename(idOrName: string, name: string, options: CallOptions = {}): Promise<void> {
    this.#assertWritable(options)
    assertSnapshotName(name)
    const engine = this.#engine
    await engine.requests.exclusive(async () => {
      options.signal?.throwIfAborted()
      assertSnapshotsPossible(engine)
      const record = this.#get(idOrName)
      if (engine.unchanged) await engine.change()
      const renamed = { ...record, name }
      await replaceSnapshots(engine, engine.snapshots.map((each) => (each === record ? renamed : each)))
    })
  }

  /** The snapshot's disk, read-only, with its VM state as `.vmState`. Close it when done. */
  async open(idOrName: string, options: CallOptions = {}): Promise<SnapshotDevice> {
    this.#assertOpen(options)
    const engine = this.#engine
    return engine.requests.run(async () => {
      options.signal?.throwIfAborted()
      const record = this.#get(idOrName)
      const release = engine.snapshotHolds.open(record.id)
      try {
        const l1 = await readSnapshotL1(engine.host, record, engine.geometry.clusterSize)
        const disk = record.diskSize ?? engine.header.size
        const sizes = { disk, vmState: record.vmStateSize, vmStateBase: vmStateBase(engine.geometry, disk) }
        return new SnapshotDevice(engine, { l1, backing: engine.backing }, sizes, release)
      } catch (error) {
        release()
        throw error
      }
    })
  }

  /** @internal Waits for snapshots that are being finished, and gives up the others. */
  async close(): Promise<void> {
    this.#closed = true
    const closing = [...this.#engine.snapshotHolds.unfinished].map((writer) => writer.close())
    const failed = (await Promise.allSettled(closing)).find(({ status }) => status === 'rejected')
    if (failed?.status === 'rejected') throw failed.reason
  }

  #find(idOrName: string): SnapshotRecord | undefined {
    const { snapshots } = this.#engine
    return snapshots.find(({ id }) => id === idOrName) ?? snapshots.find(({ name }) => name === idOrName)
  }

  #get(idOrName: string): SnapshotRecord {
    const record = this.#find(idOrName)
    if (record !== undefined) return record
    const names = this.#engine.snapshots.slice(0, 20).map(({ id, name }) => name || `number ${id}`).join(', ')
    throw new Qcow2Error('ERR_NOT_FOUND', `the image has no snapshot ${JSON.stringify(idOrName)}; it has ${names === '' ? 'none' : names}`)
  }

  #assertOpen(options: CallOptions): void {
    options.signal?.throwIfAborted()
    if (this.#closed) throw new Qcow2Error('ERR_CLOSED', 'the image is closed')
  }

  #assertWritable(options: CallOptions): void {
    this.#assertOpen(options)
    if (this.#engine.readOnly) throw new Qcow2Error('ERR_READ_ONLY', 'the image is open read-only; open it for writing')
    assertSnapshotsPossible(this.#engine)
  }
}
