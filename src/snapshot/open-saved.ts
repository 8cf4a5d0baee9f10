/** Opens whatever holds a saved VM. Owns recognising it. */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { openSource, type Source } from '../block/source.ts'
import { UncachedReads } from '../block/uncached-reads.ts'
import { Qcow2Error } from '../core/errors.ts'
import { Qcow2Image } from '../qcow2/image.ts'
import type { PageSource } from './page-source.ts'
import { RamImage } from './ram-image.ts'
import { StreamSource } from './stream-source.ts'

/** Options of {@link openSaved}. */
export interface OpenSavedOptions extends CallOptions {
  /** Id or name of the internal snapshot of a qcow2 image; default: the RAM image in it, else its last with VM state. */
  readonly snapshot?: string | undefined
  /** Buffered reads of at most this many bytes are made synchronously; see `openFile`. Default as there; 72 KiB in a revert. */
  readonly syncLimit?: number | undefined
}

/**
 * A saved VM: a RAM image, an internal snapshot with VM state as QEMU's `savevm` makes it, a stream file, a
 * mapped-ram file, a libvirt save image. Nothing is written to it.
 *
 * @throws Qcow2Error `ERR_NOT_FOUND` if the image has no such snapshot or none with VM state, `ERR_STREAM` or
 *   `ERR_FORMAT` for what is damaged or no saved VM.
 */
export async function openSaved(source: Source | Qcow2Image, options: OpenSavedOptions = {}): Promise<PageSource> {
  const { signal, syncLimit } = options
  if (source instanceof Qcow2Image) return openImage(source, false, options)
  const device = UncachedReads.over(await openSource(source, { readOnly: true, forceShare: true, signal, syncLimit }), syncLimit ?? 0)
  const isImage = await begins(device, [0x51, 0x46, 0x49, 0xfb], options).catch(async (error: unknown) => {
    await device.close()
    throw error
  })
  if (!isImage) return StreamSource.open(device, { signal })
  const saved = await openImage(await Qcow2Image.open(device, { readOnly: true, signal }), true, options)
  // the pages of a stream are read twice, first to find them: the second time from the page cache
  if (device instanceof UncachedReads && !(saved instanceof StreamSource)) device.start()
  return saved
}

async function openImage(image: Qcow2Image, owned: boolean, options: OpenSavedOptions): Promise<PageSource> {
  const { signal, snapshot } = options
  try {
    const ram = await RamImage.open(image, { signal, snapshot }).catch((error: unknown) => {
      if (Qcow2Error.is(error, 'ERR_NOT_FOUND')) return undefined
      throw error
    })
    if (ram !== undefined) return owned ? owning(ram, image) : ram
    const withState = [...image.snapshots].filter(({ vmStateSize }) => vmStateSize > 0)
    const name = snapshot ?? withState.at(-1)?.id
    if (name === undefined) throw new Qcow2Error('ERR_NOT_FOUND', 'the image has no snapshot with VM state')
    const opened = await image.snapshots.open(name, { signal })
    if (opened.vmState.size === 0) {
      await opened.close()
      throw new Qcow2Error('ERR_NOT_FOUND', `snapshot ${JSON.stringify(name)} has no VM state: it is a snapshot of the disk only`)
    }
    const owner = { [Symbol.asyncDispose]: () => (owned ? opened.close().then(() => image.close()) : opened.close()) }
    return await StreamSource.open(opened.vmState, { signal, owner })
  } catch (error) {
    if (owned) await image.close()
    throw error
  }
}

/** The RAM image, closing the image behind itself. */
function owning(ram: RamImage, image: Qcow2Image): PageSource {
  const { machine, pageSize, head, ramSectionId, dirtyBitmaps, footers, blocks, earlyDevices, devices, vmDescription } = ram
  const close = (): Promise<void> => ram.close().then(() => image.close())
  const parts = { machine, pageSize, head, ramSectionId, dirtyBitmaps, footers, blocks, earlyDevices, devices, vmDescription }
  return { ...parts, close, [Symbol.asyncDispose]: close }
}

async function begins(device: BlockDevice, magic: readonly number[], options: CallOptions): Promise<boolean> {
  if (device.size < magic.length) return false
  const start = await device.read(0, magic.length, options)
  return magic.every((byte, index) => start[index] === byte)
}
