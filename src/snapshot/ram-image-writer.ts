/**
 * Writes a RAM image from a migration stream as it comes in. Owns what is written for a gathered area:
 * whole clusters of pages, nothing for zeroes, only changes over a backing file; and the order in which
 * the image becomes a saved VM.
 */
import type { CallOptions } from '../block/device.ts'
import type { Source } from '../block/source.ts'
import { UnsupportedError } from '../core/errors.ts'
import { RangeLock } from '../core/lock.ts'
import { inflatePage } from '../migration/compressed-page.ts'
import { ramFlag } from '../migration/format.ts'
import type { MigrationRecord, RamBlock, RamPagesRecord } from '../migration/records.ts'
import { StreamRest } from '../migration/stream-rest.ts'
import { encodeRecord } from '../migration/writer.ts'
import { equalBytes } from '../bytes/equal.ts'
import { isZero } from '../bytes/zero.ts'
import { Qcow2Image, type CreateOptions } from '../qcow2/image.ts'
import type { SnapshotInfo } from '../qcow2/snapshot-info.ts'
import { alignBlock, encodeLayout, type AbsentRange, type RamImageBlock } from './ram-image-layout.ts'
import { PageGatherer, pageState, type PageArea } from './ram-image-pages.ts'
import type { SaveSink } from './save-sink.ts'

/** Most RAM, in bytes (4 TiB): bounds the bit map of pages. */
const maxMemory = 2 ** 42

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
  /** Direct I/O for paths: past the page cache. Default false. */
  readonly direct?: boolean | undefined
  /** Which files the image may open as its backing file; see {@link Qcow2Image.create}. */
  readonly references?: CreateOptions['references']
}

/** What was stored. All in bytes. */
export interface RamImageStatistics {
  /** Written to the disk of the image. */
  written: number
  /** Pages with content that the backing file has already. */
  unchanged: number
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
  /** Bytes of the disk that are written together; at least a page. */
  #unit: number
  readonly #limit: number
  readonly #filter = new StreamRest()
  readonly #rest: Uint8Array[] = []
  readonly #locks = new RangeLock()
  readonly #blocks: RamImageBlock[] = []
  readonly #positions: number[] = []
  readonly #waiting: PageArea[] = []
  readonly #writing = new Set<Promise<void>>()
  #restLength = 0
  #pagesAt: number | undefined
  #size = 0
  #pageSize = 4096
  #gatherer: PageGatherer | undefined
  /** One bit a page of the disk: it came. */
  #seen: Uint8Array = new Uint8Array(0)
  /** One byte a unit of the disk: it was written. */
  #written: Uint8Array = new Uint8Array(0)
  #image: Qcow2Image | undefined
  #bytesInFlight = 0
  #failure: { error: unknown } | undefined
  #scratch: Uint8Array | undefined
  /** For what the backing file holds; used again. */
  readonly #spareBases: Uint8Array[] = []
  #snapshot: SnapshotInfo | undefined

  constructor(create: (size: number) => Promise<Qcow2Image>, options: RamImageWriterOptions = {}) {
    this.#create = create
    this.#options = options
    this.#unit = options.unit ?? 65_536
    this.#limit = options.inFlight ?? 8 << 20
  }

