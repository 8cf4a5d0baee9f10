/** Freezes the chosen disks of a VM, all at one instant, and undoes it. Owns the QMP conversation; the files are QEMU's. */
import { Qcow2Error } from '../core/errors.ts'
import type { Qmp } from '../qmp/client.ts'
import { QmpError } from '../qmp/error.ts'
import type { ChosenDisk, ChosenDisks } from './choose-disks.ts'
import { modificationTime, pathBeside, removeFile } from './host-files.ts'
import type { DiskFreeze, SavedDisk } from './manifest.ts'

/** The disks of one save. */
export class DiskSnapshots {
  readonly #qmp: Qmp
  readonly #disks: ChosenDisks
  #frozen = false

  constructor(qmp: Qmp, disks: ChosenDisks) {
    this.#qmp = qmp
    this.#disks = disks
  }

  /** There are disks to freeze. */
  get wanted(): boolean {
    return this.#disks.chosen.length > 0
  }

  /**
   * Takes all snapshots in one transaction: all or none.
   * @throws QmpError (`ERR_QMP`) if QEMU refuses; no disk has changed then.
   */
  async freeze(): Promise<void> {
    if (!this.wanted) return
    await this.#qmp.execute('transaction', { actions: this.#disks.chosen.map(freezeAction) })
    this.#frozen = true
    for (const disk of this.#disks.chosen) if ('overlay' in disk) await this.#nameBacking(disk)
  }

  /** QEMU writes into the overlay the name by which it opened the disk; a relative one means nothing in another folder. */
  async #nameBacking({ disk, overlay, activeNode }: Extract<ChosenDisk, { overlay: string }>): Promise<void> {
    const [name] = disk.chain
    if (name === undefined || name === disk.file || pathBeside(overlay, name) === disk.file || !disk.file.startsWith('/')) return
    await this.#qmp.execute('change-backing-file', { 'device': activeNode, 'image-node-name': activeNode, 'backing-file': disk.file })
  }

  /**
   * Makes the disks what they were: merges each overlay down, drops and removes it, deletes internal snapshots. The guest may run.
   * @param timeout Milliseconds for each disk.
   */
  async thaw(timeout = 60_000): Promise<void> {
    if (!this.#frozen) return
    this.#frozen = false
    for (const disk of this.#disks.chosen) {
      if ('internal' in disk) {
        await this.#qmp.execute('blockdev-snapshot-delete-internal-sync', { device: disk.disk.node, name: disk.internal })
      } else {
        await mergeDown(this.#qmp, disk.activeNode, timeout)
        await removeFile(disk.overlay)
      }
    }
  }

  /** Thaws because of `cause`, which it throws with what went wrong meanwhile, if something did. */
  async thawAfter(cause: unknown): Promise<void> {
    await this.thaw().catch((error: unknown) => {
      throw notSetBack(cause, [error])
    })
  }

  /** What a manifest says of all disks of the VM. */
  describe(): Promise<SavedDisk[]> {
    const { all, chosen } = this.#disks
    return Promise.all(
      all.map(async ({ path: _path, chain: _chain, ...disk }) => {
        const how = this.#frozen ? chosen.find((candidate) => candidate.disk.node === disk.node) : undefined
        const activeNode = how !== undefined && 'overlay' in how ? how.activeNode : disk.node
        return { ...disk, activeNode, frozen: how === undefined ? false : await described(how) }
      }),
    )
  }
}

/** A save failed, and so did what was to undo it. */
export function notSetBack(cause: unknown, failures: readonly unknown[]): Qcow2Error {
  const words = (error: unknown): string => (error instanceof Error ? error.message : String(error))
  return new Qcow2Error('ERR_QMP', `save failed (${words(cause)}), and the VM could not be set back: ${failures.map(words).join('; ')}`, { cause })
}

async function described(how: ChosenDisk): Promise<DiskFreeze> {
  if ('internal' in how) return { internal: how.internal }
  const modified = await modificationTime(how.disk.file)
  return { overlay: how.overlay, ...(modified !== undefined && { modified }) }
}

function freezeAction(disk: ChosenDisk): { type: string; data: Record<string, unknown> } {
  if ('internal' in disk) {
    return { type: 'blockdev-snapshot-internal-sync', data: { device: disk.disk.node, name: disk.internal } }
  }
  return {
    type: 'blockdev-snapshot-sync',
    data: {
      'node-name': disk.disk.node,
      'snapshot-file': disk.overlay,
      'snapshot-node-name': disk.activeNode,
      'format': 'qcow2',
    },
  }
}

async function mergeDown(qmp: Qmp, node: string, timeout: number): Promise<void> {
  const job = `qcow2-undo-${node}`
  const events = qmp.events('BLOCK_JOB_READY', 'BLOCK_JOB_COMPLETED', 'BLOCK_JOB_CANCELLED', 'BLOCK_JOB_ERROR')
  const timer = setTimeout(() => void events.return?.(), timeout)
  try {
    await qmp.execute('block-commit', { 'job-id': job, 'device': node })
    for await (const { event, data } of events) {
      if (data?.['device'] !== job) continue
      if (event === 'BLOCK_JOB_READY') await qmp.execute('block-job-complete', { device: job })
      else if (event === 'BLOCK_JOB_COMPLETED' && data['error'] === undefined) return
      else throw new QmpError(`merging node ${node} back into its base failed: ${JSON.stringify(data['error'] ?? event)}`)
    }
    throw new QmpError(`merging node ${node} back into its base took more than ${timeout} ms; job ${job} still runs`)
  } finally {
    clearTimeout(timer)
    await events.return?.()
  }
}
