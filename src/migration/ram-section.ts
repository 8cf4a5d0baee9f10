/**
 * The body of the `ram` section: page records and marks. Owns the current RAM block (it survives the end of a section)
 * and the arrays that page batches use; the list of blocks is next door. Knows nothing of how sections are framed.
 *
 * ```
 * be64 page offset | flags    [u8 length, block name]    payload
 *                              absent with CONTINUE       ZERO: u8 0   PAGE: the page
 *                                                         XBZRLE: u8 1, be16 n, n bytes
 *                                                         COMPRESS_PAGE: be32 n, n bytes
 * ```
 */
import { UnsupportedError } from '../core/errors.ts'
import { compressedPageLimit, hex, ramFlag, streamError } from './format.ts'
import type { ParserInput } from './input.ts'
import { passThrough, type Passage } from './pass-through.ts'
import { passagesOf, RamBlockList, type RamSectionOptions } from './ram-block-list.ts'
import type { MigrationRecord, RamBlock, RamBlockRecord, RamPagesRecord } from './records.ts'

const structure = 'RAM section'
/** Pages in one batch at most: keeps the arrays small enough to stay in the processor's cache. */
const capacity = 1024
const two32 = 0x1_0000_0000
const rawPage = ramFlag.page | ramFlag.continue

/** Reads the bodies of all `ram` sections of one stream. */
export class RamSection {
  readonly pageSize: number
  readonly #list: RamBlockList
  readonly #flags = new Uint16Array(capacity)
  readonly #pageOffsets = new Float64Array(capacity)
  readonly #positions = new Uint32Array(capacity)
  readonly #lengths = new Uint32Array(capacity)
  #current: RamBlock | undefined
  /** Parts of a mapped-ram block that are passed through next. */
  passages: Passage[] = []

  constructor(options: RamSectionOptions) {
    this.pageSize = options.pageSize
    this.#list = new RamBlockList(options)
  }

  /** The blocks listed so far. */
  get blocks(): readonly RamBlock[] {
    return this.#list.blocks
  }

  /**
   * The next record of a body. A `ram-mark` record with mark `eos` is its last. Null asks for more input
   * as `underrun` does, but pages at the end of every chunk should not cost an exception.
   */
  next(input: ParserInput): MigrationRecord | null {
    const passed = passThrough(input, this.passages)
    if (passed !== undefined) return passed
    if (this.#list.isOpen) return this.#listEntry(input)
    const pages = this.#pages(input)
    return pages === undefined ? this.#mark(input) : pages
  }

  #listEntry(input: ParserInput): RamBlockRecord {
    const record = this.#list.next(input)
    this.passages = passagesOf(record.block, input.offset)
    return record
  }

