/**
 * Saves a running VM through its monitor. Owns the order of commands, when the guest may run again, and
 * that a failure leaves the VM as it was; where the state is kept is a {@link SaveSink}'s business.
 *
 * ```
 *  background, without disks         background, with disks          stop
 *  migrate                           stop                            stop
 *    (QEMU stops the guest for         snapshot of the disks           snapshot of the disks
 *    a moment by itself)               migrate                         migrate
 *  … pages …                           first page section: cont        … pages …
 *                                    … pages …                       end of stream: cont
 * ```
 *
 * When the first page section of a background snapshot has arrived, memory is write-protected: the guest
 * may run, and its writes wait for the old content to be saved. QEMU's event `active` is too early for that.
 */
import type { CallOptions } from '../block/device.ts'
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import type { Qmp } from '../qmp/client.ts'
import type { DuplexStream } from '../qmp/duplex.ts'
import { capture } from './capture.ts'
import { ChunkReader } from './chunk-reader.ts'
import { freezeDisks, savedDisks, thawDisks, type DiskSnapshot, type FrozenDisk } from './disk-snapshots.ts'
import { machineFacts } from './machine-facts.ts'
import { makeManifest, type Manifest } from './manifest.ts'
import { notWithBackgroundSnapshot, withMigrationSettings, type MigrationSettings } from './migration-settings.ts'
import { connectMigration, isOver, migrationEnded, migrationFailed, type MigrationReceiver } from './outgoing-migration.ts'
import type { SaveSink } from './save-sink.ts'
import { MigrationListener } from './socket.ts'
import { StopClock } from './stop-clock.ts'
import type { StreamSummary } from './stream-check.ts'
import { disksOf } from './vm-disks.ts'

/**
 * How the guest's memory is read: `background` while it runs on, write-protected; `stop` while it stands
 * still; `precopy` while it runs, with changed pages sent again and a stop at the end.
 */
export type SaveMode = 'background' | 'stop' | 'precopy'

/** Options of {@link saveTo}. */
export interface SaveToOptions extends CallOptions {
  /** Default `background`. */
  readonly mode?: SaveMode | undefined
  /** What to do where QEMU or the host refuses a background snapshot; default: fail and say why. */
  readonly fallback?: 'stop' | 'precopy' | undefined
  /** Disks to freeze at the same instant. */
  readonly disks?: readonly DiskSnapshot[] | undefined
  /** What the manifest says of the sink. */
  readonly memory?: Manifest['memory'] | undefined
  /** Where QEMU connects to; default a unix socket in a new folder. */
  readonly receiver?: MigrationReceiver | undefined
  /** Milliseconds QEMU may take to report completion after the stream has ended; default 30 000. */
  readonly timeout?: number | undefined
  /** Bytes received so far; how many will come is not known. */
  readonly onProgress?: ((progress: { readonly done: number }) => void) | undefined
}

/** What a save did. */
export interface SaveReport {
  readonly mode: SaveMode
  readonly summary: StreamSummary
  readonly manifest: Manifest
  /** Milliseconds the guest stood still, by the timestamps of QEMU's events; 0 if it was paused before. */
  readonly stoppedFor: number
  /** Milliseconds in all. */
  readonly took: number
}

/** VMs that are being saved, by their monitors. */
const saving = new WeakSet<Qmp>()

/** No limit on the bandwidth, in bytes a second. */
const unlimited = 2 ** 40

/**
 * Saves the VM's memory and device state into `sink`. The guest goes on as it was, running or paused.
 *
 * It succeeds only if the stream ended cleanly with a matching VM description, QEMU reports completion, and
 * QEMU counts as many pages as arrived. Otherwise the sink is aborted, frozen disks are merged back, the
 * guest is set running if it was, and the error says what happened.
 *
 * @throws QmpError (`ERR_QMP`) where QEMU refuses, FormatError (`ERR_STREAM`) for an incomplete stream, `ERR_BUSY`
 *   while the VM is being saved or migrated already.
 */
export async function saveTo(qmp: Qmp, sink: SaveSink, options: SaveToOptions = {}): Promise<SaveReport> {
  options.signal?.throwIfAborted()
  if (saving.has(qmp)) throw await busy(sink, 'it is being saved')
  saving.add(qmp)
  try {
    return await attemptSave(qmp, sink, options)
  } finally {
    saving.delete(qmp)
  }
}

