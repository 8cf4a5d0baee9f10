/**
 * The body of the `ram` section: the list of RAM blocks and the page records. Owns the current RAM
 * block (it survives the end of a section) and the arrays that page batches use; knows nothing of
 * how sections are framed.
 *
 * ```
 * be64 page offset | flags    [u8 length, block name]    payload
 *                              absent with CONTINUE       ZERO: u8 0   PAGE: the page
 *                                                         XBZRLE: u8 1, be16 n, n bytes
 *                                                         COMPRESS_PAGE: be32 n, n bytes
 * ```
 */
import { UnsupportedError } from '../core/errors.ts'
import { compressedPageLimit, hex, limits, ramFlag, streamError } from './format.ts'
import type { ParserInput } from './input.ts'
import { passThrough, type Passage } from './pass-through.ts'
import type { MappedRamHeader, MigrationRecord, RamBlock, RamPagesRecord } from './records.ts'

const structure = 'RAM section'
/** Pages in one batch at most: keeps the arrays small enough to stay in the processor's cache. */
const capacity = 1024
const two32 = 0x1_0000_0000
const rawPage = ramFlag.page | ramFlag.continue

/** What the configuration section and the caller said about the `ram` section. */
export interface RamSectionOptions {
  readonly pageSize: number
  /** Capability `x-ignore-shared`: the block list has guest physical addresses. */
  readonly ignoreShared: boolean
  /** Capability `mapped-ram`: the block list has the pages within it. */
  readonly mappedRam: boolean
  /** Blocks known from an earlier connection (postcopy recovery). */
  readonly blocks?: readonly RamBlock[] | undefined
}

/** Reads the bodies of all `ram` sections of one stream. */
export class RamSection {
  readonly blocks: RamBlock[] = []
  readonly pageSize: number
  readonly #byName = new Map<string, RamBlock>()
  readonly #options: RamSectionOptions
  readonly #flags = new Uint16Array(capacity)
  readonly #pageOffsets = new Float64Array(capacity)
  readonly #positions = new Uint32Array(capacity)
  readonly #lengths = new Uint32Array(capacity)
  #current: RamBlock | undefined
  /** Bytes of blocks still to be listed; undefined outside the list. */
  #unlisted: number | undefined
  /** Parts of a mapped-ram block that are passed through next. */
  passages: Passage[] = []

  constructor(options: RamSectionOptions) {
    this.#options = options
    this.pageSize = options.pageSize
    for (const block of options.blocks ?? []) {
      this.blocks.push(block)
      this.#byName.set(block.name, block)
    }
  }

  /**
   * The next record of a body. A `ram-mark` record with mark `eos` is its last. Null asks for more input
   * as `underrun` does, but pages at the end of every chunk should not cost an exception.
   */
  next(input: ParserInput): MigrationRecord | null {
    const passed = passThrough(input, this.passages)
    if (passed !== undefined) return passed
    return this.#unlisted === undefined || this.#unlisted === 0 ? this.#record(input) : this.#listEntry(input)
  }

  #record(input: ParserInput): MigrationRecord | null {
    this.#unlisted = undefined
    const pages = this.#pages(input)
    return pages === undefined ? this.#mark(input) : pages
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
    const block = this.#byName.get(name)
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
        this.#unlisted = total
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

