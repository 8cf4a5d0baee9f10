/**
 * Builds the index of a stored stream: one pass of large sequential reads, nothing kept but positions.
 * Owns finding the VM description (from the end, or within the tail of a padded file) and walking the
 * stream with it; reading what was indexed is next door.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { borrowedDeviceChunks } from './byte-source.ts'
import { AbortPoints } from '../core/abort-points.ts'
import { limits, streamError } from './format.ts'
import type { ParserOptions } from './framing.ts'
import { MigrationParser } from './parser.ts'
import { RamIndex } from './ram-index.ts'
import type { BytesRecord, ConfigurationRecord, MigrationRecord, RamBlock, SectionRecord } from './records.ts'
import { StreamRest } from './stream-rest.ts'
import { deviceLengths, locateVmDescription, parseVmDescription, type VmDescription } from './vm-description.ts'
import { encodeRecord } from './writer.ts'

/** A FULL section and where its body is. */
export interface IndexedDevice {
  readonly section: SectionRecord
  /** File offset of the body. */
  readonly offset: number
  length: number
}

/** A part of the stream without its pages: bytes, or where they are in the file. */
export type RestPiece = Uint8Array | { offset: number; length: number }

/** Everything one pass over a stream finds. */
export interface StreamIndex {
  readonly ram: RamIndex
  readonly blocks: readonly RamBlock[]
  readonly configuration: ConfigurationRecord | undefined
  /** How the `ram` section is framed. */
  readonly ramSection: { readonly sectionId: number; readonly footers: boolean }
  readonly devices: readonly IndexedDevice[]
  readonly description: VmDescription | undefined
  /** File offset of the part that no VM description explains, if there is one. */
  readonly tailOffset: number | undefined
  /** The stream without its pages, before and behind them. */
  readonly rest: { readonly before: readonly RestPiece[]; readonly after: readonly RestPiece[] }
  /** File offset one past the stream, without padding. */
  readonly end: number
}

/** Options of the pass. */
export interface IndexOptions extends CallOptions {
  /** Target page size in bytes where the stream does not tell. */
  readonly pageSize?: number | undefined
  /** Called now and then: bytes of the file passed, of how many. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined
  /** Take every page of a mapped-ram file whose bitmaps were never written as present. */
  readonly repairMappedRam?: boolean | undefined
}

/** Least jump over passed-through bytes that is worth a new sequence of reads. */
const worthSkipping = 1 << 20
/** First guess of how far from the end the VM description begins. */
const firstTail = 256 << 10
/** Bytes of padding, or of device state, that are looked through for a description. */
const tailLimit = limits.behindPages
/** EOF, the mark, the length and the first byte of a description. */
const headLength = 7
/** What looks like a description's head that is looked at, at most. */
const mostTries = 1000

/** Indexes the stream that begins at `streamOffset` of `device`. */
export async function indexStream(device: BlockDevice, streamOffset: number, options: IndexOptions): Promise<StreamIndex> {
  const described = await findDescription(device, streamOffset, options)
  const pageSize = options.pageSize ?? described?.description.page_size
  const walk = new Walk(device, options)
  const devices = described === undefined ? undefined : deviceLengths(described.description)
  await walk.run({ offset: streamOffset, pageSize, devices }, streamOffset)
  if (described !== undefined || walk.tailOffset === undefined) return walk.result(described?.description)
  // Padding behind the description, or none at all: look within the tail, now that its start is known.
  const description = await searchTail(device, walk.tailOffset, options)
  if (description === undefined) return walk.result(undefined)
  await walk.runTail(deviceLengths(description))
  return walk.result(description)
}

/**
 * Looks for a description that ends the file (zeroes may follow), in ever longer pieces of its end. JSON has no zeroes, so
 * one that is found before a description begins ends the search.
 */
async function findDescription(
  device: BlockDevice,
  from: number,
  options: CallOptions,
): Promise<{ description: VmDescription } | undefined> {
  const end = await endOfContent(device, from, options)
  if (end === undefined) return undefined
  const longest = Math.min(end - from, limits.vmDescription + 16)
  for (let length = Math.min(firstTail, longest); ; length = Math.min(length * 8, longest)) {
    const start = end - length
    const tail = await device.read(start, length, options)
    if (tail.at(-1) !== 0x7d) return undefined
    const found = locateVmDescription(tail)
    if (found !== undefined) {
      return { description: parseVmDescription(tail.subarray(found.start, found.start + found.length), start + found.start) }
    }
    if (length === longest || tail.includes(0)) return undefined
  }
}