  /**
   * As many page records of one block as the window holds; null if it ends within the first, undefined if
   * the next record is no page.
   */
  #pages(input: ParserInput): RamPagesRecord | null | undefined {
    const { view, end, bytes } = input
    const { pageSize } = this
    const mask = pageSize - 1
    const flagsOut = this.#flags
    const offsetsOut = this.#pageOffsets
    const positionsOut = this.#positions
    const lengthsOut = this.#lengths
    let lastPage = this.#current === undefined ? -1 : this.#current.length - pageSize
    let at = input.at
    let count = 0
    let wanted = 0
    while (count < capacity) {
      // Nearly all records are raw pages of the same block: these few lines decide the speed.
      while (end - at >= 8 + pageSize && count < capacity) {
        const low = view.getUint32(at + 4)
        if ((low & mask) !== rawPage) break
        const pageOffset = view.getUint32(at) * two32 + (low - rawPage)
        if (pageOffset > lastPage) throw this.#outside(pageOffset, input.base + at)
        flagsOut[count] = rawPage
        offsetsOut[count] = pageOffset
        positionsOut[count] = at + 8
        lengthsOut[count] = pageSize
        count++
        at += 8 + pageSize
      }
      if (count === capacity) break
      if (end - at < 8) {
        wanted = 8
        break
      }
      const low = view.getUint32(at + 4)
      const flags = low & mask
      let payload = at + 8
      let length: number
      switch (flags & ~ramFlag.continue) {
        case ramFlag.page:
          length = pageSize
          break
        case ramFlag.zero:
          length = 1
          break
        case ramFlag.xbzrle:
        case ramFlag.compressPage:
          length = -1
          break
        default:
          length = -2
      }
      if (length === -2) break
      if ((flags & ramFlag.continue) === 0) {
        if (count > 0) break
        payload = this.#enterBlock(input)
        lastPage = this.#current!.length - pageSize
      }
      if (length === -1) {
        const head = (flags & ramFlag.xbzrle) === 0 ? 4 : 3
        if (end - payload < head) {
          wanted = payload - at + head
          break
        }
        length = this.#encodedLength(input, payload, head)
        payload += head
      }
      if (end - payload < length) {
        wanted = payload - at + length
        break
      }
      const pageOffset = view.getUint32(at) * two32 + (low - flags)
      if (pageOffset > lastPage) throw this.#outside(pageOffset, input.base + at)
      if (length === 1 && (flags & ramFlag.zero) !== 0 && bytes[payload] !== 0) throw fillError(bytes[payload]!, input.base + payload)
      flagsOut[count] = flags
      offsetsOut[count] = pageOffset
      positionsOut[count] = payload
      lengthsOut[count] = length
      count++
      at = payload + length
    }
    if (count > 0) return this.#batch(input, at, count)
    if (wanted === 0) return undefined
    input.want(wanted)
    return null
  }

  #batch(input: ParserInput, at: number, count: number): RamPagesRecord {
    const length = at - input.at
    const offset = input.offset
    input.at = at
    return {
      kind: 'ram-pages',
      offset,
      length,
      block: this.#current!,
      pageSize: this.pageSize,
      count,
      flags: this.#flags,
      pageOffsets: this.#pageOffsets,
      positions: this.#positions,
      lengths: this.#lengths,
      bytes: input.bytes,
      bytesOffset: input.base,
    }
  }

  /** Reads the block's name behind the be64 at the input's position; gives the position behind the name. */
  #enterBlock(input: ParserInput): number {
    const start = input.at
    input.require(9)
    input.at += 8
    const nameOffset = input.offset
    const name = input.counted(structure, 'block name')
    const payload = input.at
    input.at = start
    const block = this.#list.find(name)
    if (block === undefined) throw streamError(structure, 'block name', `RAM block '${name}' is not in the list of blocks`, nameOffset)
    this.#current = block
    return payload
  }

  #encodedLength(input: ParserInput, at: number, head: number): number {
    const { view, base } = input
    if (head === 4) {
      const length = view.getUint32(at)
      const limit = compressedPageLimit(this.pageSize)
      if (length >= 1 && length <= limit) return length
      throw streamError(structure, 'compressed length', `compressed page of ${length} bytes, allowed 1 to ${limit}`, base + at)
    }
    const encoding = view.getUint8(at)
    if (encoding !== 1) throw streamError(structure, 'XBZRLE header', `XBZRLE encoding is ${hex(encoding)}, expected 0x1`, base + at)
    const length = view.getUint16(at + 1)
    if (length <= this.pageSize) return length
    throw streamError(structure, 'XBZRLE length', `XBZRLE delta of ${length} bytes, allowed 0 to ${this.pageSize}`, base + at + 1)
  }

  #outside(pageOffset: number, offset: number): Error {
    if (this.#current === undefined) {
      return streamError(structure, 'flags', 'CONTINUE before any RAM block was named', offset)
    }
    const { name, length } = this.#current
    return streamError(structure, 'page offset', `page at ${hex(pageOffset)} is outside RAM block '${name}' of ${length} bytes`, offset)
  }

  /** A record that is no page: the start of the block list or a mark. */
  #mark(input: ParserInput): MigrationRecord {
    const start = input.offset
    input.require(8)
    const flags = input.view.getUint32(input.at + 4) & (this.pageSize - 1)
    const total = input.u64(structure, 'page offset') - flags
    const span = { offset: start, length: 8 }
    switch (flags) {
      case ramFlag.memSize:
        if (this.blocks.length > 0) throw streamError(structure, 'flags', 'a second list of RAM blocks', start)
        this.#list.begin(total)
        return { kind: 'ram-size', ...span, total }
      case ramFlag.eos:
        if (total !== 0) break
        return { kind: 'ram-mark', ...span, mark: 'eos' }
      case ramFlag.multifdFlush:
        if (total !== 0) break
        return { kind: 'ram-mark', ...span, mark: 'multifd-flush' }
      case ramFlag.hook:
      case ramFlag.hook | ramFlag.continue:
        throw new UnsupportedError(`${structure}: HOOK record (RDMA transport) at offset ${start}; it cannot be read from a stream`, [
          'RAM_SAVE_FLAG_HOOK',
        ])
      case ramFlag.full:
        throw streamError(structure, 'flags', 'flag FULL (0x1) is obsolete', start)
    }
    throw streamError(structure, 'flags', `record ${hex(total)} with flags ${hex(flags)} is not one of ZERO, PAGE, XBZRLE, COMPRESS_PAGE, MEM_SIZE, EOS, MULTIFD_FLUSH`, start)
  }
}

function fillError(fill: number, offset: number): Error {
  return streamError(structure, 'fill byte', `zero page with fill byte ${hex(fill)}, expected 0x0`, offset)
}
