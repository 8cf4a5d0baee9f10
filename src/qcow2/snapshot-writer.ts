/**
 * A snapshot under construction: VM state goes into an area of its own while the active layer is
 * written, and several snapshots may be under construction at once. Until `finish` no structure of the
 * image refers to it: a crash leaves a clean image without it, and leaked clusters.
 */
import type { CallOptions } from '../block/device.ts'
import { AlignedWriteQueue } from '../block/write-queue.ts'
import { Qcow2Error } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import type { Engine } from './engine.ts'
import type { HeldSpace, UnfinishedSnapshot } from './snapshot-holds.ts'
import { addSnapshot, captureDisk, releaseDisk, type CapturedDisk, type SnapshotDetails } from './snapshot-operations.ts'
import { infoOf, type SnapshotInfo } from './snapshot-info.ts'
import { VmStateArea } from './vm-state-area.ts'

/** What is recorded with a snapshot. */
export interface FinishOptions {
  /** Default now. */
  readonly date?: Date | undefined
  /** The part of the date below a second, in nanoseconds; default that of `date`. */
  readonly dateNanoseconds?: number | undefined
  /** How long the guest had run, in nanoseconds. Default 0. */
  readonly vmClock?: bigint | undefined
  /** Instruction count; default: not recorded. */
  readonly icount?: bigint | undefined
}

interface WriterOptions extends CallOptions {
  readonly depth: number | undefined
}

/** The fields of the snapshot table for what the caller gave. */
export function detailsOf(name: string, options: FinishOptions): SnapshotDetails {
  const milliseconds = (options.date ?? new Date()).getTime()
  const dateSeconds = Math.floor(milliseconds / 1000)
  if (!(dateSeconds >= 0 && dateSeconds < 2 ** 32)) throw new RangeError('date must be from 1970 to 2106')
  assertSnapshotName(name)
  return {
    name,
    dateSeconds,
    dateNanoseconds: options.dateNanoseconds ?? (milliseconds - dateSeconds * 1000) * 1e6,
    vmClockNanoseconds: options.vmClock ?? 0n,
    icount: options.icount,
  }
}

/** The format allows a snapshot without a name; nobody could then ask for it by one. */
export function assertSnapshotName(name: string): void {
  if (typeof name !== 'string' || name === '' || name.includes('\0')) throw new TypeError('a snapshot needs a name: a string that is not empty and has no NUL')
}

/** Writes the VM state of one snapshot. Made by `Snapshots.begin`; `close` without `finish` gives up. */
export class SnapshotWriter extends Resource implements UnfinishedSnapshot {
  /** Name of the snapshot to be. */
  readonly name: string
  readonly #engine: Engine
  readonly #signal: AbortSignal | undefined
  readonly #area: VmStateArea
  readonly #queue: AlignedWriteQueue
  #disk: CapturedDisk | undefined
  #finishing: Promise<SnapshotInfo> | undefined

  /** @internal */
  constructor(engine: Engine, name: string, options: WriterOptions) {
    super()
    detailsOf(name, {})
    this.name = name
    this.#engine = engine
    this.#area = new VmStateArea(engine)
    const { depth, signal } = options
    this.#signal = signal
    this.#queue = new AlignedWriteQueue(this.#area, { depth, signal })
    engine.snapshotHolds.unfinished.add(this)
  }

  /** Bytes of VM state taken so far. */
  get position(): number {
    return this.#queue.position
  }

  /**
   * Appends VM state. Returns `undefined` when the bytes are taken and may be changed at once; else a
   * promise that resolves when they are. Rejects with the first error of an earlier write.
   */
  write(bytes: Uint8Array): Promise<void> | undefined {
    this.assertOpen()
    return this.#queue.write(bytes)
  }

  /**
   * Takes the disk of the snapshot as it is now; later writes to the image are not in it. Without this
   * call `finish` takes it.
   */
  async captureDisk(): Promise<void> {
    this.assertOpen()
    const engine = this.#engine
    await engine.requests.exclusive(async () => {
      if (this.#disk !== undefined) throw new Qcow2Error('ERR_EXISTS', 'the disk of this snapshot was taken already')
      this.#disk = await captureDisk(engine, this.#signal)
    })
  }

  /**
   * Completes the snapshot: from now on it is in the image, durably. Every call returns the outcome of the
   * first; one that has begun is waited for when the writer or the image is closed.
   */
  async finish(options: FinishOptions = {}): Promise<SnapshotInfo> {
    this.assertOpen()
    const details = detailsOf(this.name, options)
    return (this.#finishing ??= this.#finish(details))
  }

  async #finish(details: SnapshotDetails): Promise<SnapshotInfo> {
    const engine = this.#engine
    const size = this.#queue.position
    await this.#queue.close()
    return engine.requests.exclusive(async () => {
      const state = await this.#area.finish(size, this.#disk?.size ?? engine.header.size)
      this.#disk ??= await captureDisk(engine, this.#signal)
      const record = await addSnapshot(engine, details, this.#disk, state)
      engine.snapshotHolds.unfinished.delete(this)
      return infoOf(record)
    })
  }

  /** Gives up: what was written is freed. */
  abort(): Promise<void> {
    return this.close()
  }

  /** @internal What a check has to count for this snapshot. */
  held(): HeldSpace {
    const disk = this.#disk
    return { ...this.#area.held(), l1: disk === undefined ? new Uint8Array(0) : disk.l1.subarray(0, disk.entries * 8) }
  }

  protected async onClose(): Promise<void> {
    await this.#finishing?.catch(() => undefined) // whoever called finish gets the error
    await this.#queue.abort()
    await this.#engine.requests.exclusive(() => this.#giveUp())
  }

  async #giveUp(): Promise<void> {
    const engine = this.#engine
    if (!engine.snapshotHolds.unfinished.delete(this) || engine.damage !== undefined) return
    await this.#area.discard()
    if (this.#disk !== undefined) await releaseDisk(engine, this.#disk)
  }
}
