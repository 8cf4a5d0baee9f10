/**
 * A multifd channel: a connection beside the main one that carries pages in packets. Owns the layout
 * of packets and their compression; when packets of several channels may be mixed is the reader's
 * business (pages between two syncs are disjoint).
 *
 * ```
 * once:   be32 0x11223344 | be32 version 1 | 16 uuid | u8 channel | 39 reserved
 * packet:   0 be32 magic, be32 version, be32 flags, be32 pages allocated
 *          16 be32 normal pages, be32 payload length, be64 packet number
 *          32 be32 zero pages, be32 reserved, 3 be64 reserved
 *          64 RAM block name, NUL padded to 256
 *         320 be64 page offset: normal pages, then zero pages, room for 512 KiB / page size of them
 *         then the payload, if there are normal pages
 * ```
 * With zlib and zstd, all payloads of a channel are one compressed stream, flushed at their ends.
 */
import { InflateStream } from '../codec/inflate-stream.ts'
import { ZstdStream } from '../codec/zstd-stream.ts'
import { UnsupportedError } from '../core/errors.ts'
import { hex, streamError } from './format.ts'
import { ParserInput, underrun } from './input.ts'
import type { RamBlock, RecordSpan } from './records.ts'

/** The first packet of a channel. */
export interface MultifdInitRecord extends RecordSpan {
  readonly kind: 'multifd-init'
  /** The VM's UUID; zeroes if it has none. */
  readonly uuid: Uint8Array
  readonly channel: number
}

/** A packet with its pages decompressed. Valid until the next record is asked for. */
export interface MultifdPacketRecord extends RecordSpan {
  readonly kind: 'multifd-packet'
  readonly packetNumber: number
  /** The source waits here until all channels and the main one are drained. */
  readonly sync: boolean
  readonly compression: 'none' | 'zlib' | 'zstd'
  /** Name of the RAM block; empty if there are no pages. */
  readonly block: string
  /** Byte offsets of the pages whose contents are in `pages`, one after another. */
  readonly normal: readonly number[]
  /** Byte offsets of zero pages. */
  readonly zero: readonly number[]
  readonly pages: Uint8Array
}

/** What a multifd channel carries. */
export type MultifdRecord = MultifdInitRecord | MultifdPacketRecord

/** Options of {@link MultifdParser}. */
export interface MultifdOptions {
  /** Target page size in bytes. Default 4096. */
  readonly pageSize?: number | undefined
  /** The blocks that the main connection listed; with them names and offsets are checked. */
  readonly blocks?: readonly Pick<RamBlock, 'name' | 'length'>[] | undefined
}

const magic = 0x1122_3344
const initLength = 64
const fixedLength = 320
const packetBytes = 512 << 10
const flag = { sync: 0x01, methods: 0x3e, deviceState: 0x40 } as const
const methods = new Map<number, 'none' | 'zlib' | 'zstd'>([[0, 'none'], [1, 'zlib'], [2, 'zstd']])
const unsupportedMethods = new Map([[4, 'QPL'], [8, 'UADK'], [16, 'QATzip']])
const structure = 'multifd packet'

interface Decoder {
  next(source: Uint8Array, target: Uint8Array): string | undefined
}

/**
 * Reads one multifd channel from chunks of any size; at most one packet (about 512 KiB) is gathered.
 * Malformed input throws `FormatError` (`ERR_STREAM`), other compressions and device state packets
 * `UnsupportedError`.
 */
export class MultifdParser {
  readonly #input = new ParserInput(0)
  readonly #pageSize: number
  readonly #pageCount: number
  readonly #blocks: ReadonlyMap<string, number> | undefined
  #begun = false
  #method: number | undefined
  #decoder: Decoder | undefined
  #failure: unknown

  constructor(options: MultifdOptions = {}) {
    this.#pageSize = options.pageSize ?? 4096
    this.#pageCount = packetBytes / this.#pageSize
    this.#blocks = options.blocks === undefined ? undefined : new Map(options.blocks.map(({ name, length }) => [name, length]))
  }

  /** Gives the parser the next bytes and iterates over the packets they complete. */
  push(chunk: Uint8Array): Iterable<MultifdRecord> {
    this.#input.push(chunk)
    return this.#records()
  }