async function attemptSave(qmp: Qmp, sink: SaveSink, options: SaveToOptions): Promise<SaveReport> {
  const { status } = await qmp.execute('query-migrate')
  if (!isOver(status)) throw await busy(sink, `QEMU reports migration ${String(status)}`)
  const { mode = 'background', fallback } = options
  const attempt = new Attempt(qmp, sink, options)
  try {
    return await attempt.run(mode)
  } catch (error) {
    const refused = mode === 'background' && !attempt.started && Qcow2Error.is(error, 'ERR_QMP')
    if (refused && fallback !== undefined) return new Attempt(qmp, sink, options).run(fallback)
    if (!attempt.captured) await sink.abort(error)
    if (!refused) throw error
    const help = `no background snapshot of this VM: ${error.message}; ask for the fallback 'stop' or 'precopy', or see doctor()`
    throw new Qcow2Error('ERR_QMP', help, { cause: error })
  }
}

/** Two at once would undo each other's settings. */
async function busy(sink: SaveSink, why: string): Promise<Qcow2Error> {
  const error = new Qcow2Error('ERR_BUSY', `the VM cannot be saved now: ${why}; wait until that has ended`)
  await sink.abort(error)
  return error
}

/** One try with one mode. */
class Attempt {
  /** QEMU took the command to migrate. */
  started = false
  /** The sink has been finished or aborted. */
  captured = false
  readonly #qmp: Qmp
  readonly #sink: SaveSink
  readonly #options: SaveToOptions
  #disks: FrozenDisk[] = []
  #stopped = false

  constructor(qmp: Qmp, sink: SaveSink, options: SaveToOptions) {
    this.#qmp = qmp
    this.#sink = sink
    this.#options = options
  }

