/**
 * Reads the state of a VM that stands still, for whatever reason, and leaves it in exactly the state it was in.
 *
 * A migration cannot do that. QEMU ends one with `postmigrate`: the state is forgotten, disks are inactive, QEMU 7.2 takes no
 * second migration, a suspended guest cannot be woken; only `cont` leads out of it, which lets the guest run. A background
 * snapshot sets `paused` first, and QEMU aborts where that state cannot follow (`io-error`, `debug`, `shutdown`, …).
 * QEMU's own `snapshot-save` does neither. It needs an image that QEMU can write, so it gets one that is there only for it:
 *
 * ```
 *  make the scratch image ▶ blockdev-add ▶ snapshot-save ▶ blockdev-del ▶ read the stream from it ▶ remove it
 *                           └────────── the VM and its disks are not touched ──────────┘
 * ```
 *
 * The stream is the same as that of a migration. Memory does not change meanwhile: nothing has to be protected.
 */
import type { CallOptions } from '../block/device.ts'
import { Qcow2Error } from '../core/errors.ts'
import { Qcow2Image } from '../qcow2/image.ts'
import type { Qmp } from '../qmp/client.ts'
import { QmpError } from '../qmp/error.ts'
import { makeScratchFile } from './host-scratch.ts'
import { loadVmState } from './vm-state-snapshot.ts'

/** Begin of the names that nodes and jobs have which are there only for a save. */
const ours = 'qcow2-save-'

/** Name of the snapshot in the scratch image. */
const tag = 'state'

/** Options of {@link standingStream}. */
export interface StandingOptions extends CallOptions {
  /** Folder for the scratch image, which gets as large as the guest's memory; QEMU must be able to write there. */
  readonly folder: string
}

/**
 * The migration stream of a VM that stands still. QEMU writes all of it before the first byte comes, and answers nothing
 * meanwhile; `signal` is heard behind that.
 * @throws QmpError (`ERR_QMP`) where QEMU refuses, or cannot open the scratch image.
 */
export async function* standingStream(qmp: Qmp, { folder, signal }: StandingOptions): AsyncGenerator<Uint8Array, void, undefined> {
  const scratch = await makeScratchFile(folder, qmp)
  try {
    await (await Qcow2Image.create(scratch.path, { size: 1 << 16 })).close()
    await scratch.handOver()
    await snapshotInto(qmp, scratch.path, scratch.name)
    signal?.throwIfAborted()
    await using image = await Qcow2Image.open(scratch.path, { readOnly: true, signal })
    await using snapshot = await image.snapshots.open(tag)
    yield* loadVmState(snapshot, { signal })
  } finally {
    await scratch.remove()
  }
}

async function snapshotInto(qmp: Qmp, path: string, name: string): Promise<void> {
  const node = ours + name
  await addScratch(qmp, node, path)
  try {
    await runJob(qmp, node)
  } finally {
    await qmp.execute('blockdev-del', { 'node-name': node })
  }
}

async function addScratch(qmp: Qmp, node: string, path: string): Promise<void> {
  try {
    // what QEMU writes here is read back at once and removed: nothing waits for the disk
    const file = { driver: 'file', filename: path }
    await qmp.execute('blockdev-add', { 'driver': 'qcow2', 'node-name': node, 'cache': { 'no-flush': true }, file })
  } catch (error) {
    if (!(error instanceof QmpError) || error.desc === undefined) throw error
    const help = `a VM that stands still is saved through a scratch image, which QEMU cannot open: ${error.desc}; name a folder that it can write to`
    throw new QmpError(help, { cause: error })
  }
}

/** The monitor is silent while the job runs: its end comes as an event, whenever that is. */
async function runJob(qmp: Qmp, node: string): Promise<void> {
  const events = qmp.events('JOB_STATUS_CHANGE')
  try {
    await qmp.execute('snapshot-save', { 'job-id': node, tag, 'vmstate': node, 'devices': [node] })
    for await (const { data } of events) {
      if (data?.['id'] === node && data['status'] === 'concluded') break
    }
  } finally {
    await events.return?.()
  }
  const job = (await qmp.execute('query-jobs')).find(({ id }) => id === node)
  await qmp.execute('job-dismiss', { id: node })
  if (job?.error !== undefined) throw new QmpError(`snapshot-save: ${job.error}`)
}

/**
 * Removes what a save left in QEMU whose process was killed: the node of a scratch image, and the job.
 * @throws Qcow2Error `ERR_BUSY` if that job still runs.
 */
export async function removeLeftovers(qmp: Qmp): Promise<void> {
  for (const { id, status } of await qmp.execute('query-jobs')) {
    if (!id.startsWith(ours)) continue
    if (status !== 'concluded') throw new Qcow2Error('ERR_BUSY', `the VM cannot be saved now: QEMU still works for another save (job ${id}); wait until that has ended`)
    await qmp.execute('job-dismiss', { id })
  }
  for (const node of await qmp.execute('query-named-block-nodes', { flat: true })) {
    if (node['node-name'].startsWith(ours)) await qmp.execute('blockdev-del', { 'node-name': node['node-name'] })
  }
}
