/**
 * Saves a guest that runs, by a migration to ourselves. Owns the order of commands, when the guest may run again, and
 * that a failure leaves the VM as it was.
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
 *
 * A guest that stops by itself while it is saved (`io-error`, `guest-panicked`, …) stays so: only what this save
 * stopped is set running again.
 */
import { Qcow2Error } from '../core/errors.ts'
import type { DuplexStream } from '../qmp/duplex.ts'
import { QmpError } from '../qmp/error.ts'
import type { Qmp } from '../qmp/client.ts'
import { capture } from './capture.ts'
import { ChunkReader } from './chunk-reader.ts'
import { notSetBack } from './disk-snapshots.ts'
import { settingsOf, withMigrationSettings } from './migration-settings.ts'
import { connectMigration, migrationEnded, migrationFailed } from './outgoing-migration.ts'
import { stopGuest } from './run-state.ts'
import type { SaveMode, SaveTask } from './save-task.ts'
import { MigrationListener } from './socket.ts'
import type { StreamSummary } from './stream-check.ts'

/** QEMU or the host cannot make a background snapshot of this VM; nothing has happened. */
export class BackgroundRefused extends Error {}

/** The guest stopped by itself before it could be stopped; nothing has happened. */
export class GuestStopped extends Error {}

/** One try with one mode. */
export class RunningSave {
  readonly #task: SaveTask
  readonly #qmp: Qmp
  readonly #mode: SaveMode
  /** QEMU took the settings. */
  #accepted = false
  /** QEMU took the command to migrate. */
  #started = false
  /** This save has stopped the guest, and not set it running again. */
  #stopped = false

  constructor(task: SaveTask, mode: SaveMode) {
    this.#task = task
    this.#qmp = task.qmp
    this.#mode = mode
  }

  /** @throws BackgroundRefused, GuestStopped: another way may be taken. Whatever else it throws ends the save. */
  async run(): Promise<StreamSummary> {
    const task = (): Promise<StreamSummary> => {
      this.#accepted = true
      return this.#migrate()
    }
    try {
      const pause = this.#mode === 'precopy' && this.#task.disks.wanted
      return await withMigrationSettings(this.#qmp, settingsOf(this.#mode, pause ? ['pause-before-switchover'] : []), task)
    } catch (error) {
      const refused = !this.#accepted && this.#mode === 'background' && error instanceof QmpError && /background.snapshot/i.test(error.desc ?? '')
      throw refused ? new BackgroundRefused(error.message, { cause: error }) : error
    }
  }

  async #migrate(): Promise<StreamSummary> {
    const { options, running, disks } = this.#task
    const own = options.receiver === undefined ? await MigrationListener.open({ qmp: this.#qmp, single: true }) : undefined
    const receiver = options.receiver ?? own!
    const events = this.#qmp.events('MIGRATION')
    let reader: ChunkReader | undefined
    let stream: DuplexStream | undefined
    try {
      if (running && (this.#mode === 'stop' || (this.#mode === 'background' && disks.wanted))) {
        if (!(await stopGuest(this.#qmp))) throw new GuestStopped('the guest has stopped by itself')
        this.#stopped = true
      }
      if (this.#mode !== 'precopy') await disks.freeze()
      // a background snapshot has to be read to its end, see #undo: without its connection it could not be
      const onStarted = (): void => void (this.#started = true)
      stream = await connectMigration(this.#qmp, receiver, { onStarted, signal: this.#mode === 'background' ? undefined : options.signal })
      // A QEMU that hangs says nothing on either connection.
      reader = new ChunkReader(stream, { after: 2_000, ask: () => this.#qmp.execute('query-status') })
      const switching = this.#mode === 'precopy' && disks.wanted ? this.#freezeAtSwitchover(events) : undefined
      switching?.catch(() => stream?.destroy())
      const summary = await this.#receive(reader)
      await switching
      return summary
    } catch (error) {
      await this.#undo(reader, error)
      throw error
    } finally {
      stream?.destroy()
      await events.return?.()
      await own?.close()
    }
  }

  /** All of memory has left the guest when QEMU confirms it: the guest may run while the rest is made durable. */
  #receive(reader: ChunkReader): Promise<StreamSummary> {
    const { signal, onProgress } = this.#task.options
    return capture(reader, this.#task.sink, {
      signal,
      onProgress,
      vmDescription: this.#task.vmDescription,
      // QEMU tells `paused` of a guest that was stopped for this save alone: what it did is to run
      runState: this.#stopped ? 'running' : undefined,
      onFirstPages: () => (this.#mode === 'background' ? this.#resume() : undefined),
      accept: async (whole) => {
        await this.#confirm(whole)
        await this.#resume()
      },
    })
  }

  /** QEMU must say the same as the stream. */
  async #confirm(summary: StreamSummary): Promise<void> {
    const info = await migrationEnded(this.#qmp, this.#task.options.timeout ?? 30_000)
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
      await this.#task.disks.freeze()
      await this.#qmp.execute('migrate-continue', { state: 'pre-switchover' })
      return
    }
  }

  /** Sets the guest running if this save, or the end of its migration, has stopped it. */
  async #resume(): Promise<void> {
    if (!this.#task.running) return
    const { status } = await this.#qmp.execute('query-status')
    if (status === 'postmigrate' || (this.#stopped && status === 'paused')) await this.#qmp.execute('cont')
    this.#stopped = false
  }

  /**
   * The VM is to be what it was. A background snapshot is read to its end, never cancelled: QEMU 7.2 leaves memory
   * write-protected when one fails, and the guest hangs at its next write.
   */
  async #undo(reader: ChunkReader | undefined, cause: unknown): Promise<void> {
    const failures: unknown[] = []
    const step = (task: () => Promise<unknown>): Promise<unknown> => task().catch((error: unknown) => failures.push(error))
    if (this.#started) {
      // a connection that broke has nothing more to read
      if (this.#mode === 'background' && reader !== undefined) await reader.drain().catch(() => undefined)
      else await step(() => this.#qmp.execute('migrate_cancel'))
      await step(() => migrationEnded(this.#qmp, 10_000))
    }
    await step(() => this.#resume())
    await step(() => this.#task.disks.thaw())
    if (failures.length > 0) throw notSetBack(cause, failures)
  }
}
