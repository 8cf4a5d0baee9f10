/**
 * Writes a RAM image from a migration stream as it comes in. Owns where each RAM block goes, which pages came, and
 * the order in which the image becomes a saved VM; gathering pages and storing areas are next door.
 */
import type { CallOptions } from '../block/device.ts'
import { preferDirect } from '../block/prefer-direct.ts'
import type { Source } from '../block/source.ts'
import { UnsupportedError } from '../core/errors.ts'
import { inflatePage } from '../migration/compressed-page.ts'
import { ramFlag } from '../migration/format.ts'
import type { MigrationRecord, RamBlock, RamPagesRecord } from '../migration/records.ts'
import { StreamRest } from '../migration/stream-rest.ts'
import { encodeRecord } from '../migration/writer.ts'
import { Qcow2Image } from '../qcow2/image.ts'
import type { CreateOptions } from '../qcow2/new-image.ts'
import type { SnapshotInfo } from '../qcow2/snapshot-info.ts'
import { absentRanges } from './ram-image-absent.ts'
import { alignBlock, encodeLayout, type RamImageBlock, type RamImageLayout } from './ram-image-layout.ts'
import { PageGatherer } from './ram-image-pages.ts'
import { AreaStore, type RamImageStatistics } from './ram-image-store.ts'
import type { SaveSink } from './save-sink.ts'

export type { RamImageStatistics }

/** Most RAM, in bytes (4 TiB): bounds the bit map of pages. */
const maxMemory = 2 ** 42
/** Single pages go through the page cache at once: handing each to another thread takes several times as long. */
const singlePages = 64 << 10

/** The `syncLimit` of a RAM image's file: only on top of another do pages come singly. */
export function syncLimitOf(backing: string | undefined): number {
  return backing === undefined ? 0 : singlePages
}

/** Options of {@link RamImageWriter}. */
export interface RamImageWriterOptions extends CallOptions {
  /** Name of the internal snapshot that makes the image a saved VM. Default `ram`. */
  readonly name?: string | undefined
  /** Cluster size of the image, or subcluster size if it has subclusters, in bytes. Default 65536. */
  readonly unit?: number | undefined
  /** The image has a backing file with an earlier RAM image: store only what differs from it. Default false. */
  readonly incremental?: boolean | undefined
  /** Bytes being written at once at most. Default 8 MiB. */
  readonly inFlight?: number | undefined
}

/** Options of {@link RamImageWriter.to}. */
export interface NewRamImageOptions extends Omit<RamImageWriterOptions, 'unit' | 'incremental'> {
  /** Bytes. Default 65536, with subclusters 131072. */
  readonly clusterSize?: number | undefined
  /** Subclusters: pages that come singly cost no whole cluster. Default with `backing`, where it makes a subcluster of each page. */
  readonly extendedL2?: boolean | undefined
  /** An earlier RAM image of the VM: only what changed since is stored. */
  readonly backing?: { readonly file: string; readonly format: string } | undefined
  /** Direct I/O for paths: past the page cache. Default: where the file system takes it, but not over a backing file. */
  readonly direct?: boolean | undefined
  /** Which files the image may open as its backing file; see {@link Qcow2Image.create}. */
  readonly references?: CreateOptions['references'] | undefined
}

/**
 * Takes the records of a stream ({@link SaveSink}); pages may come in any order and more than once.
 * `create` is called with the size of the disk as soon as the RAM blocks are known.
 *
 * Order: pages are written as areas fill. Then, by `finish`: the last pages; the rest of the stream with
 * the layout behind it, in a VM state area that nothing refers to yet; the snapshot that refers to it. A
 * crash before the last step leaves an image without that snapshot: no saved VM, and what is behind
 * `backing` untouched.
 */
export class RamImageWriter implements SaveSink {
  readonly statistics: RamImageStatistics = { written: 0, unchanged: 0 }
  readonly #create: (size: number) => Promise<Qcow2Image>
  readonly #options: RamImageWriterOptions
  readonly #limit: number
  readonly #filter = new StreamRest()
  readonly #rest: Uint8Array[] = []
  readonly #blocks: Omit<RamImageBlock, 'absent'>[] = []
  #restLength = 0
  #pagesAt: number | undefined
  #size = 0
  #pageSize = 4096
  #memory: { readonly gatherer: PageGatherer; readonly store: AreaStore } | undefined
  /** One bit a page of the disk: it came. */
  #seen: Uint8Array = new Uint8Array(0)
  #image: Promise<Qcow2Image> | undefined
  #scratch: Uint8Array | undefined
  #snapshot: SnapshotInfo | undefined

  constructor(create: (size: number) => Promise<Qcow2Image>, options: RamImageWriterOptions = {}) {
    this.#create = create
    this.#options = options
    this.#limit = options.inFlight ?? 8 << 20
  }

  /** A writer that makes a new image in `target`, a path or an empty device. */
  static to(target: Source, options: NewRamImageOptions = {}): RamImageWriter {
    const { backing, direct, references, signal } = options
    const incremental = backing !== undefined
    const extendedL2 = options.extendedL2 ?? incremental
    const clusterSize = options.clusterSize ?? (extendedL2 ? 131_072 : 65_536)
    const syncLimit = direct === true ? 0 : syncLimitOf(backing?.file)
    const mayBeDirect = !incremental && (typeof target === 'string' || target instanceof URL)
    const create = (size: number): Promise<Qcow2Image> =>
      preferDirect(direct ?? (mayBeDirect ? undefined : false), (chosen) =>
        Qcow2Image.create(target, { size, clusterSize, extendedL2, backing, direct: chosen, mode: 0o600, references, syncLimit, signal }),
      )
    return new RamImageWriter(create, { ...options, unit: extendedL2 ? clusterSize / 32 : clusterSize, incremental })
  }

