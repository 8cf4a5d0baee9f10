/**
 * Guest RAM of a stored stream, page by page in any order. Owns turning index entries into reads:
 * neighbouring pages are read in one request, deltas applied to their base.
 */
import { checkRange, extent, type BlockDevice, type CallOptions, type Extent, type MapOptions } from '../block/device.ts'
import { ReadOnlyDevice } from '../block/read-only.ts'
import { Qcow2Error } from '../core/errors.ts'
import { inflatePage } from './compressed-page.ts'
import { limits, streamError } from './format.ts'
import type { MemoryPlacement } from './memory-placement.ts'
import type { PageTable } from './page-table.ts'
import { physicalRanges, type PhysicalMapOptions, type PhysicalRange, type PhysicalSource } from './physical-ranges.ts'
import { absentPage, zeroPage, type PageCounts, type RamIndex } from './ram-index.ts'
import type { RamBlock } from './records.ts'
import { applyXbzrle } from './xbzrle.ts'

/** Largest read for a run of neighbouring pages, in bytes. */
const maxRead = 1 << 20
/** Bytes between two pages' contents that are read along rather than skipped. */
const maxGap = 4096
/** Buffers of {@link maxRead} that are kept for the next read. */
const mostSpans = 4

/** The RAM blocks of a saved VM. */
export class RamState {
  /** In the order of the stream. */
  readonly blocks: readonly RamBlock[]
  /** Target page size in bytes. */
  readonly pageSize: number
  /** Page records in the stream, by sort. */
  readonly counts: Readonly<PageCounts>
  readonly #index: RamIndex
  readonly #device: BlockDevice
  /** For pages with their heads between them; used again: the first touch of fresh memory costs ten copies. */
  readonly #spans: Uint8Array[] = []

  readonly #source: PhysicalSource
  #ranges: readonly PhysicalRange[] | undefined

  constructor(device: BlockDevice, blocks: readonly RamBlock[], index: RamIndex, how: { readonly machine?: string | undefined; readonly placement?: MemoryPlacement | undefined } = {}) {
    this.#device = device
    this.#index = index
    this.#source = { machine: how.machine, ram: this, placement: how.placement }
    this.blocks = blocks
    this.pageSize = index.pageSize
    this.counts = index.counts
  }

  /** The block of that name or index. @throws Qcow2Error `ERR_NOT_FOUND` */
  block(which: string | number): RamBlock {
    const found = typeof which === 'number' ? this.blocks[which] : this.blocks.find(({ name }) => name === which)
    if (found !== undefined) return found
    const names = this.blocks.map(({ name }) => `'${name}'`).join(', ')
    throw new Qcow2Error('ERR_NOT_FOUND', `no RAM block ${typeof which === 'number' ? which : `'${which}'`}; there are ${names || 'none'}`)
  }

  /**
   * `length` bytes from byte `offset` of a block. Absent pages read as zeroes, as in a fresh VM.
   * @throws RangeError if the range reaches past the block
   */
  async read(which: string | number, offset: number, length: number, options?: CallOptions): Promise<Uint8Array> {
    const block = this.block(which)
    checkRange(offset, length, block.length)
    const target = new Uint8Array(length)
    await this.readInto(block, offset, target, options)
    return target
  }

