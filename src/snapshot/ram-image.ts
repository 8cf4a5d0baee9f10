/**
 * A RAM image read: guest memory kept as data in a qcow2 image, the rest of the stream beside it. Owns
 * opening it and putting the stream together again; the layout is in `ram-image-layout.ts`.
 */
import { type BlockDevice, type CallOptions, checkRange } from '../block/device.ts'
import { slice } from '../block/slice.ts'
import type { Source } from '../block/source.ts'
import { FormatError, Qcow2Error } from '../core/errors.ts'
import { limits } from '../migration/format.ts'
import { isZero, RamPart, ramPartCapacity } from '../migration/ram-part.ts'
import type { PageRange } from '../migration/ram-index.ts'
import { VmState } from '../migration/vm-state.ts'
import { splitStream, type StreamParts } from '../migration/stream-parts.ts'
import { Qcow2Image, type OpenOptions } from '../qcow2/image.ts'
import type { SnapshotDevice } from '../qcow2/snapshot-device.ts'
import { absentAsZero } from './ram-image-absent.ts'
import { decodeLayout, decodeTrailer, trailerLength, type RamImageBlock, type RamImageLayout } from './ram-image-layout.ts'
import type { SavedRamBlock } from './page-source.ts'
import { SavedVm } from './saved-vm.ts'

/** Options of {@link RamImage.open}. */
export interface OpenRamImageOptions extends OpenOptions {
  /** Id or name of the snapshot; default the last that is a RAM image. */
  readonly snapshot?: string | undefined
}

/** A RAM block of a RAM image. */
export interface RamImageBlockContent extends RamImageBlock, SavedRamBlock {}

const structure = 'RAM image'
/** Pages in one PART section of the stream put together again. */
const partPages = 256
/** Most bytes of rest: device state and VM description, and what comes before the pages. */
const restLimit = limits.behindPages + (64 << 20)

/**
 * A saved VM whose memory is the disk of a qcow2 image.
 *
 * ```ts
 * await using ram = await RamImage.open('warm.qcow2')
 * const page = await ram.read('pc.ram', 0x100000, 4096)
 * for await (const bytes of ram.stream()) socket.write(bytes)
 * ```
 */
export class RamImage extends SavedVm<RamImageBlockContent> {
  /** The stream without its pages, before and behind the place where they belong. */
  readonly rest: { readonly before: Uint8Array; readonly after: Uint8Array }
  readonly #disk: BlockDevice
  readonly #owned: readonly AsyncDisposable[]

  private constructor(layout: RamImageLayout, rest: Uint8Array, parts: StreamParts, disk: SnapshotDevice, owned: readonly AsyncDisposable[]) {
    super(parts, layout.pageSize, layout.blocks.map((block) => {
      const content = slice(disk, block.position, block.length, { keepOpen: true })
      return { ...block, content: block.absent.length === 0 ? content : absentAsZero(content, block.absent) }
    }))
    this.rest = { before: rest.subarray(0, layout.pagesAt), after: rest.subarray(layout.pagesAt) }
    this.#disk = disk
    this.#owned = owned
  }

  /**
   * Opens a RAM image: reads the rest of the stream, no page. An open `Qcow2Image` stays open when the RAM
   * image is closed, what was opened here does not.
   * @throws Qcow2Error `ERR_NOT_FOUND` if the image holds no such snapshot, `ERR_FORMAT` if its layout
   * is damaged, `ERR_STREAM` if the rest of the stream is
   */
  static async open(source: Source, options: OpenRamImageOptions = {}): Promise<RamImage> {
    const { snapshot: _, ...how } = options
    const given = Qcow2Image.is(source)
    const image = given ? source : await Qcow2Image.open(source, { readOnly: true, ...how })
    const owned: AsyncDisposable[] = given ? [] : [image]
    try {
      const [disk, jsonLength] = await findSnapshot(image, options)
      owned.unshift(disk)
      return await RamImage.#read(disk, jsonLength, owned, options)
    } catch (error) {
      for (const each of owned) await each[Symbol.asyncDispose]()
      throw error
    }
  }

  /**
   * The RAM image that an open snapshot is; undefined if it is another one. The snapshot stays open. `owner` is closed with
   * the RAM image.
   * @throws what {@link RamImage.open} throws
   */
  static async at(disk: SnapshotDevice, options: CallOptions & { readonly owner?: AsyncDisposable } = {}): Promise<RamImage | undefined> {
    const jsonLength = await layoutLength(disk.vmState, options)
    const owned = options.owner === undefined ? [] : [options.owner]
    return jsonLength === undefined ? undefined : RamImage.#read(disk, jsonLength, owned, options)
  }

  /** True if an open snapshot is a RAM image, whose pages are its disk. */
  static async isAt(disk: SnapshotDevice, options: CallOptions = {}): Promise<boolean> {
    return (await layoutLength(disk.vmState, options)) !== undefined
  }