/** One past the last byte that is not zero; undefined if it is further from the end than padding is looked through. */
async function endOfContent(device: BlockDevice, from: number, options: CallOptions): Promise<number | undefined> {
  const stop = Math.max(from, device.size - tailLimit)
  const points = new AbortPoints(options.signal)
  for (let end = device.size; end > stop; ) {
    await points.pass()
    const start = Math.max(stop, end - firstTail)
    const piece = await device.read(start, end - start, options)
    let last = piece.length - 1
    while (last >= 0 && piece[last] === 0) last--
    if (last >= 0) return start + last + 1
    end = start
  }
  return undefined
}

/** Looks for a description anywhere behind the start of the device sections: `00 06 be32 length {…}`. */
async function searchTail(device: BlockDevice, from: number, options: CallOptions): Promise<VmDescription | undefined> {
  const end = Math.min(device.size, from + tailLimit)
  const points = new AbortPoints(options.signal)
  let tries = mostTries
  for (let start = from; start + headLength < end; start += firstTail - headLength) {
    await points.pass()
    const piece = await device.read(start, Math.min(firstTail, end - start), options)
    const view = new DataView(piece.buffer, piece.byteOffset, piece.length)
    for (let at = piece.indexOf(6, 1); at !== -1 && at + 5 < piece.length; at = piece.indexOf(6, at + 1)) {
      const length = view.getUint32(at + 1)
      const json = start + at + 5
      if (piece[at - 1] !== 0 || piece[at + 5] !== 0x7b || length > limits.vmDescription || json + length > device.size) continue
      if (tries-- === 0) return undefined
      const [last] = await device.read(json + length - 1, 1, options)
      if (last === 0x7d) return parseVmDescription(await device.read(json, length, options), json)
    }
  }
  return undefined
}

/** One walk over the stream; a second covers the tail if its description was found only after the first. */
class Walk {
  readonly #device: BlockDevice
  readonly #options: IndexOptions
  readonly #devices: IndexedDevice[] = []
  #ram: RamIndex | undefined
  /** Bytes of the bitmap of the current block so far. */
  #bitmapBytes = 0
  #block: RamBlock | undefined
  #blocks: readonly RamBlock[] = []
  #configuration: ConfigurationRecord | undefined
  #ramSectionId = 0
  #footers = false
  readonly #sections = new Map<number, string>()
  readonly #restFilter = new StreamRest()
  readonly #rest: { before: RestPiece[]; after: RestPiece[] } = { before: [], after: [] }
  #end = 0
  /** What is left needs no reading. */
  #over = false
  tailOffset: number | undefined

  constructor(device: BlockDevice, options: IndexOptions) {
    this.#device = device
    this.#options = options
  }

