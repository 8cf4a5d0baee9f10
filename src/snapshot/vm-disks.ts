/** The writable disks of a VM, as its monitor lists them, with every name by which somebody may call them. */
import type { Qmp } from '../qmp/client.ts'
import type { BlockImage, BlockInfo } from '../qmp/commands.ts'
import { absolutePath, qemuFolder } from './host-qemu.ts'
import type { SavedDisk } from './manifest.ts'

/** A writable disk of a VM. */
export interface VmDisk extends Omit<SavedDisk, 'activeNode' | 'frozen'> {
  readonly size: number
  /** QOM path of the guest's device. */
  readonly path: string
  /** Files of its chain as QEMU calls them, the active layer's first. */
  readonly chain: readonly string[]
}

/** Every writable disk that a device of the VM uses, in QEMU's order; flash memory is part of the memory that is saved. */
export async function disksOf(qmp: Qmp): Promise<VmDisk[]> {
  const drives = (await qmp.execute('query-block')).filter(({ qdev, inserted }) => qdev !== undefined && inserted?.ro === false)
  const disks = await Promise.all(drives.map(async (drive) => ((await isFlash(qmp, drive)) ? [] : [drive])))
  if (disks.flat().length === 0) return []
  const folder = await qemuFolder(qmp, disks.flat().flatMap(({ inserted }) => inserted!.file))
  return disks.flat().map(({ device, qdev, inserted }) => ({
    node: inserted!['node-name'],
    ...(device !== '' && { device }),
    qdev: /^\/machine\/peripheral\/([^/]+)/.exec(qdev!)?.[1] ?? qdev!,
    path: qdev!,
    file: absolutePath(plainPath(inserted!.image.filename), folder),
    format: inserted!.drv,
    size: inserted!.image['virtual-size'],
    chain: chainOf(inserted!.image),
  }))
}

function chainOf(image: BlockImage): string[] {
  const below = image['backing-image']
  return [image.filename, ...(below === undefined ? [] : chainOf(below))]
}

/** The content of flash memory is a RAM block: it travels with memory, and QEMU writes it to the file where it goes on. */
async function isFlash(qmp: Qmp, { qdev }: BlockInfo): Promise<boolean> {
  if (qdev?.startsWith('/machine/') !== true) return false
  const type = await qmp.execute('qom-get', { path: qdev, property: 'type' }).catch(() => '')
  return /^cfi\.pflash/.test(String(type))
}

/**
 * The file that a name of QEMU's means. It calls a disk by all its options (`json:{…}`) where a path does not tell them, for
 * example an overlay whose backing file is not opened by the name in it: the innermost file name counts.
 */
export function plainPath(name: string): string {
  if (!name.startsWith('json:')) return name
  try {
    for (let node = JSON.parse(name.slice(5)) as { filename?: unknown; file?: unknown } | null; typeof node === 'object' && node !== null;) {
      if (typeof node.filename === 'string') return node.filename
      node = node.file as typeof node
    }
  } catch {
    // not JSON
  }
  return name
}
