/**
 * The list of RAM blocks at the start of the `ram` section. Owns the blocks of a stream and the fields that their
 * entries may have; records behind the list are the section's.
 *
 * ```
 * u8 length, name | be64 length | [be64 host page size] | [be64 guest physical address] | [mapped-ram header]
 * mapped-ram header: be32 version 1, be64 page size, be64 bitmap offset, be64 pages offset
 * ```
 */
import { limits, streamError } from './format.ts'
import type { ParserInput } from './input.ts'
import type { Passage } from './pass-through.ts'
import type { MappedRamHeader, RamBlock, RamBlockRecord } from './records.ts'

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

/** Reads the list; it is complete when the lengths add up to the total that came before it. */
export class RamBlockList {
  /** Listed so far. */
  readonly blocks: RamBlock[] = []
  readonly #byName = new Map<string, RamBlock>()
  readonly #options: RamSectionOptions
  /** Bytes of blocks still to be listed. */
  #unlisted = 0

  constructor(options: RamSectionOptions) {
    this.#options = options
    for (const block of options.blocks ?? []) {
      this.blocks.push(block)
      this.#byName.set(block.name, block)
    }
  }

  /** An entry comes next. */
  get isOpen(): boolean {
    return this.#unlisted > 0
  }

  /** The block of that name. */
  find(name: string): RamBlock | undefined {
    return this.#byName.get(name)
  }

  /** The list of blocks of `total` bytes begins. */
  begin(total: number): void {
    this.#unlisted = total
  }

  /** The next entry. */
  next(input: ParserInput): RamBlockRecord {
    const offset = input.offset
    const name = input.counted('RAM block list', 'block name')
    const lengthOffset = input.offset
    const length = input.u64('RAM block list', 'length')
    const unlisted = this.#unlisted - length
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
    if (length === 0 || length % this.#options.pageSize !== 0) return `RAM block '${name}' has ${length} bytes, not a multiple of the page size ${this.#options.pageSize}`
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
    const present = last ? (input.view.getUint32(at + 4) & (this.#options.pageSize - 1)) === 0 : input.bytes[at] === 0
    if (!present) return undefined
    const offset = input.offset
    const size = input.u64('RAM block list', 'page size')
    if (size < this.#options.pageSize || size > 2 ** 40 || Math.log2(size) % 1 !== 0) {
      throw streamError('RAM block list', 'page size', `host page size ${size} is not a power of two from ${this.#options.pageSize}`, offset)
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
    if (pageSize !== this.#options.pageSize) throw streamError(where, 'page size', `page size is ${pageSize}, the target's is ${this.#options.pageSize}`, start + 4)
    const bitmapLength = mappedRamBitmapLength(length, pageSize)
    if (bitmapOffset < input.offset) throw streamError(where, 'bitmap offset', `bitmap at ${bitmapOffset} overlaps what is before it`, start + 12)
    if (pagesOffset < bitmapOffset + bitmapLength || pagesOffset % pageSize !== 0) {
      throw streamError(where, 'pages offset', `pages at ${pagesOffset}, expected a multiple of ${pageSize} behind the bitmap`, start + 20)
    }
    return { version, pageSize, bitmapOffset, pagesOffset }
  }
}

/** What is passed through behind an entry that ends at `offset`: of a mapped-ram file the bitmap and the pages. */
export function passagesOf({ mapped, length }: RamBlock, offset: number): Passage[] {
  if (mapped === undefined) return []
  const bitmapLength = mappedRamBitmapLength(length, mapped.pageSize)
  return [
    { of: 'mapped-ram-padding', length: mapped.bitmapOffset - offset },
    { of: 'mapped-ram-bitmap', length: bitmapLength },
    { of: 'mapped-ram-padding', length: mapped.pagesOffset - mapped.bitmapOffset - bitmapLength },
    { of: 'mapped-ram-pages', length },
  ]
}

/** Bytes of the page bitmap of a mapped-ram block: whole 64-bit words. */
export function mappedRamBitmapLength(blockLength: number, pageSize: number): number {
  return Math.ceil(blockLength / pageSize / 64) * 8
}