  /** A writer that makes a new image in `target`, a path or an empty device. */
  static to(target: Source, options: NewRamImageOptions = {}): RamImageWriter {
    const { backing, direct, references, signal } = options
    const incremental = backing !== undefined
    const extendedL2 = options.extendedL2 ?? incremental
    const clusterSize = options.clusterSize ?? (extendedL2 ? 131_072 : 65_536)
    const create = (size: number): Promise<Qcow2Image> =>
      Qcow2Image.create(target, { size, clusterSize, extendedL2, backing, direct, references, signal })
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
    if (this.#failure === undefined && this.#waiting.length === 0 && this.#bytesInFlight <= this.#limit) return undefined
    return this.#drain(this.#limit)
  }

  /** Makes the image durable and a saved VM; the image is closed. */
  async finish(): Promise<void> {
    if (this.#gatherer === undefined) this.#begin()
    this.#gatherer!.flush()
    await this.#drain(0)
    const image = this.#image!
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
  async abort(_reason?: unknown): Promise<void> {
    this.#failure ??= { error: new Error('the RAM image was given up') }
    await Promise.allSettled(this.#writing)
    await this.#image?.close()
  }

  #addBlock(block: RamBlock): void {
    const position = alignBlock(this.#size)
    this.#blocks.push({ name: block.name, length: block.length, position, ...(block.gpa !== undefined && { gpa: block.gpa }), absent: [] })
    this.#positions[block.index] = position
    this.#size = position + block.length
  }

  /** The list of blocks is complete. */
  #begin(): PageGatherer {
    const size = alignBlock(this.#size)
    if (size > maxMemory) throw new UnsupportedError(`the stream lists ${size} bytes of RAM; a RAM image holds up to ${maxMemory}`, ['RAM size'])
    this.#unit = Math.max(this.#unit, this.#pageSize)
    this.#seen = new Uint8Array(Math.ceil(size / this.#pageSize / 8))
    this.#written = new Uint8Array(Math.ceil(size / this.#unit))
    return (this.#gatherer = new PageGatherer({
      pageSize: this.#pageSize,
      clusterSize: this.#unit,
      emit: (area) => {
        this.#bytesInFlight += area.bytes.length
        if (this.#image === undefined || this.#waiting.length > 0) this.#waiting.push(area)
        else this.#store(area)
      },
    }))
  }

  #pages(record: RamPagesRecord): void {
    this.#pageSize = record.pageSize
    const gatherer = this.#gatherer ?? this.#begin()
    const base = this.#positions[record.block.index]!
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
    const { signal } = this.#options
    for (;;) {
      signal?.throwIfAborted()
      if (this.#failure !== undefined) throw this.#failure.error
      this.#image ??= await this.#create(alignBlock(this.#size))
      for (const area of this.#waiting.splice(0)) this.#store(area)
      if (this.#bytesInFlight <= limit || this.#writing.size === 0) return
      await Promise.race(this.#writing)
    }
  }

  #store(area: PageArea): void {
    const task = this.#storeLocked(area)
      .catch((error: unknown) => {
        this.#failure ??= { error }
      })
      .finally(() => {
        this.#writing.delete(task)
        this.#bytesInFlight -= area.bytes.length
        this.#gatherer!.recycle(area)
      })
    this.#writing.add(task)
  }

  /** A page that comes again may be in two areas: they are stored one after the other. */
  async #storeLocked(area: PageArea): Promise<void> {
    const release = this.#locks.tryAcquire(area.base, area.base + area.bytes.length) ?? (await this.#locks.acquire(area.base, area.base + area.bytes.length))
    try {
      if (this.#options.incremental === true) await this.#completeFromBase(area)
      await this.#writeRuns(area)
    } finally {
      release()
    }
  }

  /** Over a backing file, units are completed with what they hold; those that would not change are left out. */
  async #completeFromBase(area: PageArea): Promise<void> {
    const { length } = area.bytes
    const buffer = this.#spareBases.pop() ?? new Uint8Array(Math.max(1 << 20, this.#unit))
    const base = buffer.subarray(0, length)
    const inside = Math.min(length, this.#image!.size - area.base)
    await this.#image!.readInto(area.base, base.subarray(0, inside))
    base.fill(0, inside)
    this.#keepChanged(area, base)
    this.#spareBases.push(buffer)
  }

  /** Units that differ from what the backing file has become data as a whole, the others missing. */
  #keepChanged(area: PageArea, base: Uint8Array): void {
    const pageSize = this.#pageSize
    const unitPages = this.#unit / pageSize
    for (let first = 0; first < area.pages.length; first += unitPages) {
      let changed = false
      let present = 0
      for (let page = first; page < first + unitPages; page++) {
        const at = page * pageSize
        const state = area.pages[page]!
        if (state === pageState.missing) {
          area.bytes.set(base.subarray(at, at + pageSize), at)
          continue
        }
        present++
        if (state === pageState.zero) area.bytes.fill(0, at, at + pageSize)
        changed ||= !equalBytes(area.bytes, base, at, pageSize)
      }
      if (!changed) this.statistics.unchanged += present * pageSize
      area.pages.fill(changed ? pageState.data : pageState.missing, first, first + unitPages)
    }
  }

  /** Writes what has to be written of an area, neighbours in one request. */
  async #writeRuns(area: PageArea): Promise<void> {
    const image = this.#image!
    const writes: Promise<void>[] = []
    for (const { start, end, zero } of this.#runs(area)) {
      if (zero) writes.push(image.writeZeroes(area.base + start, end - start))
      else writes.push(image.write(area.base + start, area.bytes.subarray(start, end)))
      this.statistics.written += zero ? 0 : end - start
    }
    await Promise.all(writes)
  }

  #runs(area: PageArea): Run[] {
    const runs: Run[] = []
    const add = (start: number, length: number, zero: boolean): void => {
      const last = runs.at(-1)
      if (last?.end === start && last.zero === zero) last.end += length
      else runs.push({ start, end: start + length, zero })
    }
    for (let at = 0; at < area.bytes.length; at += this.#unit) {
      const unit = (area.base + at) / this.#unit
      if (this.#written[unit] !== 0) this.#addPages(area, at, add)
      else if (this.#prepareUnit(area, at)) {
        const zero = isZero(area.bytes, at, this.#unit)
        if (zero && this.#options.incremental !== true) continue
        this.#written[unit] = 1
        add(at, this.#unit, zero)
      }
    }
    return runs
  }

  /** In a unit that was written before: only the pages that came now, zeroes too. */
  #addPages(area: PageArea, at: number, add: (start: number, length: number, zero: boolean) => void): void {
    const pageSize = this.#pageSize
    for (let page = at / pageSize; page < (at + this.#unit) / pageSize; page++) {
      const state = area.pages[page]
      if (state === pageState.missing) continue
      if (state === pageState.zero) area.bytes.fill(0, page * pageSize, (page + 1) * pageSize)
      add(page * pageSize, pageSize, false)
    }
  }

  /** Fills what is no data in a fresh unit with zeroes; false if there is no data: it stays unallocated. */
  #prepareUnit(area: PageArea, at: number): boolean {
    const pageSize = this.#pageSize
    const first = at / pageSize
    const last = first + this.#unit / pageSize
    let data = false
    for (let page = first; page < last; page++) data ||= area.pages[page] === pageState.data
    if (!data) return false
    for (let page = first; page < last; page++) {
      if (area.pages[page] !== pageState.data) area.bytes.fill(0, page * pageSize, (page + 1) * pageSize)
    }
    return true
  }

  #layout(): { pageSize: number; restLength: number; pagesAt: number; blocks: RamImageBlock[] } {
    const blocks = this.#blocks.map((block) => ({ ...block, absent: this.#absent(block) }))
    return { pageSize: this.#pageSize, restLength: this.#restLength, pagesAt: this.#pagesAt ?? this.#restLength, blocks }
  }

  #absent({ position, length }: RamImageBlock): AbsentRange[] {
    const ranges: [number, number][] = []
    for (let offset = 0; offset < length; offset += this.#pageSize) {
      const page = (position + offset) / this.#pageSize
      if ((this.#seen[page >>> 3]! & (1 << (page & 7))) !== 0) continue
      const last = ranges.at(-1)
      if (last !== undefined && last[0] + last[1] === offset) last[1] += this.#pageSize
      else ranges.push([offset, this.#pageSize])
    }
    return ranges
  }
}

/** Bytes of an area to be written. */
interface Run {
  readonly start: number
  end: number
  /** All of it is zero. */
  readonly zero: boolean
}