  /** The snapshot, after `finish`. */
  get snapshot(): SnapshotInfo | undefined {
    return this.#snapshot
  }

  /** Takes a record in; it may be reused afterwards. Errors of writing surface in `settle`. */
  record(record: MigrationRecord): void {
    if (record.kind === 'ram-pages') {
      this.#pages(record)
      return
    }
    const kept = this.#filter.accept(record)
    if (this.#filter.pagesSeen) this.#pagesAt ??= this.#restLength
    if (record.kind === 'ram-block') this.#addBlock(record.block)
    if (kept === undefined) return
    const bytes = encodeRecord(kept)
    this.#rest.push(kept.kind === 'bytes' ? bytes.slice() : bytes)
    this.#restLength += bytes.length
  }

  /** Waits until little enough is being written, if anything is to be waited for. */
  settle(): Promise<void> | undefined {
    return this.#memory?.store.needsDrain(this.#limit) === true ? this.#drain(this.#limit) : undefined
  }

  /** Makes the image durable and a saved VM; the image is closed. */
  async finish(): Promise<void> {
    this.#memory ??= this.#begin()
    this.#memory.gatherer.flush()
    await this.#drain(0)
    const image = await this.#image!
    await image.flush()
    const writer = await image.snapshots.begin({ name: this.#options.name ?? 'ram', signal: this.#options.signal })
    try {
      for (const piece of this.#rest) await writer.write(piece)
      await writer.write(encodeLayout(this.#layout()))
      this.#snapshot = await writer.finish()
    } finally {
      await writer.close()
    }
    await image.close()
  }

  /** Gives up: no snapshot, so the image is no saved VM. */
  async abort(reason: unknown = new Error('the RAM image was given up')): Promise<void> {
    await this.#memory?.store.stop(reason)
    const image = await this.#image?.catch(() => undefined) // whoever asked for it got the error
    await image?.close()
  }

  #addBlock({ name, length, gpa }: RamBlock): void {
    const position = alignBlock(this.#size)
    this.#blocks.push({ name, length, position, ...(gpa !== undefined && { gpa }) })
    this.#size = position + length
  }

  /** The list of blocks is complete. */
  #begin(): { readonly gatherer: PageGatherer; readonly store: AreaStore } {
    const size = alignBlock(this.#size)
    if (size > maxMemory) throw new UnsupportedError(`the stream lists ${size} bytes of RAM; a RAM image holds up to ${maxMemory}`, ['RAM size'])
    const pageSize = this.#pageSize
    const { unit: wanted = 65_536, incremental = false } = this.#options
    const unit = Math.max(wanted, pageSize)
    this.#seen = new Uint8Array(Math.ceil(size / pageSize / 8))
    const gatherer: PageGatherer = new PageGatherer({ pageSize, clusterSize: unit, emit: (area) => store.add(area) })
    const { statistics } = this
    const store = new AreaStore({ pageSize, unit, size, incremental, statistics, recycle: (area) => gatherer.recycle(area) })
    return { gatherer, store }
  }

  #pages(record: RamPagesRecord): void {
    this.#pageSize = record.pageSize
    const { gatherer } = (this.#memory ??= this.#begin())
    const base = this.#blocks[record.block.index]!.position
    const { count, flags, pageOffsets, positions, bytes, pageSize } = record
    const seen = this.#seen
    for (let i = 0; i < count; i++) {
      const position = base + pageOffsets[i]!
      const page = position / pageSize
      seen[page >>> 3] = seen[page >>> 3]! | (1 << (page & 7))
      const flag = flags[i]!
      if ((flag & ramFlag.page) !== 0) gatherer.data(position, bytes, positions[i]!)
      else if ((flag & ramFlag.zero) !== 0) gatherer.zero(position)
      else gatherer.data(position, this.#decoded(record, i), 0)
    }
  }

  #decoded(record: RamPagesRecord, i: number): Uint8Array {
    const offset = record.bytesOffset + record.positions[i]!
    if ((record.flags[i]! & ramFlag.compressPage) === 0) {
      throw new UnsupportedError(`XBZRLE page at offset ${offset}: a RAM image takes whole pages; index the stream as VmState and store that`, ['XBZRLE'])
    }
    const page = (this.#scratch ??= new Uint8Array(record.pageSize))
    const at = record.positions[i]!
    inflatePage(record.bytes.subarray(at, at + record.lengths[i]!), page, offset)
    return page
  }

  async #drain(limit: number): Promise<void> {
    const { store } = this.#memory!
    store.open(await (this.#image ??= this.#create(alignBlock(this.#size))))
    await store.drain(limit, this.#options.signal)
  }

  #layout(): RamImageLayout {
    const pageSize = this.#pageSize
    const restLength = this.#restLength
    const blocks = this.#blocks.map((block) => ({ ...block, absent: absentRanges(this.#seen, block.position, block.length, pageSize) }))
    return { pageSize, restLength, pagesAt: this.#pagesAt ?? restLength, blocks }
  }
}
