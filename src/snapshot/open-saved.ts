/**
 * Opens whatever holds a saved VM. Owns recognising it, which of several saved VMs in an image is meant, and that the disk
 * of an image is not needed where only its VM state is.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { MemoryDevice } from '../block/memory.ts'
import { slice } from '../block/slice.ts'
import { openSource, type Source } from '../block/source.ts'
import { UncachedReads } from '../block/uncached-reads.ts'
import { Qcow2Error } from '../core/errors.ts'
import { Qcow2Image, type OpenOptions } from '../qcow2/image.ts'
import type { SnapshotDevice } from '../qcow2/snapshot-device.ts'
import type { SnapshotInfo } from '../qcow2/snapshot-info.ts'
import type { PageSource } from './page-source.ts'
import { RamImage } from './ram-image.ts'
import { StreamSource } from './stream-source.ts'

/** Options of {@link openSaved}. */
export interface OpenSavedOptions extends CallOptions {
  /** Id or name of the internal snapshot of a qcow2 image; not needed where only one has VM state. */
  readonly snapshot?: string | undefined
  /** Buffered reads of at most this many bytes are made synchronously; see `openFile`. Default as there; 72 KiB in a revert. */
  readonly syncLimit?: number | undefined
  /**
   * Which files a RAM image may open as its backing file, an earlier RAM image; see {@link Qcow2Image.open}. Any other
   * snapshot needs none: its VM state is read whether the backing file of the disk is there or not.
   */
  readonly references?: OpenOptions['references'] | undefined
  /** Opens an encrypted image. */
  readonly passphrase?: OpenOptions['passphrase'] | undefined
  /** Opens an empty growable device for the content of a compressed file; closed with the saved VM. Default: memory, up to 256 MiB. */
  readonly spool?: (() => BlockDevice | Promise<BlockDevice>) | undefined
}

/**
 * A saved VM: a RAM image, an internal snapshot with VM state as QEMU's `savevm` makes it, a stream file, a
 * mapped-ram file, a libvirt save image. Nothing is written to it.
 *
 * @throws Qcow2Error `ERR_NOT_FOUND` if the image has no such snapshot, none with VM state, or several and `snapshot`
 *   does not say which (the message lists them); `ERR_STREAM` or `ERR_FORMAT` for what is damaged or no saved VM.
 */
export async function openSaved(source: Source | Qcow2Image, options: OpenSavedOptions = {}): Promise<PageSource> {
  const { signal, syncLimit = 0, spool } = options
  if (Qcow2Image.is(source)) return openWhole(source, options)
  const device = UncachedReads.over(await openSource(source, { readOnly: true, forceShare: true, signal, syncLimit: options.syncLimit }), syncLimit)
  const isImage = await beginsWith(device, [0x51, 0x46, 0x49, 0xfb], options).catch(async (error: unknown) => {
    await device.close()
    throw error
  })
  return isImage ? openFromFile(device, options) : StreamSource.open(device, { signal, spool })
}

/**
 * Which snapshot of an image is the saved VM: the one with this id or name, else the only one with VM state.
 * @throws Qcow2Error `ERR_NOT_FOUND` if there is no such one, or several come into question
 */
export function savedSnapshot(snapshots: Iterable<SnapshotInfo>, idOrName?: string): SnapshotInfo {
  const all = [...snapshots]
  const saved = all.filter(({ vmStateSize }) => vmStateSize > 0)
  const list = saved.map(({ id, name }) => (name === '' ? `number ${id}` : name)).join(', ')
  if (idOrName !== undefined) {
    const found = all.find(({ id }) => id === idOrName) ?? all.find(({ name }) => name === idOrName)
    const which = JSON.stringify(idOrName)
    if (found === undefined) throw notFound(`the image has no snapshot ${which}; saved VMs in it: ${list === '' ? 'none' : list}`)
    if (found.vmStateSize === 0) throw notFound(`snapshot ${which} has no VM state: it is a snapshot of the disk only`)
    return found
  }
  if (saved.length === 0) throw notFound('the image has no snapshot with VM state')
  if (saved.length > 1) throw notFound(`the image holds several saved VMs: say which snapshot is meant: ${list}`)
  return saved[0]!
}

/** The saved VM of an image that is open with all that belongs to it, and stays open. */
async function openWhole(image: Qcow2Image, options: OpenSavedOptions): Promise<PageSource> {
  const info = savedSnapshot(image.snapshots, options.snapshot)
  const disk = await image.snapshots.open(info.id, options)
  return openAt(disk, disk, info, options)
}

/** Of an image file: its backing file is opened for a RAM image only, whose pages are the disk. */
async function openFromFile(device: BlockDevice, options: OpenSavedOptions): Promise<PageSource> {
  const { references, passphrase, signal } = options
  const owned = new Owned([device])
  const open = async (how: OpenOptions): Promise<[Qcow2Image, SnapshotInfo, SnapshotDevice]> => {
    const file = slice(device, 0, device.size, { readOnly: true, keepOpen: true })
    const image = owned.add(await Qcow2Image.open(file, { ...how, readOnly: true, passphrase, signal }))
    const info = savedSnapshot(image.snapshots, options.snapshot)
    return [image, info, owned.add(await image.snapshots.open(info.id, options))]
  }
  try {
    let [image, info, disk] = await open({ backing: new MemoryDevice(0, { readOnly: true }) })
    const isRamImage = await RamImage.isAt(disk, options)
    if (isRamImage && image.engine.content.backingFile !== undefined) [image, info, disk] = await open({ references })
    // the pages of a stream are read twice, first to find them: the second time from the page cache
    if (isRamImage && device instanceof UncachedReads) device.start()
    return await openAt(disk, owned, info, options)
  } catch (error) {
    await owned[Symbol.asyncDispose]()
    throw error
  }
}

/** `owner` is closed with what is opened; if it fails, too. */
async function openAt(disk: SnapshotDevice, owner: AsyncDisposable, { id, name }: SnapshotInfo, options: OpenSavedOptions): Promise<PageSource> {
  const { signal } = options
  const ram = await RamImage.at(disk, { signal, owner }).catch(async (error: unknown) => {
    await owner[Symbol.asyncDispose]()
    throw error
  })
  return ram ?? StreamSource.open(disk.vmState, { signal, owner, snapshot: name === '' ? id : name })
}

/** What was opened on the way, closed in the opposite order; once. */
class Owned implements AsyncDisposable {
  readonly #all: AsyncDisposable[]

  constructor(first: readonly AsyncDisposable[]) {
    this.#all = [...first]
  }

  add<T extends AsyncDisposable>(one: T): T {
    this.#all.push(one)
    return one
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (let last = this.#all.pop(); last !== undefined; last = this.#all.pop()) await last[Symbol.asyncDispose]()
  }
}

function notFound(message: string): Qcow2Error {
  return new Qcow2Error('ERR_NOT_FOUND', message)
}

async function beginsWith(device: BlockDevice, magic: readonly number[], options: CallOptions): Promise<boolean> {
  if (device.size < magic.length) return false
  const start = await device.read(0, magic.length, options)
  return magic.every((byte, index) => start[index] === byte)
}
