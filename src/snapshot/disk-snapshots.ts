/**
 * Freezes the disks of a stopped VM, all at one instant, and undoes it. Owns the QMP conversation; the
 * files are QEMU's.
 */
import { QmpError } from '../qmp/error.ts'
import type { Qmp } from '../qmp/client.ts'
import { modificationTime } from './host-files.ts'
import type { SavedDisk } from './manifest.ts'
import type { VmDisk } from './vm-disks.ts'

/** One disk to freeze while memory is saved. */
export type DiskSnapshot =
  /** From now on the guest writes to the new file `overlay`; what was there stays unchanged below it. */
  | {
      /** Node name of the disk's active layer. */
      readonly node: string
      /** Path of the new qcow2 file, as QEMU sees it. */
      readonly overlay: string
      /** Node name for the new layer; made from `node` if left out. */
      readonly overlayNode?: string
    }
  /** An internal snapshot in the image itself. */
  | { readonly node: string; readonly internal: string }

/** A frozen disk. */
export type FrozenDisk = DiskSnapshot & {
  /** Node the guest writes to now. */
  readonly activeNode: string
}

/**
 * Takes all snapshots in one transaction: all or none.
 * @throws QmpError (`ERR_QMP`) if QEMU refuses; no disk has changed then.
 */
export async function freezeDisks(qmp: Qmp, disks: readonly DiskSnapshot[]): Promise<FrozenDisk[]> {
  if (disks.length === 0) return []
  const nodes = await qmp.execute('query-named-block-nodes', { flat: true })
  const taken = new Set(nodes.map((node) => node['node-name']))
  const frozen = disks.map((disk): FrozenDisk => {
    const node = nodes.find((candidate) => candidate['node-name'] === disk.node)
    if (node === undefined) {
      throw new QmpError(`there is no disk with node name ${disk.node}; there are ${[...taken].join(', ')}`)
    }
    const activeNode = 'internal' in disk ? disk.node : (disk.overlayNode ?? freshName(disk.node, taken))
    taken.add(activeNode)
    return { ...disk, activeNode }
  })
  await qmp.execute('transaction', { actions: frozen.map(freezeAction) })
  return frozen
}

/**
 * Makes the disks what they were: merges each overlay down and drops it, deletes internal snapshots. The
 * guest may run. Overlay files remain, unused.
 */
export async function thawDisks(qmp: Qmp, disks: readonly FrozenDisk[], timeout = 60_000): Promise<void> {
  for (const disk of disks) {
    if ('internal' in disk) {
      await qmp.execute('blockdev-snapshot-delete-internal-sync', { device: disk.node, name: disk.internal })
    } else {
      await mergeDown(qmp, disk.activeNode, timeout)
    }
  }
}

/** What a manifest says of all disks of a VM. */
export async function savedDisks(disks: readonly VmDisk[], frozen: readonly FrozenDisk[]): Promise<SavedDisk[]> {
  return Promise.all(
    disks.map(async ({ chain: _, ...disk }) => {
      const found = frozen.find(({ node }) => node === disk.node)
      if (found === undefined) return { ...disk, frozen: false }
      if ('internal' in found) return { ...disk, frozen: { internal: found.internal } }
      const modified = await modificationTime(disk.file)
      return { ...disk, frozen: { overlay: found.overlay, node: found.activeNode, ...(modified !== undefined && { modified }) } }
    }),
  )
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

function freezeAction(disk: FrozenDisk): { type: string; data: Record<string, unknown> } {
  if ('internal' in disk) {
    return { type: 'blockdev-snapshot-internal-sync', data: { device: disk.node, name: disk.internal } }
  }
  return {
    type: 'blockdev-snapshot-sync',
    data: {
      'node-name': disk.node,
      'snapshot-file': disk.overlay,
      'snapshot-node-name': disk.activeNode,
      'format': 'qcow2',
    },
  }
}

function freshName(node: string, taken: ReadonlySet<string>): string {
  for (let n = 1; ; n++) {
    const name = `${node.slice(0, 24)}-${n}`
    if (!taken.has(name)) return name
  }
}
