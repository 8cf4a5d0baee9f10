/**
 * Saves a VM through its monitor, whatever it does. Owns what is refused before anything happens, and which way is taken: a
 * guest that runs is migrated (running-save.ts), one that stands still is read as it stands (standing-save.ts). Where the state
 * is kept is a {@link SaveSink}'s business.
 */
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import type { Qmp } from '../qmp/client.ts'
import { QmpError } from '../qmp/error.ts'
import { capture } from './capture.ts'
import { chooseDisks } from './choose-disks.ts'
import { DiskSnapshots } from './disk-snapshots.ts'
import { temporaryFolder } from './host-scratch.ts'
import { machineFacts, sendsVmDescription } from './machine-facts.ts'
import { makeManifest } from './manifest.ts'
import { settingsOf, withMigrationSettings } from './migration-settings.ts'
import { isOver } from './outgoing-migration.ts'
import { savableState } from './run-state.ts'
import { BackgroundRefused, GuestStopped, RunningSave } from './running-save.ts'
import type { SaveSink } from './save-sink.ts'
import type { SaveMode, SaveReport, SaveTask, SaveToOptions } from './save-task.ts'
import { removeLeftovers, standingStream } from './standing-save.ts'
import { StopClock } from './stop-clock.ts'
import type { StreamSummary } from './stream-check.ts'

/** VMs that are being saved, by their monitors. */
const saving = new WeakSet<Qmp>()

/**
 * Saves the VM's memory and device state into `sink`. The VM is afterwards in the run state it was in before: a running guest
 * runs, one that stands still (`paused`, `io-error`, `suspended`, `shutdown`, …) has not executed an instruction.
 *
 * It succeeds only if the stream ended cleanly with a matching VM description, with memory for every RAM block, QEMU reports
 * completion, and QEMU counts as many pages as arrived. Otherwise the sink is aborted, frozen disks are merged back, the
 * guest is set running if it was, and the error says what happened.
 *
 * @throws QmpError (`ERR_QMP`) where QEMU refuses, FormatError (`ERR_STREAM`) for an incomplete stream, `ERR_BUSY`
 *   while the VM is being saved or migrated already or is in a state in which there is nothing to save; UnsupportedError if it
 *   has writable disks and `disks` says nothing of them, `ERR_NOT_FOUND` for a disk it has not, `ERR_EXISTS` for an overlay
 *   that is there already.
 */
export async function saveTo(qmp: Qmp, sink: SaveSink, options: SaveToOptions = {}): Promise<SaveReport> {
  options.signal?.throwIfAborted()
  const began = performance.now()
  const once = abortedOnce(sink)
  try {
    if (saving.has(qmp)) throw new Qcow2Error('ERR_BUSY', 'the VM cannot be saved now: it is being saved; wait until that has ended')
    saving.add(qmp)
    try {
      return { ...(await saveNow(qmp, once, options)), took: performance.now() - began }
    } finally {
      saving.delete(qmp)
    }
  } catch (failure) {
    const error = asBusy(failure)
    await once.abort(error)
    throw error
  }
}

/** Another migration may begin after it was looked whether there is one. */
function asBusy(error: unknown): unknown {
  if (!(error instanceof QmpError) || !/migration process in progress/i.test(error.desc ?? '')) return error
  return new Qcow2Error('ERR_BUSY', `the VM cannot be saved now: ${error.message}; wait until that has ended`, { cause: error })
}

async function saveNow(qmp: Qmp, sink: SaveSink, options: SaveToOptions): Promise<Omit<SaveReport, 'took'>> {
  const { status: migration } = await qmp.execute('query-migrate')
  if (!isOver(migration)) throw new Qcow2Error('ERR_BUSY', `the VM cannot be saved now: QEMU reports migration ${String(migration)}; wait until that has ended`)
  const { running, status } = await savableState(qmp)
  await removeLeftovers(qmp)
  const facts = await machineFacts(qmp)
  const disks = new DiskSnapshots(qmp, await chooseDisks(qmp, options.disks))
  const vmDescription = (await sendsVmDescription(qmp)) ? 'required' : 'optional'
  const task: SaveTask = { qmp, sink, options, facts, running, disks, vmDescription }
  const clock = new StopClock(qmp)
  try {
    const { mode, summary } = await bestWay(task, status)
    const memory = options.memory ?? { kind: 'stream' }
    const manifest = makeManifest(summary, { ...facts, memory, disks: await disks.describe(), status })
    return { mode, summary, manifest, stoppedFor: await clock.stoppedFor(running) }
  } finally {
    await clock.close()
  }
}

interface Saved {
  readonly mode: SaveMode
  readonly summary: StreamSummary
}

async function bestWay(task: SaveTask, status: string): Promise<Saved> {
  const { mode = 'background', fallback } = task.options
  const { qemu } = task.facts.qemu
  // QEMU 10.0 leaves a paused guest paused after a background snapshot, 7.2 starts it; no QEMU takes one in other states
  if (!task.running && !(status === 'paused' && mode === 'background' && qemu.major >= 10)) return standing(task)
  if (mode === 'precopy' && task.facts.accelerator === 'tcg' && qemu.major < 8) {
    throw new UnsupportedError(`QEMU ${qemu.major}.${qemu.minor} without KVM loses changed pages in a live precopy; use mode 'background' or 'stop'`)
  }
  try {
    return await live(task, mode)
  } catch (error) {
    if (error instanceof GuestStopped) return standing(task)
    if (!(error instanceof BackgroundRefused)) throw error
    if (!task.running) return standing(task)
    if (fallback !== undefined) return live(task, fallback)
    const help = `no background snapshot of this VM: ${error.message}; ask for the fallback 'stop' or 'precopy', or see doctor()`
    throw new Qcow2Error('ERR_QMP', help, { cause: error })
  }
}

async function live(task: SaveTask, mode: SaveMode): Promise<Saved> {
  return { mode, summary: await new RunningSave(task, mode).run() }
}

/** The VM is not touched: nothing has to be undone but the disks. */
async function standing({ qmp, sink, options, disks, vmDescription }: SaveTask): Promise<Saved> {
  const { signal, onProgress, scratch = temporaryFolder() } = options
  try {
    await disks.freeze()
    const stream = (): Promise<StreamSummary> => capture(standingStream(qmp, { folder: scratch, signal }), sink, { signal, onProgress, vmDescription })
    return { mode: 'stop', summary: await withMigrationSettings(qmp, settingsOf('stop'), stream) }
  } catch (error) {
    await disks.thawAfter(error)
    throw error
  }
}

/** `sink`, aborted once, whoever does it. */
function abortedOnce(sink: SaveSink): SaveSink {
  let over = false
  return {
    ...(sink.write !== undefined && { write: (bytes) => sink.write?.(bytes) }),
    ...(sink.record !== undefined && { record: (record) => sink.record?.(record) }),
    settle: () => sink.settle?.(),
    finish: async (summary) => {
      await sink.finish(summary)
      over = true
    },
    abort: async (reason) => {
      if (over) return
      over = true
      await sink.abort(reason)
    },
  }
}
