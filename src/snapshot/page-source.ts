/**
 * What a saved VM is to those who start it again: the bytes QEMU needs before the guest runs, and RAM
 * blocks that can be read anywhere. Owns no format: a qcow2 snapshot, a stream file, a mapped-ram file
 * and a RAM image each give one of these.
 */
import type { BlockDevice } from '../block/device.ts'
import { UnsupportedError } from '../core/errors.ts'

/** One RAM block of a saved VM. */
export interface SavedRamBlock {
  /** As in the stream, for example `pc.ram`. */
  readonly name: string
  /** Bytes, a multiple of the target page size. */
  readonly length: number
  /**
   * The block's content: as long as the block, read-only. Zero pages and absent pages read as zeroes. Its
   * `map()` tells which parts may hold something else: only those have to be sent.
   */
  readonly content: BlockDevice
}

/**
 * A saved VM. Opening one reads its ends only; nothing in it costs time for each page, so that a guest of
 * any size starts at once. Closing it closes the contents of its RAM blocks.
 */
export interface PageSource extends AsyncDisposable {
  /** Machine type, for example `pc-i440fx-7.2`; empty for machines that write no configuration. */
  readonly machine: string
  /** Target page size in bytes. */
  readonly pageSize: number
  /** Header and configuration section, byte for byte as saved. */
  readonly head: Uint8Array
  /** The id of the `ram` section. */
  readonly ramSectionId: number
  /** Name of the internal snapshot in which it was found; undefined for a RAM image and for what is no image. */
  readonly snapshot?: string | undefined
  /** The VM's run state when it was saved, where something around the stream tells it (libvirt's header); else the stream does. */
  readonly runState?: string | undefined
  /** Names of dirty bitmaps that were saved with the VM and are not among these parts. Default none. */
  readonly dirtyBitmaps?: readonly string[]
  /** True if sections end with footers; machine types up to 2.3 write none. */
  readonly footers: boolean
  /** In the order of the stream. */
  readonly blocks: readonly SavedRamBlock[]
  /** Device sections that stand before the pages (virtio-mem); often empty. */
  readonly earlyDevices: Uint8Array
  /** All other device sections, from after the last RAM footer to before the EOF byte. */
  readonly devices: Uint8Array
  /** What stands behind the EOF byte: the VM description with its head, or nothing. */
  readonly vmDescription: Uint8Array
  /** Closes what the pages come from. */
  close(): Promise<void>
}

/** @throws UnsupportedError for a saved VM that would come back without its dirty bitmaps. */
export function refuseDirtyBitmaps({ dirtyBitmaps = [] }: PageSource): void {
  if (dirtyBitmaps.length === 0) return
  const names = dirtyBitmaps.map((name) => `'${name}'`).join(', ')
  const advice = "save without the capability dirty-bitmaps, or give QEMU the stream itself (-incoming 'exec:cat FILE')"
  throw new UnsupportedError(`the saved VM carries dirty bitmaps (${names}), which it would come back without: ${advice}`, ['dirty-bitmaps'])
}
