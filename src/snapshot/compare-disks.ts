/**
 * The disks of a QEMU beside those of a saved VM: what the guest finds must be what it knew when its memory was saved. Owns
 * what can be told of that from outside; a disk that cannot be looked at from here is a remark.
 */
import { identityAt } from '../block/file-identity.ts'
import { MemoryDevice } from '../block/memory.ts'
import { Qcow2Image } from '../qcow2/image.ts'
import { readSnapshotL1 } from '../qcow2/snapshot-list.ts'
import type { Qmp } from '../qmp/client.ts'
import { modificationTime, namesOfMoved } from './host-files.ts'
import type { DiskFreeze, SavedDisk } from './manifest.ts'
import { disksOf, plainPath, type VmDisk } from './vm-disks.ts'

/** What was found. */
export interface Comparison {
  /** Why the QEMU cannot go on from the saved VM. */
  readonly differences: readonly string[]
  /** What may be wrong, or could not be told. */
  readonly remarks: readonly string[]
}

/** When and where the VM was saved. */
export interface SavedPlace {
  /** ISO 8601. */
  readonly created: string
  /** Path of the memory when it was saved, and now: disks that moved with it are found. */
  readonly savedMemory: string | undefined
  readonly memory: string | undefined
}

/** Compares every disk of the saved VM with those that the QEMU has. */
export async function compareDisks(disks: readonly SavedDisk[], qmp: Qmp, place: SavedPlace): Promise<Comparison> {
  if (disks.length === 0) return { differences: [], remarks: [] }
  const here = await disksOf(qmp)
  const found = await Promise.all(disks.map((disk) => compareDisk(disk, here, place)))
  return { differences: found.flatMap(({ differences }) => differences), remarks: found.flatMap(({ remarks }) => remarks) }
}

/** Where the file of a saved disk is among the disks here. */
interface Found {
  readonly disk: VmDisk
  /** 0: the file itself; 1: the active layer is an overlay directly on it. */
  readonly level: number
  /** Path of the file. */
  readonly path: string
  /** It is where it was, not a copy or moved. */
  readonly inPlace: boolean
  /** By its identity, not by its name alone. */
  readonly certain: boolean
}

async function compareDisk(disk: SavedDisk, here: readonly VmDisk[], place: SavedPlace): Promise<Comparison> {
  const name = `disk ${disk.qdev?.startsWith('/') === false ? disk.qdev : (disk.device ?? disk.node)}`
  const found = await findFile(plainPath(disk.file), here, place)
  const other = (text: string): Comparison => ({ differences: [`${name}: ${text}`], remarks: [] })
  if (found === undefined) {
    const there = here.find(({ qdev, device, node }) => qdev === disk.qdev || (device !== undefined && device === disk.device) || node === disk.node) ?? here[0]
    const instead = `saved with ${disk.file}, here ${there?.file ?? 'none'}`
    if (disk.frozen === false) return { differences: [], remarks: [`${name}: it was not frozen; ${instead}: the guest must find there what its own held when the memory was saved`] }
    const create = `qemu-img create -f qcow2 -b ${disk.file} -F ${disk.format === '' ? 'FORMAT' : disk.format} OVERLAY`
    return other(`${instead} (start QEMU with that file, or with a new overlay on it: ${create})`)
  }
  if (disk.frozen === false) return notFrozen(name, found, place)
  const differences = await problemsOf(disk.frozen, found, place)
  const remarks = found.certain ? [] : [`${name}: ${found.path} is taken for ${disk.file} by its name alone`]
  return { differences: differences.map((text) => `${name}: ${text}`), remarks }
}

