/**
 * Which disks of a VM are frozen with its memory, and where the guest goes on writing. Owns what names mean, and what is refused
 * before anything has happened: silence about a writable disk, a name of nothing or of two, an overlay over an existing file.
 */
import { assertVacant } from '../block/file-gate.ts'
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import type { Qmp } from '../qmp/client.ts'
import { absoluteFile, freeNameBeside } from './host-files.ts'
import { disksOf, plainPath, type VmDisk } from './vm-disks.ts'

/**
 * A disk to freeze while memory is saved. `node` is any name of the disk: a node name of its chain, the drive's (`-drive id=`),
 * the guest's device's (`id=`), or the path of its file; the same name goes on meaning the disk after each save.
 */
export type DiskSnapshot =
  /** From now on the guest writes to the new file `overlay`; what was there stays unchanged below it. */
  | {
      readonly node: string
      /** Path of the new qcow2 file; a relative one from the working directory of this process. */
      readonly overlay: string
      /** Node name for the new layer; made from the disk's if left out. */
      readonly overlayNode?: string
    }
  /** An internal snapshot in the image itself. */
  | { readonly node: string; readonly internal: string }

/**
 * Which disks to freeze. `all`: every writable disk, each by an overlay beside its file (`disk.qcow2` goes on in
 * `disk-1.qcow2`). `none`: none, they go on changing. A list: these, a name alone by an overlay beside the file; `all` in it
 * means every one that it does not name. What is not frozen is in the manifest as such.
 */
export type DiskChoice = 'all' | 'none' | readonly (string | DiskSnapshot)[]

/** A disk that will be frozen. */
export type ChosenDisk =
  | { readonly disk: VmDisk; readonly overlay: string; readonly activeNode: string }
  | { readonly disk: VmDisk; readonly internal: string }

/** The disks of a VM. */
export interface ChosenDisks {
  readonly all: readonly VmDisk[]
  readonly chosen: readonly ChosenDisk[]
}

/**
 * Finds the disks and what is to be done with each.
 * @throws UnsupportedError if the VM has writable disks and nothing was said of them, or a disk has no folder for an overlay;
 *   Qcow2Error `ERR_NOT_FOUND` for a name of no disk or of several, `ERR_EXISTS` for an overlay that is there already
 */
export async function chooseDisks(qmp: Qmp, choice: DiskChoice | undefined): Promise<ChosenDisks> {
  const all = await disksOf(qmp)
  if (choice === undefined && all.length > 0) throw undecided(all)
  const list = typeof choice === 'string' ? [choice] : (choice ?? [])
  const named = list.flatMap((entry) => (entry === 'all' || entry === 'none' ? [] : [typeof entry === 'string' ? { node: entry } : entry]))
  if (named.length === 0 && !list.includes('all')) return { all, chosen: [] }
  const nodes = await qmp.execute('query-named-block-nodes', { flat: true })
  const files = new Map(nodes.map((node) => [node['node-name'], node.image.filename]))
  const found = named.map((wanted) => ({ ...wanted, disk: findDisk(all, wanted.node, files) }))
  const twice = found.find(({ disk }, index) => found.findIndex((other) => other.disk === disk) !== index)
  if (twice !== undefined) throw new TypeError(`disk ${describeDisk(twice.disk)} is named twice`)
  const others = list.includes('all') ? all.filter((disk) => !found.some((other) => other.disk === disk)).map((disk) => ({ disk })) : []
  return { all, chosen: await placeOverlays([...found, ...others], new Set(files.keys())) }
}

type Wanted = { readonly disk: VmDisk } & { readonly overlay?: string; readonly overlayNode?: string; readonly internal?: string }

/** One after the other: no two may get the same name. */
async function placeOverlays(wanted: readonly Wanted[], nodes: Set<string>): Promise<ChosenDisk[]> {
  const files = new Set<string>()
  const chosen: ChosenDisk[] = []
  for (const { disk, internal, overlay: given, overlayNode } of wanted) {
    if (internal !== undefined) {
      chosen.push({ disk, internal })
      continue
    }
    const overlay = given === undefined ? await freeNameBeside(folderFile(disk), '.qcow2', files) : absoluteFile(given)
    if (files.has(overlay)) throw new TypeError(`${overlay} is to be the overlay of two disks`)
    await assertVacant(overlay)
    files.add(overlay)
    const activeNode = overlayNode ?? freshNode(disk.node, nodes)
    nodes.add(activeNode)
    chosen.push({ disk, overlay, activeNode })
  }
  return chosen
}

function folderFile(disk: VmDisk): string {
  if (disk.file.startsWith('/') && !disk.file.startsWith('/dev/')) return disk.file
  throw new UnsupportedError(`disk ${describeDisk(disk)} has no folder for an overlay; name the file that the guest is to go on with`)
}

/** The name as a user may have it: of the disk as it is, before those of what lies below. */
function findDisk(disks: readonly VmDisk[], name: string, files: ReadonlyMap<string, string>): VmDisk {
  const path = absoluteFile(name)
  const file = files.get(name)
  const now = disks.filter(({ node, device, qdev, path: qom, file: own, chain }) => [node, device, qdev, qom, chain[0]].includes(name) || own === path)
  const below = disks.filter(({ chain }) => chain.slice(1).some((layer) => layer === file || [name, path].includes(plainPath(layer))))
  const [disk, ...more] = now.length > 0 ? now : below
  if (disk === undefined) {
    throw new Qcow2Error('ERR_NOT_FOUND', `the VM has no writable disk ${JSON.stringify(name)}; ${disks.length === 0 ? 'it has none at all' : `there are ${disks.map(describeDisk).join(', ')}`}`)
  }
  if (more.length === 0) return disk
  throw new Qcow2Error('ERR_NOT_FOUND', `${JSON.stringify(name)} means several disks: ${[disk, ...more].map(describeDisk).join(', ')}; use a node name`)
}

/** A disk in words: a name that stays the same from save to save, where it has one, and its file. */
export function describeDisk({ node, device, qdev, file }: Pick<VmDisk, 'node' | 'device' | 'qdev' | 'file'>): string {
  const id = qdev?.startsWith('/') === true ? undefined : qdev
  return `${device ?? id ?? node} (${file})`
}

function undecided(disks: readonly VmDisk[]): UnsupportedError {
  return new UnsupportedError(
    `the VM has writable disks, whose content at this instant belongs to its memory: ${disks.map(describeDisk).join(', ')}; say which to freeze ` +
      "with it (--disks): 'all' (each goes on in a new overlay beside its file), their names, or 'none' (you see to it yourself that they fit)",
  )
}

/** A node name for a new layer: `disk0` has `disk0-1`; QEMU makes names beginning with # itself, and takes none. */
function freshNode(node: string, taken: ReadonlySet<string>): string {
  const stem = node.replace(/^#/, '').replace(/-\d+$/, '').slice(0, 24)
  for (let n = 1; ; n++) {
    const name = `${stem}-${n}`
    if (!taken.has(name)) return name
  }
}