  /**
   * `length` bytes at guest physical address `address`, by {@link physicalRanges}.
   * @param options `map`: where guest memory is, if the VM does not tell
   * @throws Qcow2Error `ERR_NOT_FOUND` where there is no memory; `UnsupportedError` if the addresses are not certain
   */
  async readPhysical(address: number, length: number, options: CallOptions & PhysicalMapOptions = {}): Promise<Uint8Array> {
    const ranges = options.map === undefined ? (this.#ranges ??= physicalRanges(this.#source)) : physicalRanges(this.#source, options)
    if (!Number.isSafeInteger(length) || length < 0 || length > 2 ** 32) throw new RangeError(`length must be 0 to 4294967296 bytes, not ${length}`)
    const parts = partsOf(ranges, address, length)
    if (parts === undefined) throw new Qcow2Error('ERR_NOT_FOUND', `no RAM block is known to hold ${length} bytes at guest physical address ${address}`)
    const target = new Uint8Array(length)
    for (const { block, offset, at, bytes } of parts) await this.readInto(this.block(block), offset, target.subarray(at, at + bytes), options)
    return target
  }

  /** What the stream has for the page at byte `offset` of a block. */
  pageKind(which: string | number, offset: number): 'absent' | 'zero' | 'data' {
    const block = this.block(which)
    checkRange(offset, 1, block.length)
    const entry = this.#index.entries[block.index]!.get(Math.floor(offset / this.pageSize))
    return entry === absentPage ? 'absent' : entry === zeroPage ? 'zero' : 'data'
  }

  /** A RAM block as a read-only device; its extents tell zero and absent (unallocated) pages. */
  device(which: string | number): BlockDevice {
    return new RamBlockDevice(this, this.block(which))
  }

  /** Fills `target` from byte `offset` of a block. */
  async readInto(block: RamBlock, offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const { pageSize } = this
    const entries = this.#index.entries[block.index]!
    for (let at = 0; at < target.length; ) {
      const page = Math.floor((offset + at) / pageSize)
      const skip = (offset + at) % pageSize
      const entry = entries.get(page)
      if (entry <= zeroPage) {
        const part = target.subarray(at, at + pageSize - skip)
        if (entry < 0) part.set((await this.#decode(entry, options)).subarray(skip, skip + part.length))
        else part.fill(0)
        at += part.length
        continue
      }
      const last = this.#runEnd(entries, page, Math.ceil((offset + target.length) / pageSize))
      at += await this.#readRun(entries, page, last, offset, target, options)
    }
  }

  /** One past the last page of a run of raw pages that follow each other closely in the file. */
  #runEnd(entries: PageTable, first: number, limit: number): number {
    const { pageSize } = this
    const start = entries.get(first)
    let before = start
    let page = first + 1
    while (page < limit) {
      const entry = entries.get(page)
      const gap = entry - before - pageSize
      if (entry <= zeroPage || gap < 0 || gap > maxGap || entry + pageSize - start > maxRead) break
      before = entry
      page++
    }
    return page
  }

  /** Reads pages `first` to `last - 1` with one request; the number of bytes of `target` that it filled. */
  async #readRun(entries: PageTable, first: number, last: number, offset: number, target: Uint8Array, options?: CallOptions): Promise<number> {
    const { pageSize } = this
    const from = Math.max(offset, first * pageSize)
    const to = Math.min(offset + target.length, last * pageSize)
    const start = entries.get(first) + (from - first * pageSize)
    const end = entries.get(last - 1) + (to - (last - 1) * pageSize)
    if (end - start === to - from) {
      await this.#device.readInto(start, target.subarray(from - offset, to - offset), options)
      return to - from
    }
    const buffer = this.#spans.pop() ?? new Uint8Array(maxRead)
    const span = buffer.subarray(0, end - start)
    await this.#device.readInto(start, span, options)
    for (let page = first; page < last; page++) {
      const begin = Math.max(from, page * pageSize)
      const position = entries.get(page) + (begin - page * pageSize) - start
      const length = Math.min(to, (page + 1) * pageSize) - begin
      target.set(span.subarray(position, position + length), begin - offset)
    }
    if (this.#spans.length < mostSpans) this.#spans.push(buffer)
    return to - from
  }

  /** A page stored as delta or zlib stream: follows the deltas to a whole copy, then applies them. */
  async #decode(entry: number, options?: CallOptions): Promise<Uint8Array> {
    const page = new Uint8Array(this.pageSize)
    const deltas = []
    for (; entry < 0; ) {
      const encoded = this.#index.encoded(entry)
      if (encoded.kind === 'compressed') {
        inflatePage(await this.#device.read(encoded.position, encoded.length, options), page, encoded.position)
        break
      }
      deltas.push(encoded)
      if (deltas.length > limits.deltas) throw streamError('RAM section', 'XBZRLE', `more than ${limits.deltas} deltas of one page`, encoded.position)
      entry = encoded.base
    }
    if (entry > zeroPage) await this.#device.readInto(entry, page, options)
    for (const { position, length } of deltas.reverse()) {
      applyXbzrle(await this.#device.read(position, length, options), page, position)
    }
    return page
  }

  /** @internal The extents of a range of a block, in pages. */
  *extents(block: RamBlock, offset: number, length: number): Generator<Extent, void, undefined> {
    const { pageSize } = this
    const entries = this.#index.entries[block.index]!
    const end = offset + length
    for (let start = offset; start < end; ) {
      const first = Math.floor(start / pageSize)
      const entry = entries.get(first)
      const sort = sortOf(entry)
      const raw = sort === 3
      let page = first + 1
      while (page * pageSize < end) {
        const same = sort < 2 && sortOf(entries.get(page)) === sort ? entries.sameUntil(page) : page
        if (same > page) page = same
        else if (sortOf(entries.get(page)) !== sort || (raw && entries.get(page) !== entry + (page - first) * pageSize)) break
        else page++
      }
      const stop = Math.min(end, page * pageSize)
      yield extent({
        start,
        length: stop - start,
        depth: 0,
        present: sort > 0,
        zero: sort < 2,
        data: sort > 1,
        compressed: sort === 2,
        ...(raw && { offset: entry + (start - first * pageSize) }),
      })
      start = stop
    }
  }
}

/** Where the bytes of a physical range are; undefined if some of it is no memory. */
function partsOf(ranges: readonly PhysicalRange[], address: number, length: number): { block: string; offset: number; at: number; bytes: number }[] | undefined {
  const parts = []
  let at = 0
  for (const range of ranges) {
    const from = address + at - range.address
    if (from < 0 || from >= range.length || at === length) continue
    const bytes = Math.min(length - at, range.length - from)
    parts.push({ block: range.block, offset: range.offset + from, at, bytes })
    at += bytes
  }
  return at === length ? parts : undefined
}

/** 0 absent, 1 zero, 2 encoded, 3 raw. */
function sortOf(entry: number): 0 | 1 | 2 | 3 {
  if (entry < 0) return 2
  return entry > zeroPage ? 3 : (entry as 0 | 1)
}

/** One RAM block as a device. It does not own the file: closing it closes nothing. */
class RamBlockDevice extends ReadOnlyDevice {
  readonly #ram: RamState
  readonly #block: RamBlock

  constructor(ram: RamState, block: RamBlock) {
    super()
    this.#ram = ram
    this.#block = block
  }

  get size(): number {
    return this.#block.length
  }

  protected onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    return this.#ram.readInto(this.#block, offset, target, options)
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    for (const found of this.#ram.extents(this.#block, offset, length)) {
      options?.signal?.throwIfAborted()
      await Promise.resolve()
      yield found
    }
  }
}