async function problemsOf(frozen: DiskFreeze, found: Found, place: SavedPlace): Promise<string[]> {
  const { disk, level, path } = found
  const active = plainPath(disk.file)
  const problems: string[] = []
  if (level > 1) problems.push(`${active} lies ${level} layers above ${path}, the disk as it was saved: what is between may hold later changes (make a new overlay directly on it)`)
  if ('internal' in frozen) {
    if (level < 2 && (await isAtSnapshot(path, frozen.internal)) === false) problems.push(`${path} is not at its snapshot ${frozen.internal} (qemu-img snapshot -a ${frozen.internal} ${path})`)
  } else {
    const now = await modificationTime(path)
    const written = frozen.modified !== undefined && now !== undefined && now !== frozen.modified
    // a copy has a time of its own
    if (written && found.inPlace) problems.push(`${path} was written to since it was saved (changed ${now}, frozen ${frozen.modified}): it is not the disk that the guest knows; a revert with the frozen file itself uses it up`)
    if (level === 1 && (await isSameFile(active, namesOfMoved(plainPath(frozen.overlay), place.savedMemory, place.memory)))) {
      return [...problems, `${active} is the overlay that the guest went on with after the save (make a new one on ${path})`]
    }
  }
  if (level === 1 && (await hasData(active))) problems.push(`${active} holds changes of its own, which the saved guest does not know (make a new overlay on ${path})`)
  return problems
}

/** Its owner decided to save it some other way, or not at all. */
async function notFrozen(name: string, { path }: Found, { created }: SavedPlace): Promise<Comparison> {
  const changed = await modificationTime(path)
  if (changed !== undefined && changed <= created) return { differences: [], remarks: [] }
  return { differences: [], remarks: [`${name}: it was not frozen when the memory was saved: if ${path} was written to since, the guest finds a disk that it does not know`] }
}

async function findFile(saved: string, here: readonly VmDisk[], place: SavedPlace): Promise<Found | undefined> {
  const names = namesOfMoved(saved, place.savedMemory, place.memory)
  const layers = here.flatMap((disk) => filesOf(disk).map((path, level) => ({ disk, level, path })))
  for (const [index, name] of names.entries()) {
    const identity = await identityAt(name)
    if (identity === undefined) continue
    for (const layer of layers) if ((await identityAt(layer.path)) === identity) return { ...layer, path: name, inPlace: index === 0, certain: true }
    if (index === 0) return undefined // it is there, and not in use
  }
  const byName = layers.find(({ path }) => path === saved) ?? layers.find(({ path }) => baseName(path) === baseName(saved))
  return byName && { ...byName, inPlace: byName.path === saved, certain: false }
}

async function isSameFile(path: string, names: readonly string[]): Promise<boolean> {
  const identity = await identityAt(path)
  if (identity === undefined) return names.includes(path)
  for (const name of names) if ((await identityAt(name)) === identity) return true
  return false
}

/** The image alone, read beside QEMU, which has it open and has not begun to write; undefined if that cannot be done. */
async function inspect<T>(path: string, look: (image: Qcow2Image) => Promise<T>): Promise<T | undefined> {
  try {
    await using image = await Qcow2Image.open(path, { readOnly: true, forceShare: true, backing: new MemoryDevice(0, { readOnly: true }) })
    return await look(image)
  } catch {
    return undefined // in a format of its own, encrypted, on another host
  }
}

/** An image holds data above its backing file. */
async function hasData(path: string): Promise<boolean> {
  const found = await inspect(path, async (image) => {
    for await (const { present, depth } of image.map()) if (present && depth === 0) return true
    return false
  })
  return found === true
}

/** The disk is what it was at a snapshot: both have the same tables, which a write would have copied. */
function isAtSnapshot(path: string, name: string): Promise<boolean | undefined> {
  return inspect(path, async ({ engine }) => {
    const record = engine.snapshots.find((snapshot) => snapshot.name === name)
    if (record === undefined) return false
    const then = await readSnapshotL1(engine.host, record, engine.geometry.clusterSize)
    const entries = Math.ceil(engine.header.size / engine.geometry.bytesPerL1Entry)
    for (let index = 0; index < entries; index++) if (engine.active.l1.offsetAt(index) !== then.offsetAt(index)) return false
    return true
  })
}

/** Paths of a disk's chain, the active layer's first. QEMU names what it opened from its own folder, which the disk's path tells. */
function filesOf({ file, chain }: VmDisk): string[] {
  const [active = ''] = chain
  const folder = file.endsWith(active) ? file.slice(0, file.length - active.length) : ''
  return chain.map(plainPath).map((name) => (name.startsWith('/') || name.includes('://') ? name : folder + name))
}

function baseName(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1)
}
