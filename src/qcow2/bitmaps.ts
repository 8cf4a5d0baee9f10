/**
 * The dirty bitmaps of an open image (spec "Bitmaps"): listing, reading, and every change QEMU offers.
 * The bits of a bitmap live here only while one is read or written.
 *
 * Every change writes what is new (bits, tables, a whole directory) into new clusters, durable with
 * their counters, and then names the directory in one write of the header; afterwards the old clusters
 * are freed. A crash leaves the old bitmaps or the new ones, and perhaps leaked clusters.
 */
import { viewOf } from '../bytes/view.ts'
import { writeU64 } from '../bytes/u64.ts'
import type { CallOptions } from '../block/device.ts'
import { AbortPoints } from '../core/abort-points.ts'
import { FormatError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { bitmapBytes, bitmapLimits, bitmapTableSize, decodeBitmapTableEntry, encodeBitmapDirectory, type BitmapRecord } from './bitmaps-directory.ts'
import type { Engine } from './engine.ts'
import { decodeBitmapsExtension, encodeBitmapsExtension, extensionType, findExtension, withExtension } from './extensions.ts'
import { autoclear, keptAutoclear } from './features.ts'
import { bitmapInfo, readBitmapRecords, type BitmapInfo } from './info.ts'
import { settle } from './shutdown.ts'

/** A range of the disk whose bits are set. Bytes. */
export interface DirtyRange {
  /** First byte on the guest's disk. */
  readonly offset: number
  /** Bytes. */
  readonly length: number
}

/** Options of {@link Bitmaps.add}. */
export interface AddBitmapOptions extends CallOptions {
  readonly name: string
  /** Bytes that one bit covers, a power of two from 512 to 2 GiB. Default 65536. */
  readonly granularity?: number | undefined
  /** Create it disabled: changes of guest data are not tracked. Default false. */
  readonly disabled?: boolean | undefined
}

/** Clusters that belong to a bitmap, as pairs of offset and length in bytes. */
type Space = [offset: number, length: number][]

/**
 * The bitmaps of an image. This library does not set bits when it writes: at the first write of guest
 * data the enabled bitmaps are marked as in use, and nobody trusts them any more. QEMU does the same
 * until it closes an image. Aborting `signal` leaves the bitmaps as they were.
 */
export class Bitmaps {
  readonly #engine: Engine

  /** @internal */
  constructor(engine: Engine) {
    this.#engine = engine
  }

  /** All bitmaps; none while the image says that they are stale. */
  async list(): Promise<BitmapInfo[]> {
    return (await this.#records()).map(bitmapInfo)
  }

  /**
   * The ranges whose bits are set, in ascending order, neighbours merged.
   * @throws Qcow2Error `ERR_NOT_FOUND`, `ERR_CORRUPT` if the bitmap is in use and must not be trusted.
   */
  async *read(name: string): AsyncGenerator<DirtyRange, void, undefined> {
    const record = usable(find(await this.#records(), name))
    const granularity = 2 ** record.granularityBits
    const { size } = this.#engine.header
    let start = -1
    let bit = 0
    for await (const bits of this.#bits(record)) {
      for (let at = 0; at < bits.length; at++) {
        const byte = bits[at]!
        // a byte like the run it continues is eight bits at once
        if (byte === (start < 0 ? 0 : 0xff)) {
          bit += 8
          continue
        }
        for (let i = 0; i < 8; i++, bit++) {
          const set = ((byte >> i) & 1) !== 0
          if (set === start >= 0) continue
          if (set) {
            start = bit
            continue
          }
          yield rangeOf(start, bit, granularity, size)
          start = -1
        }
      }
    }
    if (start >= 0 && start * granularity < size) yield rangeOf(start, bit, granularity, size)
  }

  /**
   * Adds an empty bitmap.
   * @throws RangeError, Qcow2Error `ERR_EXISTS`, `ERR_UNSUPPORTED` for version 2.
   */
  async add(options: AddBitmapOptions): Promise<void> {
    const granularityBits = Math.log2(options.granularity ?? 65536)
    const { minGranularityBits, maxGranularityBits } = bitmapLimits
    if (!Number.isInteger(granularityBits) || granularityBits < minGranularityBits || granularityBits > maxGranularityBits) {
      throw new RangeError(`granularity must be a power of two from 512 to 2147483648, not ${options.granularity}`)
    }
    const nameLength = new TextEncoder().encode(options.name).length
    if (nameLength < 1 || nameLength > bitmapLimits.nameBytes) throw new RangeError(`a bitmap name has 1 to ${bitmapLimits.nameBytes} bytes, not ${nameLength}`)
    const { header, geometry } = this.#engine
    if (bitmapBytes(header.size, granularityBits) > bitmapLimits.bitmapBytes) {
      throw new RangeError(`a bitmap of this granularity would exceed ${bitmapLimits.bitmapBytes} bytes; use a larger one`)
    }
    await this.#change(async (records) => {
      if (records.some(({ name }) => name === options.name)) throw new Qcow2Error('ERR_EXISTS', `bitmap ${options.name} exists already`)
      if (records.length >= bitmapLimits.count) throw new RangeError(`an image has at most ${bitmapLimits.count} bitmaps`)
      const tableSize = bitmapTableSize(header.size, granularityBits, geometry.clusterSize)
      const tableOffset = await this.#writeNew(new Uint8Array(tableSize * 8))
      const added: BitmapRecord = { name: options.name, tableOffset, tableSize, inUse: false, auto: options.disabled !== true, granularityBits }
      return { records: [...records, added], freed: [] }
    }, options)
  }

  /** Removes a bitmap, in use or not. */
  remove(name: string, options: CallOptions = {}): Promise<void> {
    return this.#change(async (records) => {
      const record = find(records, name)
      return { records: records.filter((each) => each !== record), freed: await this.#space(record) }
    }, options)
  }

  /** Changes of guest data are tracked from now on. */
  enable(name: string, options: CallOptions = {}): Promise<void> {
    return this.#setAuto(name, true, options)
  }

  /** Changes of guest data are no longer tracked: the bitmap stays as it is. */
  disable(name: string, options: CallOptions = {}): Promise<void> {
    return this.#setAuto(name, false, options)
  }

  /** Clears all bits. */
  clear(name: string, options: CallOptions = {}): Promise<void> {
    return this.#change(async (records) => {
      const record = usable(find(records, name))
      const tableOffset = await this.#writeNew(new Uint8Array(record.tableSize * 8))
      return { records: records.map((each) => (each === record ? { ...record, tableOffset } : each)), freed: await this.#space(record) }
    }, options)
  }

  /**
   * Sets in `target` every bit whose range `source` has dirty: a bitmap of this image, or ranges, for
   * example those that another image's {@link read} gives. The granularities may differ.
   */
  async merge(target: string, source: string | AsyncIterable<DirtyRange>, options: CallOptions = {}): Promise<void> {
    // ranges may come from requests to this image, which would wait for the change to end
    const ranges = typeof source === 'string' ? undefined : await listed(source)
    await this.#change(async (records) => {
      const record = usable(find(records, target))
      const bits = new Uint8Array(bitmapBytes(this.#engine.header.size, record.granularityBits))
      const granularity = 2 ** record.granularityBits
      await collect(this.read(target), bits, granularity, options)
      await collect(ranges ?? this.read(source as string), bits, granularity, options)
      const tableOffset = await this.#writeBits(bits, record.tableSize)
      return { records: records.map((each) => (each === record ? { ...record, tableOffset } : each)), freed: await this.#space(record) }
    }, options)
  }

  #setAuto(name: string, auto: boolean, options: CallOptions): Promise<void> {
    return this.#change((records) => {
      const record = usable(find(records, name))
      return Promise.resolve({ records: records.map((each) => (each === record ? { ...record, auto } : each)), freed: [] })
    }, options)
  }

  #records(): Promise<BitmapRecord[]> {
    return readBitmapRecords(this.#engine.host, this.#engine.content)
  }

  /** Runs a change while no request is in flight, and replaces the directory. */
  #change(change: (records: readonly BitmapRecord[]) => Promise<{ records: readonly BitmapRecord[]; freed: Space }>, { signal }: CallOptions): Promise<void> {
    const engine = this.#engine
    if (signal?.aborted === true) return Promise.reject(signal.reason as Error)
    if (engine.readOnly) return Promise.reject(new Qcow2Error('ERR_READ_ONLY', 'the image is open read-only; open it for writing'))
    if (engine.header.version === 2) return Promise.reject(new UnsupportedError('bitmaps need version 3', ['bitmaps']))
    return engine.requests.exclusive(async () => {
      signal?.throwIfAborted()
      engine.assertSound()
      await settle(engine)
      const old = findExtension(engine.content.extensions, extensionType.bitmaps)
      const before = await this.#records()
      const { records, freed } = await change(before)
      await this.#replaceDirectory(records)
      if (old !== undefined && before.length > 0) {
        const { directoryOffset, directorySize } = decodeBitmapsExtension(old)
        freed.push([directoryOffset, directorySize])
      }
      for (const [offset, length] of freed) {
        engine.metadataMap.remove(offset, length)
        engine.allocator.free(offset, length)
      }
      await settle(engine)
      engine.rest()
    })
  }

  async #replaceDirectory(records: readonly BitmapRecord[]): Promise<void> {
    const engine = this.#engine
    const autoclearFeatures = keptAutoclear(engine.header.autoclearFeatures)
    if (records.length === 0) {
      const extensions = withExtension(engine.content.extensions, extensionType.bitmaps, undefined)
      await settle(engine)
      await engine.writeHeader({ autoclearFeatures: autoclearFeatures & ~autoclear.bitmaps }, { extensions })
      return
    }
    const directory = encodeBitmapDirectory(records)
    const directoryOffset = await this.#writeNew(directory)
    engine.metadataMap.add(directoryOffset, directory.length)
    await settle(engine)
    const extension = encodeBitmapsExtension({ count: records.length, directorySize: directory.length, directoryOffset })
    const extensions = withExtension(engine.content.extensions, extensionType.bitmaps, extension)
    await engine.writeHeader({ autoclearFeatures: autoclearFeatures | autoclear.bitmaps }, { extensions })
  }

  /** Writes bytes into new neighbouring clusters; where they are, 0 for none. */
  async #writeNew(bytes: Uint8Array): Promise<number> {
    if (bytes.length === 0) return 0
    const { allocator, host, geometry } = this.#engine
    const clusters = Math.ceil(bytes.length / geometry.clusterSize)
    const { offset } = await allocator.allocateContiguous(clusters)
    const padded = host.allocate(clusters * geometry.clusterSize).fill(0)
    padded.set(bytes)
    await host.write(offset, padded)
    return offset
  }

  /** Writes the clusters of bits that are not all zero, and a table that names them. */
  async #writeBits(bits: Uint8Array, tableSize: number): Promise<number> {
    const { clusterSize } = this.#engine.geometry
    const table = new Uint8Array(tableSize * 8)
    for (let index = 0; index < tableSize; index++) {
      const part = bits.subarray(index * clusterSize, (index + 1) * clusterSize)
      if (part.some((byte) => byte !== 0)) writeU64(viewOf(table), index * 8, await this.#writeNew(part))
    }
    return this.#writeNew(table)
  }

  async #table(record: BitmapRecord): Promise<DataView> {
    const { header, geometry, host } = this.#engine
    const needed = bitmapTableSize(header.size, record.granularityBits, geometry.clusterSize)
    if (record.tableSize !== needed) {
      const detail = `bitmap ${record.name}: bitmap_table_size is ${record.tableSize}, the disk needs ${needed}`
      throw new FormatError(detail, { structure: 'bitmap directory', field: 'bitmap_table_size' }, 'ERR_CORRUPT')
    }
    const table = new Uint8Array(record.tableSize * 8)
    if (record.tableSize > 0) await host.readInto(record.tableOffset, table)
    return viewOf(table)
  }

  /** The bits of a bitmap, cluster by cluster. */
  async *#bits(record: BitmapRecord): AsyncGenerator<Uint8Array, void, undefined> {
    const { geometry, header, host } = this.#engine
    const table = await this.#table(record)
    const total = bitmapBytes(header.size, record.granularityBits)
    for (let index = 0; index < record.tableSize; index++) {
      const entry = decodeBitmapTableEntry(table, index, geometry.clusterSize)
      if (entry === 'invalid') {
        const location = { structure: 'bitmap table', offset: record.tableOffset + index * 8 }
        throw new FormatError(`entry ${index} of bitmap ${record.name} is invalid`, location, 'ERR_CORRUPT')
      }
      const bits = new Uint8Array(Math.min(geometry.clusterSize, total - index * geometry.clusterSize))
      if (typeof entry === 'number') await host.readInto(entry, bits)
      else if (entry === 'ones') bits.fill(0xff)
      yield bits
    }
  }

  /** All clusters of a bitmap. What damage hides stays behind as a leak. */
  async #space(record: BitmapRecord): Promise<Space> {
    if (record.tableSize === 0) return []
    const { geometry, host } = this.#engine
    const space: Space = [[record.tableOffset, record.tableSize * 8]]
    const bytes = new Uint8Array(record.tableSize * 8)
    await host.readInto(record.tableOffset, bytes)
    for (let index = 0; index < record.tableSize; index++) {
      const entry = decodeBitmapTableEntry(viewOf(bytes), index, geometry.clusterSize)
      if (typeof entry === 'number') space.push([entry, geometry.clusterSize])
    }
    return space
  }
}

