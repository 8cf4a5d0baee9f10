/**
 * Where each guest page lies in a stored stream: for each RAM block one array with an entry for each
 * page. Owns the rule that the last copy of a page counts, and the side table of pages that are not
 * stored raw (XBZRLE deltas on an earlier copy, zlib streams); does no I/O.
 *
 * Entry of a page: 0 absent, 1 zero, greater: file offset of the raw page (none begins before byte
 * 8), negative: -(1 + number in the side table).
 */
import { UnsupportedError } from '../core/errors.ts'
import { streamError, ramFlag } from './format.ts'
import { PageTable, segmentLength, segmentPages } from './page-table.ts'
import type { RamBlock, RamPagesRecord } from './records.ts'

/** The entry of a page that the stream does not contain. */
export const absentPage = 0
/** The entry of a zero page. */
export const zeroPage = 1

const noEntries: Float64Array = new Float64Array(0)

/** How many page records of each sort a stream has. */
export interface PageCounts {
  /** Raw pages. */
  normal: number
  /** Zero pages. */
  zero: number
  xbzrle: number
  /** zlib pages of QEMU up to 9.0. */
  compressed: number
  /** Records for a page that came before. */
  duplicate: number
}

/** Pages of a RAM block that lie beside their stream, in bytes. A page that is only partly within counts whole. */
export interface PageRange {
  /** Index of the block. */
  readonly block: number
  readonly offset: number
  readonly length: number
  /** Where the first byte is in the device that holds the pages; or that they are zero, or that the stream had none. */
  readonly content: number | 'zero' | 'absent'
}

/** A page that is not stored raw. */
export interface EncodedPage {
  readonly kind: 'xbzrle' | 'compressed'
  /** File offset of the delta or zlib stream. */
  readonly position: number
  /** Its length in bytes. */
  readonly length: number
  /** For a delta: the entry of the copy it applies to. */
  readonly base: number
}

/** The index of all RAM blocks of one stream. */
export class RamIndex {
  readonly counts: PageCounts = { normal: 0, zero: 0, xbzrle: 0, compressed: 0, duplicate: 0 }
  readonly pageSize: number
  /** Entries by block index, then by page. */
  readonly entries: PageTable[] = []
  readonly #encoded = new EncodedPages()
  /** Segments of all tables. */
  #segments = 0

  constructor(pageSize: number) {
    this.pageSize = pageSize
  }

  /** Adds a block whose pages are all absent so far. */
  addBlock(block: RamBlock): void {
    this.entries[block.index] = new PageTable(block.length / this.pageSize)
  }

