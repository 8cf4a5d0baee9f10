/**
 * The dirty bitmaps of an open image (spec "Bitmaps"): listing, reading, and every change QEMU offers.
 *
 * Every change writes what is new (bits, tables, a whole directory) into new clusters, durable with
 * their counters, and then names the directory in one write of the header; afterwards the old clusters
 * are freed. A crash leaves the old bitmaps or the new ones, and perhaps leaked clusters.
 */
import type { CallOptions } from '../block/device.ts'
import { encodeName } from '../bytes/file-name.ts'
import { FormatError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { dirtyRanges, setBits, spaceOf, writeBits, writeNew, type DirtyRange, type Space } from './bitmaps-bits.ts'
import { bitmapBytes, bitmapLimits, bitmapTableSize, encodeBitmapDirectory, type BitmapRecord } from './bitmaps-directory.ts'
import type { Engine } from './engine.ts'
import { decodeBitmapsExtension, encodeBitmapsExtension, extensionType, findExtension, withExtension } from './extensions.ts'
import { autoclear, keptAutoclear } from './features.ts'
import { type BitmapInfo, bitmapInfo, hasInvalidBitmaps, readBitmapRecords } from './info.ts'
import { settle } from './shutdown.ts'

/** Options of {@link Bitmaps.add}. */
export interface AddBitmapOptions extends CallOptions {
  readonly name: string
  /** Bytes that one bit covers, a power of two from 512 to 2 GiB. Default 65536. */
  readonly granularity?: number | undefined
  /** Create it disabled: changes of guest data are not tracked. Default false. */
  readonly disabled?: boolean | undefined
}

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

  /**
   * The image has bitmaps, and a program that does not know them has changed it since: none can be used any more, and
   * none is listed. `repairImage` with `leaks` frees their clusters.
   */
  get invalid(): boolean {
    return hasInvalidBitmaps(this.#engine.content)
  }

  /** All bitmaps; none while they are {@link invalid}. */
  async list(): Promise<BitmapInfo[]> {
    return (await this.#records()).map(bitmapInfo)
  }

  /**
   * The ranges whose bits are set, in ascending order, neighbours merged.
   * @throws Qcow2Error `ERR_NOT_FOUND`, `ERR_CORRUPT` if the bitmap is in use and must not be trusted.
   */
  async *read(name: string): AsyncGenerator<DirtyRange, void, undefined> {
    const record = usable(find(await this.#records(), name))
    yield* dirtyRanges(this.#engine, record)
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
    const nameLength = encodeName(options.name).length
    if (options.name.includes('\0')) throw new RangeError('a bitmap name has no NUL')
    if (nameLength < 1 || nameLength > bitmapLimits.nameBytes) throw new RangeError(`a bitmap name has 1 to ${bitmapLimits.nameBytes} bytes, not ${nameLength}`)
    const { header, geometry } = this.#engine
    if (header.size === 0) throw new RangeError('a disk of 0 bytes can have no bitmap: its table would be empty, which nothing opens')
    if (bitmapBytes(header.size, granularityBits) > bitmapLimits.bitmapBytes) {
      throw new RangeError(`a bitmap of this granularity would exceed ${bitmapLimits.bitmapBytes} bytes; use a larger one`)
    }
    await this.#change(async (records) => {
      if (records.some(({ name }) => name === options.name)) throw new Qcow2Error('ERR_EXISTS', `bitmap ${options.name} exists already`)
      if (records.length >= bitmapLimits.count) throw new RangeError(`an image has at most ${bitmapLimits.count} bitmaps`)
      const tableSize = bitmapTableSize(header.size, granularityBits, geometry.clusterSize)
      const tableOffset = await writeNew(this.#engine, new Uint8Array(tableSize * 8))
      const added: BitmapRecord = { name: options.name, tableOffset, tableSize, inUse: false, auto: options.disabled !== true, granularityBits }
      return { records: [...records, added], freed: [] }
    }, options)
  }

  /** Removes a bitmap, in use or not. */
  remove(name: string, options: CallOptions = {}): Promise<void> {
    return this.#change(async (records) => {
      const record = find(records, name)
      return { records: records.filter((each) => each !== record), freed: await spaceOf(this.#engine, record) }
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
      const tableOffset = await writeNew(this.#engine, new Uint8Array(record.tableSize * 8))
      return { records: records.map((each) => (each === record ? { ...record, tableOffset } : each)), freed: await spaceOf(this.#engine, record) }
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
      await setBits(this.read(target), bits, granularity, options)
      await setBits(ranges ?? this.read(source as string), bits, granularity, options)
      const tableOffset = await writeBits(this.#engine, bits, record.tableSize)
      return { records: records.map((each) => (each === record ? { ...record, tableOffset } : each)), freed: await spaceOf(this.#engine, record) }
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
      const given = old !== undefined && before.length > 0 ? decodeBitmapsExtension(old) : undefined
      if (given !== undefined) engine.host.assertWritable(given.directoryOffset, given.directorySize)
      const { records, freed } = await change(before)
      await this.#replaceDirectory(records)
      if (given !== undefined) freed.push([given.directoryOffset, given.directorySize])
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
    const directoryOffset = await writeNew(this.#engine, directory)
    engine.metadataMap.add(directoryOffset, directory.length)
    await settle(engine)
    const extension = encodeBitmapsExtension({ count: records.length, directorySize: directory.length, directoryOffset })
    const extensions = withExtension(engine.content.extensions, extensionType.bitmaps, extension)
    await engine.writeHeader({ autoclearFeatures: autoclearFeatures | autoclear.bitmaps }, { extensions })
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

async function listed(source: AsyncIterable<DirtyRange>): Promise<DirtyRange[]> {
  const ranges: DirtyRange[] = []
  for await (const { offset, length } of source) ranges.push({ offset, length })
  return ranges
}