  #listEntry(input: ParserInput): MigrationRecord {
    const offset = input.offset
    const name = input.counted('RAM block list', 'block name')
    const lengthOffset = input.offset
    const length = input.u64('RAM block list', 'length')
    const unlisted = this.#unlisted! - length
    const problem = this.#listProblem(name, length, unlisted)
    if (problem !== undefined) throw streamError('RAM block list', 'length', problem, lengthOffset)
    const { mappedRam, ignoreShared } = this.#options
    const hostPageSize = mappedRam ? undefined : this.#hostPageSize(input, ignoreShared ? 8 : 0, unlisted === 0)
    const gpa = ignoreShared ? input.u64('RAM block list', 'guest physical address') : undefined
    const mapped = mappedRam ? this.#mappedHeader(input, length) : undefined
    const block: RamBlock = {
      index: this.blocks.length,
      name,
      length,
      ...(hostPageSize !== undefined && { hostPageSize }),
      ...(gpa !== undefined && { gpa }),
      ...(mapped !== undefined && { mapped }),
    }
    this.blocks.push(block)
    this.#byName.set(name, block)
    this.#unlisted = unlisted
    return { kind: 'ram-block', offset, length: input.offset - offset, block }
  }

  #listProblem(name: string, length: number, unlisted: number): string | undefined {
    if (this.#byName.has(name)) return `RAM block '${name}' is listed twice`
    if (length === 0 || length % this.pageSize !== 0) return `RAM block '${name}' has ${length} bytes, not a multiple of the page size ${this.pageSize}`
    if (length > limits.ramBlockLength) return `RAM block '${name}' has ${length} bytes, allowed up to ${limits.ramBlockLength}`
    if (unlisted < 0) return `RAM block '${name}' of ${length} bytes makes the sum of lengths exceed the total by ${-unlisted}`
    if (this.blocks.length >= limits.ramBlocks) return `more than ${limits.ramBlocks} RAM blocks`
    return undefined
  }

  /**
   * The page size field has no mark of its own. But it begins with a zero byte, which no name's
   * length is; and behind the last entry, its low bits are zero, which no record's flags are.
   */
  #hostPageSize(input: ParserInput, behind: number, last: boolean): number | undefined {
    input.require(behind + (last ? 8 : 1))
    const at = input.at + behind
    const present = last ? (input.view.getUint32(at + 4) & (this.pageSize - 1)) === 0 : input.bytes[at] === 0
    if (!present) return undefined
    const offset = input.offset
    const size = input.u64('RAM block list', 'page size')
    if (size < this.pageSize || size > 2 ** 40 || Math.log2(size) % 1 !== 0) {
      throw streamError('RAM block list', 'page size', `host page size ${size} is not a power of two from ${this.pageSize}`, offset)
    }
    return size
  }

  /** The mapped-ram header; bitmap and pages, which follow in the file, are passed through. */
  #mappedHeader(input: ParserInput, length: number): MappedRamHeader {
    const where = 'mapped-ram header'
    const start = input.offset
    const version = input.u32()
    const pageSize = input.u64(where, 'page size')
    const bitmapOffset = input.u64(where, 'bitmap offset')
    const pagesOffset = input.u64(where, 'pages offset')
    if (version !== 1) throw streamError(where, 'version', `version is ${version}, expected 1`, start)
    if (pageSize !== this.pageSize) throw streamError(where, 'page size', `page size is ${pageSize}, the target's is ${this.pageSize}`, start + 4)
    const bitmapLength = mappedRamBitmapLength(length, pageSize)
    if (bitmapOffset < input.offset) throw streamError(where, 'bitmap offset', `bitmap at ${bitmapOffset} overlaps what is before it`, start + 12)
    if (pagesOffset < bitmapOffset + bitmapLength || pagesOffset % pageSize !== 0) {
      throw streamError(where, 'pages offset', `pages at ${pagesOffset}, expected a multiple of ${pageSize} behind the bitmap`, start + 20)
    }
    this.passages = [
      { of: 'mapped-ram-padding', length: bitmapOffset - input.offset },
      { of: 'mapped-ram-bitmap', length: bitmapLength },
      { of: 'mapped-ram-padding', length: pagesOffset - bitmapOffset - bitmapLength },
      { of: 'mapped-ram-pages', length },
    ]
    return { version, pageSize, bitmapOffset, pagesOffset }
  }
}

/** Bytes of the page bitmap of a mapped-ram block: whole 64-bit words. */
export function mappedRamBitmapLength(blockLength: number, pageSize: number): number {
  return Math.ceil(blockLength / pageSize / 64) * 8
}

function fillError(fill: number, offset: number): Error {
  return streamError(structure, 'fill byte', `zero page with fill byte ${hex(fill)}, expected 0x0`, offset)
}