  async run(mode: SaveMode): Promise<SaveReport> {
    const began = performance.now()
    const { running, status } = await this.#qmp.execute('query-status')
    const facts = await machineFacts(this.#qmp)
    const { qemu } = facts.qemu
    // QEMU 7.2 starts a paused guest after a background snapshot, 10.0 leaves it paused. Memory that does not change
    // needs no protection anyway.
    if (!running && mode !== 'stop' && qemu.major < 10) return this.run('stop')
    if (mode === 'precopy' && facts.accelerator === 'tcg' && qemu.major < 8) {
      throw new UnsupportedError(`QEMU ${qemu.major}.${qemu.minor} without KVM loses changed pages in a live precopy; use mode 'background' or 'stop'`)
    }
    const all = await disksOf(this.#qmp)
    const clock = new StopClock(this.#qmp)
    try {
      const summary = await withMigrationSettings(this.#qmp, this.#settings(mode), () => this.#migrate(mode, running))
      const memory = this.#options.memory ?? { kind: 'stream' }
      const manifest = makeManifest(summary, { ...facts, memory, disks: await savedDisks(all, this.#disks), status })
      return { mode, summary, manifest, stoppedFor: await clock.stoppedFor(running), took: performance.now() - began }
    } finally {
      await clock.close()
    }
  }

  #settings(mode: SaveMode): MigrationSettings {
    const off = Object.fromEntries([...notWithBackgroundSnapshot, 'background-snapshot'].map((name) => [name, false]))
    const pause = mode === 'precopy' && this.#diskSnapshots.length > 0
    return {
      capabilities: {
        ...off,
        'events': true,
        ...(mode === 'background' && { 'background-snapshot': true }),
        ...(pause && { 'pause-before-switchover': true }),
      },
      parameters: { 'max-bandwidth': unlimited },
    }
  }

  get #diskSnapshots(): readonly DiskSnapshot[] {
    return this.#options.disks ?? []
  }

  async #migrate(mode: SaveMode, running: boolean): Promise<StreamSummary> {
    const own = this.#options.receiver === undefined ? await MigrationListener.open() : undefined
    const receiver = this.#options.receiver ?? own!
    const events = this.#qmp.events('MIGRATION')
    let reader: ChunkReader | undefined
    let stream: DuplexStream | undefined
    try {
      this.#stopped = running && (mode === 'stop' || (mode === 'background' && this.#diskSnapshots.length > 0))
      if (this.#stopped) await this.#qmp.execute('stop')
      if (mode !== 'precopy') this.#disks = await freezeDisks(this.#qmp, this.#diskSnapshots)
      // a background snapshot has to be read to its end, see #undo: without its connection it could not be
      const onStarted = (): void => void (this.started = true)
      stream = await connectMigration(this.#qmp, receiver, { onStarted, signal: mode === 'background' ? undefined : this.#options.signal })
      // A QEMU that hangs says nothing on either connection.
      reader = new ChunkReader(stream, { after: 2_000, ask: () => this.#qmp.execute('query-status') })
      const switching = mode === 'precopy' && this.#diskSnapshots.length > 0 ? this.#freezeAtSwitchover(events) : undefined
      switching?.catch(() => stream?.destroy())
      const summary = await this.#receive(mode, running, reader)
      await switching
      return summary
    } catch (error) {
      await this.#undo(mode, running, reader, error)
      throw error
    } finally {
      stream?.destroy()
      await events.return?.()
      await own?.close()
    }
  }

  /** All of memory has left the guest when QEMU confirms it: the guest may run while the rest is made durable. */
  #receive(mode: SaveMode, running: boolean, reader: ChunkReader): Promise<StreamSummary> {
    this.captured = true
    const { signal, onProgress } = this.#options
    return capture(reader, this.#sink, {
      signal,
      onProgress,
      onFirstPages: () => (mode === 'background' && this.#stopped ? this.#resume(true) : undefined),
      accept: async (whole) => {
        await this.#confirm(whole)
        await this.#resume(running)
      },
    })
  }

  /** QEMU must say the same as the stream. */
  async #confirm(summary: StreamSummary): Promise<void> {
    const info = await migrationEnded(this.#qmp, this.#options.timeout ?? 30_000)
    if (info.status !== 'completed') throw migrationFailed(info)
    const counted = (info.ram?.normal ?? 0) + (info.ram?.duplicate ?? 0)
    const arrived = summary.pages.data + summary.pages.zero
    if (counted === arrived) return
    throw new Qcow2Error('ERR_STREAM', `QEMU counts ${counted} pages, ${arrived} have arrived: the saved memory is incomplete`)
  }

  /** A live precopy stops the guest by itself; the disks are frozen between that and the last pages. */
  async #freezeAtSwitchover(events: ReturnType<Qmp['events']>): Promise<void> {
    for await (const { data } of events) {
      const status = data?.['status']
      if (status === 'failed' || status === 'cancelled') return
      if (status !== 'pre-switchover') continue
      this.#disks = await freezeDisks(this.#qmp, this.#diskSnapshots)
      await this.#qmp.execute('migrate-continue', { state: 'pre-switchover' })
      return
    }
  }

  async #resume(running: boolean): Promise<void> {
    if (!running) return
    const status = await this.#qmp.execute('query-status')
    if (!status.running) await this.#qmp.execute('cont')
  }

  /**
   * The VM is to be what it was. A background snapshot is read to its end, never cancelled: QEMU 7.2 leaves memory
   * write-protected when one fails, and the guest hangs at its next write.
   */
  async #undo(mode: SaveMode, running: boolean, reader: ChunkReader | undefined, cause: unknown): Promise<void> {
    const failures: unknown[] = []
    const step = (task: () => Promise<unknown>): Promise<unknown> => task().catch((error: unknown) => failures.push(error))
    if (this.started) {
      // a connection that broke has nothing more to read
      if (mode === 'background' && reader !== undefined) await reader.drain().catch(() => undefined)
      else await step(() => this.#qmp.execute('migrate_cancel'))
      await step(() => migrationEnded(this.#qmp, 10_000))
    }
    await step(() => this.#resume(running))
    await step(() => thawDisks(this.#qmp, this.#disks))
    this.#disks = []
    if (failures.length === 0) return
    const words = failures.map((failure) => (failure instanceof Error ? failure.message : String(failure))).join('; ')
    const first = cause instanceof Error ? cause.message : String(cause)
    throw new Qcow2Error('ERR_QMP', `save failed (${first}), and the VM could not be set back: ${words}`, { cause })
  }
}