  /** Tells that the input is over. @throws FormatError if it ended within a packet. */
  end(): void {
    if (this.#failure !== undefined) throw this.#failure as Error
    if (this.#begun && this.#input.pending === 0) return
    throw streamError(structure, 'length', `the channel ends within a packet, ${this.#input.pending} bytes of it are here`, this.#input.startOffset)
  }

  *#records(): Generator<MultifdRecord, void, undefined> {
    for (let record = this.#next(); record !== undefined; record = this.#next()) yield record
  }

  #next(): MultifdRecord | undefined {
    if (this.#failure !== undefined) throw this.#failure as Error
    for (;;) {
      this.#input.begin()
      try {
        return this.#begun ? this.#packet() : this.#init()
      } catch (error) {
        if (error !== underrun) {
          this.#failure = error
          throw error
        }
        if (!this.#input.refill()) return undefined
      }
    }
  }

  #magic(): void {
    const input = this.#input
    const offset = input.offset
    const found = input.u32()
    if (found !== magic) throw streamError(structure, 'magic', `magic is ${hex(found)}, expected ${hex(magic)}`, offset)
    const version = input.u32()
    if (version !== 1) throw streamError(structure, 'version', `version is ${version}, expected 1`, offset + 4)
  }

  #init(): MultifdInitRecord {
    const input = this.#input
    const offset = input.offset
    input.require(initLength)
    this.#magic()
    const uuid = input.take(16).slice()
    const channel = input.u8()
    input.take(initLength - 25)
    this.#begun = true
    return { kind: 'multifd-init', offset, length: initLength, uuid, channel }
  }

  #packet(): MultifdPacketRecord {
    const input = this.#input
    const offset = input.offset
    const headLength = fixedLength + 8 * this.#pageCount
    input.require(12)
    this.#magic()
    const flags = input.u32()
    if ((flags & flag.deviceState) !== 0) throw new UnsupportedError(`${structure}: device state packet (flags ${hex(flags)}) at offset ${offset}`, ['multifd device state'])
    input.require(headLength - 12)
    input.u32()
    const normalCount = input.u32()
    const payloadLength = input.u32()
    const packetNumber = input.u64(structure, 'packet number')
    const zeroCount = input.u32()
    input.take(28)
    this.#checkCounts(normalCount, zeroCount, offset)
    const block = this.#blockName(normalCount + zeroCount, input.take(256), offset + 64)
    const normal = this.#offsets(normalCount, block)
    const zero = this.#offsets(zeroCount, block)
    input.take(8 * (this.#pageCount - normalCount - zeroCount))
    const method = (flags & flag.methods) >> 1
    const compression = this.#compression(method, normalCount, offset)
    // QEMU 7.2 leaves a stale length in packets without pages.
    const pages = normalCount === 0 ? input.take(0) : this.#payload(method, payloadLength, normalCount * this.#pageSize, offset)
    const sync = (flags & flag.sync) !== 0
    return { kind: 'multifd-packet', offset, length: input.offset - offset, packetNumber, sync, compression, block, normal, zero, pages }
  }

  #checkCounts(normal: number, zero: number, offset: number): void {
    if (normal + zero <= this.#pageCount) return
    throw streamError(structure, 'normal pages', `${normal} normal and ${zero} zero pages, allowed up to ${this.#pageCount}`, offset + 16)
  }

  #blockName(pages: number, field: Uint8Array, offset: number): string {
    if (pages === 0) return ''
    const end = field.indexOf(0)
    const name = new TextDecoder().decode(end === -1 ? field : field.subarray(0, end))
    if (this.#blocks !== undefined && !this.#blocks.has(name)) throw streamError(structure, 'RAM block', `RAM block '${name}' is not in the list of blocks`, offset)
    return name
  }

  #offsets(count: number, block: string): number[] {
    const input = this.#input
    const limit = this.#blocks?.get(block) ?? Number.MAX_SAFE_INTEGER
    const offsets: number[] = []
    for (let i = 0; i < count; i++) {
      const at = input.offset
      const offset = input.u64(structure, 'page offset')
      if (offset % this.#pageSize !== 0 || offset >= limit) {
        throw streamError(structure, 'page offset', `page offset ${hex(offset)} is not a page of RAM block '${block}'`, at)
      }
      offsets.push(offset)
    }
    return offsets
  }

  #compression(method: number, normalCount: number, offset: number): 'none' | 'zlib' | 'zstd' {
    const name = methods.get(method)
    if (name !== undefined && (this.#method === undefined || this.#method === method || normalCount === 0)) return name
    if (name !== undefined) throw streamError(structure, 'flags', `compression changes to ${name}`, offset + 8)
    const unsupported = unsupportedMethods.get(method)
    if (unsupported === undefined) throw streamError(structure, 'flags', `compression method is ${method}`, offset + 8)
    throw new UnsupportedError(`${structure}: compression ${unsupported} at offset ${offset} is not supported`, [unsupported])
  }

  #payload(method: number, length: number, pagesLength: number, offset: number): Uint8Array {
    const input = this.#input
    const limit = 2 * packetBytes + 4096
    if (length > limit || (method === 0 && length !== pagesLength)) {
      throw streamError(structure, 'payload length', `${length} bytes of payload for ${pagesLength} bytes of pages`, offset + 20)
    }
    const payload = input.take(length)
    if (method === 0) return payload
    this.#method = method
    this.#decoder ??= method === 1 ? new InflateStream() : new ZstdStream()
    const pages = new Uint8Array(pagesLength)
    const problem = this.#decoder.next(payload, pages)
    if (problem !== undefined) throw streamError(structure, 'payload', problem, input.offset - length)
    return pages
  }
}