  async run(parserOptions: ParserOptions, from: number): Promise<void> {
    const parser = new MigrationParser(parserOptions)
    for (let at: number | undefined = from; at !== undefined; ) at = await this.#feed(parser, at)
    if (!this.#over) parser.end()
    this.#over = false
    this.#configuration ??= parser.configuration
    if (this.#blocks.length === 0) this.#blocks = parser.blocks
    this.#ram ??= new RamIndex(parser.pageSize)
    if (this.#blocks.some(({ mapped }) => mapped !== undefined) && this.#ram.counts.normal === 0) this.#emptyBitmaps(this.#ram)
  }

  /** Takes the tail apart, now that the lengths of its sections are known. */
  async runTail(devices: ParserOptions['devices']): Promise<void> {
    const from = this.tailOffset!
    this.tailOffset = undefined
    this.#rest.after = this.#rest.after.filter((piece) => piece instanceof Uint8Array || piece.offset < from)
    const sections = [...this.#sections].map(([id, idstr]) => ({ id, idstr }))
    const early = this.#devices.length
    await this.run({ offset: from, pageSize: this.#ram!.pageSize, devices: devices!.slice(early), continues: { sections, blocks: this.#blocks } }, from)
  }

  result(description: VmDescription | undefined): StreamIndex {
    return {
      ram: this.#ram!,
      blocks: this.#blocks,
      configuration: this.#configuration,
      ramSection: { sectionId: this.#ramSectionId, footers: this.#footers },
      devices: this.#devices,
      description,
      tailOffset: this.tailOffset,
      rest: this.#rest,
      end: this.#end,
    }
  }

  /** Feeds the parser from file offset `at`; where to go on after a jump, or undefined at the end. */
  async #feed(parser: MigrationParser, at: number): Promise<number | undefined> {
    const { signal, onProgress } = this.#options
    const { size } = this.#device
    for await (const chunk of borrowedDeviceChunks(this.#device, at, { signal })) {
      signal?.throwIfAborted()
      for (const record of parser.push(chunk)) this.#take(record, parser)
      if (this.#over) return undefined
      onProgress?.({ done: parser.offset, total: size })
      const { skippable } = parser
      if (skippable < worthSkipping) continue
      parser.skip(Math.min(skippable, size - parser.offset))
      return parser.offset < size ? parser.offset : undefined
    }
    return undefined
  }

  #take(record: MigrationRecord, parser: MigrationParser): void {
    if (this.#over) return
    if (record.kind === 'bytes' && (record.of === 'trailing' || record.of === 'tail')) {
      this.#takeLast(record)
      return
    }
    this.#end = record.offset + record.length
    this.#keepRest(record)
    switch (record.kind) {
      case 'section':
        if (record.type === 'start') this.#sections.set(record.id, record.idstr)
        if (record.idstr === 'ram') this.#ramSectionId = record.id
        if (record.type === 'full') this.#devices.push({ section: record, offset: record.offset + record.length, length: 0 })
        break
      case 'ram-block':
        this.#ram ??= new RamIndex(parser.pageSize)
        this.#ram.addBlock(record.block)
        if (record.block.mapped !== undefined) this.#ram.beginMapped(record.block)
        this.#block = record.block
        this.#bitmapBytes = 0
        break
      case 'footer':
        this.#footers = true
        break
      case 'ram-pages':
        this.#ram!.addPages(record)
        break
      case 'bytes':
        this.#takeBytes(record)
    }
  }

  /** What reaches to the end of the file: padding, or device state that nothing explains yet. It need not be read. */
  #takeLast(record: BytesRecord): void {
    this.#over = true
    if (record.of === 'trailing') return
    this.tailOffset ??= record.offset
    this.#restFilter.accept(record)
    this.#end = this.#device.size
    this.#rest.after.push({ offset: record.offset, length: this.#device.size - record.offset })
  }

  /** Bytes stay in the file; everything else is small. */
  #keepRest(record: MigrationRecord): void {
    const kept = this.#restFilter.accept(record)
    if (kept === undefined) return
    const pieces = this.#restFilter.pagesSeen ? this.#rest.after : this.#rest.before
    const last = pieces.at(-1)
    if (kept.kind !== 'bytes') pieces.push(encodeRecord(kept))
    else if (last !== undefined && !(last instanceof Uint8Array) && last.offset + last.length === record.offset) last.length += record.length
    else pieces.push({ offset: record.offset, length: record.length })
  }

  #takeBytes(record: BytesRecord): void {
    if (record.of === 'device') this.#devices.at(-1)!.length += record.length
    if (record.of !== 'mapped-ram-bitmap') return
    this.#ram!.addMapped(this.#block!, record.bytes, this.#bitmapBytes)
    this.#bitmapBytes += record.bytes.length
  }

  /** QEMU 10.0 lets background-snapshot go with mapped-ram and then never writes the bitmaps. */
  #emptyBitmaps(ram: RamIndex): void {
    const block = this.#blocks.find(({ mapped }) => mapped !== undefined)!
    if (this.#options.repairMappedRam !== true) {
      throw streamError(
        'mapped-ram header',
        'bitmap',
        'no page of any RAM block is marked present; QEMU writes such files when background-snapshot is used with mapped-ram: repairMappedRam takes the pages as they are',
        block.mapped!.bitmapOffset,
      )
    }
    for (const each of this.#blocks) ram.markAllMapped(each)
  }
}