  static async #read(disk: SnapshotDevice, jsonLength: number, owned: readonly AsyncDisposable[], options: CallOptions): Promise<RamImage> {
    const { vmState } = disk
    const restLength = vmState.size - trailerLength - jsonLength
    if (restLength < 0 || restLength > restLimit) throw damaged(`the layout has ${jsonLength} bytes, the VM state ${vmState.size}`)
    const layout = decodeLayout(await vmState.read(restLength, jsonLength, options), disk.size)
    if (layout.restLength !== restLength) throw damaged(`the rest of the stream has ${restLength} bytes, expected ${layout.restLength}`)
    const rest = await vmState.read(0, restLength, options)
    const parts = splitStream(rest.subarray(0, layout.pagesAt), rest.subarray(layout.pagesAt))
    const same = parts.blocks.length === layout.blocks.length && parts.blocks.every((block, i) => isSame(block, layout.blocks[i]!))
    if (!same) throw damaged('the RAM blocks of the layout are not those of the stream')
    return new RamImage(layout, rest, parts, disk, owned)
  }

  /** `length` bytes from byte `offset` of a RAM block. Absent pages read as zeroes. */
  async read(which: string | number, offset: number, length: number, options?: CallOptions): Promise<Uint8Array> {
    this.assertOpen()
    const block = this.block(which)
    checkRange(offset, length, block.length)
    return block.content.read(offset, length, options)
  }

  /**
   * The saved VM as a {@link VmState}: devices decoded, pages by their kind, exports and comparison. A page that the image
   * stores counts as data, also if it is full of zeroes. Usable while the RAM image is open.
   */
  async vmState(options?: CallOptions): Promise<VmState> {
    this.assertOpen()
    const ranges: PageRange[] = []
    for (const [index, { content, length, position, absent }] of this.blocks.entries()) {
      ranges.push({ block: index, offset: 0, length, content: 'zero' })
      for await (const found of content.map(options)) {
        if (!found.zero) ranges.push({ block: index, offset: found.start, length: found.length, content: position + found.start })
      }
      for (const [offset, size] of absent) ranges.push({ block: index, offset, length: size, content: 'absent' })
    }
    return VmState.beside(this.rest, this.#disk, ranges, options)
  }

  /**
   * The whole migration stream, put together again: what QEMU's `loadvm` and `-incoming` take. Every page
   * that the original had comes once, in the order of the blocks. The chunks belong to the caller.
   */
  async *stream(options?: CallOptions): AsyncGenerator<Uint8Array, void, undefined> {
    this.assertOpen()
    yield this.rest.before.slice()
    for (const block of this.blocks) {
      let done = 0
      for (const [offset, length] of [...block.absent, [block.length, 0] as const]) {
        yield* this.#parts(block, done, offset, options)
        done = offset + length
      }
    }
    yield this.rest.after.slice()
  }

  async *#parts(block: RamImageBlockContent, from: number, to: number, options?: CallOptions): AsyncGenerator<Uint8Array, void, undefined> {
    const { pageSize, ramSectionId: sectionId, footers } = this
    for (let offset = from; offset < to; offset += partPages * pageSize) {
      const bytes = await block.content.read(offset, Math.min(partPages * pageSize, to - offset), options)
      const pages = bytes.length / pageSize
      const part = new RamPart(new Uint8Array(ramPartCapacity(pages, pageSize)), { sectionId, pageSize, footers })
      part.begin(block.name)
      for (let at = 0; at < bytes.length; at += pageSize) {
        if (isZero(bytes, at, pageSize)) part.zero(offset + at)
        else part.page(offset + at, bytes, at)
      }
      yield part.finish()
    }
  }

  protected async onClose(): Promise<void> {
    for (const each of this.#owned) await each[Symbol.asyncDispose]()
  }
}

function isSame(block: { name: string; length: number }, stored: RamImageBlock): boolean {
  return block.name === stored.name && block.length === stored.length
}

function damaged(detail: string): FormatError {
  return new FormatError(detail, { structure })
}

/** The snapshot asked for, or the last with a layout; open, with the length of the layout. */
async function findSnapshot(image: Qcow2Image, options: OpenRamImageOptions): Promise<[SnapshotDevice, number]> {
  const names = options.snapshot === undefined ? [...image.snapshots].map(({ id }) => id).reverse() : [options.snapshot]
  for (const name of names) {
    const disk = await image.snapshots.open(name, options)
    const length = await layoutLength(disk.vmState, options).catch(async (error: unknown) => {
      await disk.close()
      throw error
    })
    if (length !== undefined) return [disk, length]
    await disk.close()
  }
  const which = options.snapshot === undefined ? 'no snapshot of the image' : `snapshot '${options.snapshot}'`
  throw new Qcow2Error('ERR_NOT_FOUND', `${which} ${options.snapshot === undefined ? 'is' : 'is not'} a RAM image`)
}

async function layoutLength(vmState: BlockDevice, options: CallOptions): Promise<number | undefined> {
  if (vmState.size < trailerLength) return undefined
  return decodeTrailer(await vmState.read(vmState.size - trailerLength, trailerLength, options))
}