function find(records: readonly BitmapRecord[], name: string): BitmapRecord {
  const record = records.find((each) => each.name === name)
  if (record === undefined) throw new Qcow2Error('ERR_NOT_FOUND', `the image has no bitmap ${JSON.stringify(name)}`)
  return record
}

function usable(record: BitmapRecord): BitmapRecord {
  if (!record.inUse) return record
  const detail = `bitmap ${record.name} is in use: it was not saved properly and can only be removed`
  throw new FormatError(detail, { structure: 'bitmap directory', field: 'in_use' }, 'ERR_CORRUPT')
}

function rangeOf(from: number, to: number, granularity: number, size: number): DirtyRange {
  const offset = from * granularity
  return { offset, length: Math.min(size, to * granularity) - offset }
}

async function listed(source: AsyncIterable<DirtyRange>): Promise<DirtyRange[]> {
  const ranges: DirtyRange[] = []
  for await (const { offset, length } of source) ranges.push({ offset, length })
  return ranges
}

/** Sets the bits of the ranges; what lies behind the last bit is left out. */
async function collect(
  ranges: AsyncIterable<DirtyRange> | readonly DirtyRange[],
  bits: Uint8Array,
  granularity: number,
  { signal }: CallOptions,
): Promise<void> {
  const points = new AbortPoints(signal)
  for await (const { offset, length } of ranges) {
    const end = Math.min(Math.ceil((offset + length) / granularity), bits.length * 8)
    await points.pass()
    for (let bit = Math.floor(offset / granularity); bit < end; bit++) bits[bit >>> 3]! |= 1 << (bit & 7)
  }
}