  /** Takes in a batch of pages of a stream that lies in the file as it was parsed. */
  addPages(record: RamPagesRecord): void {
    const entries = this.entries[record.block.index]!
    const { count, flags, pageOffsets, positions, bytesOffset, pageSize } = record
    const { counts } = this
    let first = -1
    let segment: Float64Array = noEntries
    for (let i = 0; i < count; i++) {
      const number = pageOffsets[i]! / pageSize
      const page = number % segmentPages
      if (number - page !== first) {
        first = number - page
        const before = entries.segments
        segment = entries.segment(number)
        this.#segments += entries.segments - before
        if (this.#segments * segmentLength > leastMemory + memoryPerByte * record.offset) throw this.#scattered(record)
      }
      const flag = flags[i]!
      const before = segment[page]!
      if (before !== absentPage) counts.duplicate++
      if ((flag & ramFlag.page) !== 0) {
        counts.normal++
        segment[page] = bytesOffset + positions[i]!
      } else if ((flag & ramFlag.zero) !== 0) {
        counts.zero++
        segment[page] = zeroPage
      } else {
        segment[page] = this.#addEncoded(record, i, before)
      }
    }
  }

  /** Takes all pages of a mapped-ram block as zero, until its bitmap says otherwise. */
  beginMapped(block: RamBlock): void {
    const entries = this.entries[block.index]!
    entries.fill(zeroPage)
    this.counts.zero += entries.pages
  }

  /**
   * Marks the pages whose bits are set in a piece of a mapped-ram bitmap as raw.
   * @param first Number of the bitmap's byte that the piece begins with
   * @throws FormatError (`ERR_STREAM`) for bits beyond the last page
   */
  addMapped(block: RamBlock, bitmap: Uint8Array, first: number): void {
    const entries = this.entries[block.index]!
    const { pagesOffset, bitmapOffset } = block.mapped!
    for (let i = 0; i < bitmap.length; i++) {
      const byte = bitmap[i]!
      if (byte === 0) continue
      for (let bit = 0; bit < 8; bit++) {
        if ((byte & (1 << bit)) === 0) continue
        const page = (first + i) * 8 + bit
        if (page >= entries.pages) {
          throw streamError('mapped-ram bitmap', 'bitmap', `bit ${page} of RAM block '${block.name}' is set; it has ${entries.pages} pages`, bitmapOffset)
        }
        entries.set(page, pagesOffset + page * this.pageSize)
        this.counts.normal++
        this.counts.zero--
      }
    }
  }

  /** Takes in pages that lie beside their stream, at `base` and more in the file; of ranges that overlap the last counts. */
  addRanges(ranges: readonly PageRange[], base: number): void {
    for (const { block, offset, length, content } of ranges) {
      const entries = this.entries[block]!
      const end = Math.ceil((offset + length) / this.pageSize)
      if (offset === 0 && end === entries.pages && typeof content !== 'number') {
        entries.fill(content === 'zero' ? zeroPage : absentPage)
        continue
      }
      const first = Math.floor(offset / this.pageSize)
      const before = entries.segments
      if (typeof content === 'number') for (let page = first; page < end; page++) entries.set(page, base + content - offset + page * this.pageSize)
      else entries.fillRange(first, end, content === 'zero' ? zeroPage : absentPage)
      this.#segments += entries.segments - before
      if (this.#segments * segmentLength > mostMemory) {
        throw new UnsupportedError(`the pages of this VM are scattered over more memory than is indexed: their tables would take more than ${mostMemory} bytes`, ['index of pages'])
      }
    }
    for (const entries of this.entries) {
      entries.forEachRun((entry, pages) => {
        if (entry === zeroPage) this.counts.zero += pages
        else if (entry !== absentPage) this.counts.normal += pages
      })
    }
  }

  /** Takes every page of a mapped-ram block as raw, whatever its bitmap says. */
  markAllMapped(block: RamBlock): void {
    const entries = this.entries[block.index]!
    for (let page = 0; page < entries.pages; page++) entries.set(page, block.mapped!.pagesOffset + page * this.pageSize)
    this.counts.normal += entries.pages
    this.counts.zero -= entries.pages
  }

  /** The page that a negative entry stands for. */
  encoded(entry: number): EncodedPage {
    return this.#encoded.get(-1 - entry)
  }

  #addEncoded(record: RamPagesRecord, i: number, before: number): number {
    const position = record.bytesOffset + record.positions[i]!
    const length = record.lengths[i]!
    const delta = (record.flags[i]! & ramFlag.xbzrle) !== 0
    if (delta && before === absentPage) {
      const page = `page at ${record.pageOffsets[i]} of RAM block '${record.block.name}'`
      throw streamError('RAM section', 'XBZRLE', `a delta for the ${page}, which did not come before`, position)
    }
    if (delta) this.counts.xbzrle++
    else this.counts.compressed++
    if (delta && length === 0) return before // it changes nothing
    return -this.#encoded.add(position, length, delta ? before : absentPage)
  }

  #scattered({ block, offset }: RamPagesRecord): Error {
    return streamError('RAM section', 'page offset', `the pages of RAM block '${block.name}' are scattered: they would take more memory than their stream has bytes`, offset)
  }
}

/** Bytes of the tables that any stream may take, and those for each byte of a stream: whole pages take two. */
const leastMemory = 32 << 20
const memoryPerByte = 3
/** Bytes of the tables for pages that lie beside their stream: enough for 512 GiB of memory that is in use. */
const mostMemory = 2 ** 30
/** Pages in a piece of the side table. */
const pieceEntries = 16_384

/** The side table: 20 bytes for each page that is not stored raw, in pieces, so that growing copies nothing. */
class EncodedPages {
  readonly #pieces: { readonly positions: Float64Array; readonly bases: Float64Array; readonly lengths: Uint32Array }[] = []
  #count = 0

  /** Adds an entry; gives how many there are. A base of {@link absentPage} says that the page is compressed. */
  add(position: number, length: number, base: number): number {
    const at = this.#count % pieceEntries
    if (at === 0) this.#pieces.push({ positions: new Float64Array(pieceEntries), bases: new Float64Array(pieceEntries), lengths: new Uint32Array(pieceEntries) })
    const piece = this.#pieces.at(-1)!
    piece.positions[at] = position
    piece.bases[at] = base
    piece.lengths[at] = length
    return ++this.#count
  }

  get(number: number): EncodedPage {
    const piece = this.#pieces[Math.floor(number / pieceEntries)]!
    const at = number % pieceEntries
    const base = piece.bases[at]!
    return { kind: base === absentPage ? 'compressed' : 'xbzrle', position: piece.positions[at]!, length: piece.lengths[at]!, base }
  }
}
