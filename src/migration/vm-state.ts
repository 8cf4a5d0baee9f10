/**
 * A saved VM at rest: a stored migration stream opened for reading in any order. The facade over the
 * index; owns opening what is around the stream (libvirt's header, compression) and the devices.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { join } from '../block/join.ts'
import { MemoryDevice } from '../block/memory.ts'
import { pad } from '../block/pad.ts'
import { slice } from '../block/slice.ts'
import { isBlockDevice, openSource, type Source } from '../block/source.ts'
import { decompressStream, type FileCompression } from '../codec/decompress-stream.ts'
import { FormatError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import { turns } from '../core/turns.ts'
import { concat } from '../bytes/concat.ts'
import { deviceChunks } from './byte-source.ts'
import { capabilitiesOf } from './configuration.ts'
import { readLibvirtHeader, type LibvirtSaveHeader } from './container.ts'
import { decodeStruct, deviceBudget, type DeviceValue, type ValueBudget } from './device-fields.ts'
import { limits } from './format.ts'
import { readPlacement, type MemoryPlacement } from './memory-placement.ts'
import type { PageRange } from './ram-index.ts'
import { RamState } from './ram-state.ts'
import type { ConfigurationRecord } from './records.ts'
import { cutOf } from './stream-end.ts'
import type { DeviceDescription, VmDescription } from './vm-description.ts'
import { indexStream, type IndexedDevice, type IndexOptions, type StreamIndex } from './vm-state-index.ts'

/** Options of {@link VmState.index}. */
export interface VmStateOptions extends IndexOptions {
  /** Leave a device that was given open when the VM state is closed. */
  readonly keepOpen?: boolean | undefined
  /**
   * An empty growable device for the content of a compressed file, or a function that opens one, called only for such a
   * file. It is closed with the VM state. Default: memory, up to 128 MiB.
   */
  readonly spool?: Spool | undefined
}

/** See {@link VmStateOptions}. */
export type Spool = BlockDevice | (() => BlockDevice | Promise<BlockDevice>)

/** The state of one device, with its place in the file. */
export interface DeviceState {
  /** `idstr` of the section. */
  readonly name: string
  /** Tells devices of one name apart. */
  readonly instanceId: number
  /** Of the device's layout. */
  readonly versionId: number
  /** Number of the section in the stream. */
  readonly sectionId: number
  /** File offset of the section's body. */
  readonly offset: number
  /** Bytes of the body. */
  readonly length: number
  /** The fields, by the VM description; undefined where it does not know the device. */
  readonly description: DeviceDescription | undefined
}

/** Bytes of one piece of the rest. */
const restRead = 1 << 20
const memorySpoolLimit = 128 << 20

/**
 * A stored migration stream, indexed: guest pages by block and offset, devices decoded.
 *
 * ```ts
 * await using vm = await VmState.index('vm.mig')
 * const page = await vm.ram.read('pc.ram', 0x100000, 4096)
 * ```
 */
export class VmState extends Resource {
  /** What libvirt says of the VM, if the file is one of its save images. */
  readonly libvirt: LibvirtSaveHeader | undefined
  readonly configuration: ConfigurationRecord | undefined
  readonly ram: RamState
  /** How the `ram` section is framed. */
  readonly ramSection: { readonly sectionId: number; readonly footers: boolean }
  /** Device sections in the order of the stream. Empty if the stream has no VM description. */
  readonly devices: readonly DeviceState[]
  /** The VM description as it is in the stream. */
  readonly description: VmDescription | undefined
  /** Where the stream lies in {@link storage}. */
  readonly streamOffset: number
  /** Bytes of the stream, without padding. */
  readonly streamLength: number
  /** File offset of device state that no VM description explains; undefined in a complete stream. */
  readonly tailOffset: number | undefined
  /** Why the stream is cut short; undefined for one that ends as it should, as far as can be told without a VM description. */
  readonly cut: string | undefined
  /** The pages are not in the stream but lie beside it, as those of a RAM image do: only `plainStream` gives a stream that QEMU loads. */
  readonly pagesBeside: boolean
  /** What the devices tell about where guest memory is. */
  readonly placement: MemoryPlacement
  /** The device all offsets refer to: the one given or opened, or the spool. */
  readonly storage: BlockDevice
  readonly #owned: readonly BlockDevice[]
  readonly #rest: StreamIndex['rest']

  private constructor(
    storage: BlockDevice,
    owned: readonly BlockDevice[],
    index: StreamIndex,
    how: { readonly libvirt?: LibvirtSaveHeader | undefined; readonly streamOffset: number; readonly pagesBeside: boolean; readonly placement: MemoryPlacement; readonly cut?: string | undefined },
  ) {
    super()
    this.storage = storage
    this.#owned = owned
    this.#rest = index.rest
    this.libvirt = how.libvirt
    this.pagesBeside = how.pagesBeside
    this.configuration = index.configuration
    this.placement = how.placement
    this.cut = how.cut
    this.ram = new RamState(storage, index.blocks, index.ram, { machine: index.configuration?.machine, placement: how.placement })
    this.ramSection = index.ramSection
    this.devices = index.devices.map((device, i) => deviceState(device, index.description?.devices[i]))
    this.description = index.description
    this.streamOffset = how.streamOffset
    this.streamLength = index.end - how.streamOffset
    this.tailOffset = index.tailOffset
  }

  /**
   * Reads the stream once, in large sequential requests, and keeps where everything is: 8 bytes for
   * each guest page. Takes plain streams, mapped-ram files, libvirt save images, and any of these
   * compressed with gzip or zstd.
   *
   * The VM state owns a device given as `source` and closes it (see `keepOpen`), also when indexing fails.
   * @throws FormatError (`ERR_STREAM`) for a damaged stream, `UnsupportedError` for a compression
   * that Node has not; what `openSource` throws
   */
  static async index(source: Source, options: VmStateOptions = {}): Promise<VmState> {
    const given = isBlockDevice(source)
    const device = given ? source : await openSource(source, { readOnly: true, signal: options.signal })
    const owned: BlockDevice[] = given && options.keepOpen === true ? [] : [device]
    if (typeof options.spool === 'object') owned.push(options.spool)
    try {
      const padded = device.limits.requestAlignment > 1 ? pad(device) : device
      const libvirt = await readLibvirtHeader(padded, options)
      const offset = libvirt?.streamOffset ?? 0
      const compression = await compressionOf(padded, offset, libvirt, options)
      const storage = compression === undefined ? padded : await decompress(padded, offset, compression, { ...options, spool: await opened(options.spool, owned) })
      const streamOffset = compression === undefined ? offset : 0
      const index = await indexStream(storage, streamOffset, options)
      const placement = await placementOf(storage, index, options)
      const { tailOffset: from, end, ramSection: { footers } } = index
      const cut = from === undefined ? undefined : await cutOf(storage, { from, end, footers }, options)
      return new VmState(storage, owned, index, { libvirt, streamOffset, pagesBeside: false, placement, cut })
    } catch (error) {
      for (const each of owned) await each.close()
      throw error
    }
  }

  /**
   * A VM whose pages lie beside its stream: `before` and `after` are the stream without them, as {@link VmState.rest} gives
   * it, `pages` is the device that `ranges` refer to. It stays open.
   * @throws FormatError (`ERR_STREAM`) for a damaged stream
   */
  static async beside(
    { before, after }: { readonly before: Uint8Array; readonly after: Uint8Array },
    pages: BlockDevice,
    ranges: readonly PageRange[],
    options: CallOptions = {},
  ): Promise<VmState> {
    const stream = new MemoryDevice(concat([before, after]), { readOnly: true })
    const index = await indexStream(stream, 0, options)
    index.ram.addRanges(ranges, stream.size)
    const rest = { before: [{ offset: 0, length: before.length }], after: [{ offset: before.length, length: after.length }] }
    const placement = await placementOf(stream, index, options)
    return new VmState(join(stream, pages), [stream], { ...index, rest }, { streamOffset: 0, pagesBeside: true, placement })
  }

  /** Machine type, for example `pc-q35-9.0`; machine types up to 2.3 do not write it. */
  get machine(): string | undefined {
    return this.configuration?.machine
  }

  /** The migration capabilities that the stream lists: those that change its format. */
  get capabilities(): readonly string[] {
    return this.configuration === undefined ? [] : capabilitiesOf(this.configuration)
  }

  /** The VM's UUID, where the stream has it. */
  get uuid(): Uint8Array | undefined {
    for (const part of this.configuration?.subsections ?? []) if (part.name === 'configuration/uuid') return part.uuid
    return undefined
  }

  /** Device `name`. @throws Qcow2Error `ERR_NOT_FOUND` */
  device(name: string, instanceId = 0): DeviceState {
    const found = this.devices.find((device) => device.name === name && device.instanceId === instanceId)
    if (found !== undefined) return found
    throw new Qcow2Error('ERR_NOT_FOUND', `no device section '${name}' instance ${instanceId}`)
  }

  /** The body of a device section as it is in the stream. */
  readDevice(device: DeviceState, options?: CallOptions): Promise<Uint8Array> {
    this.assertOpen()
    return this.storage.read(device.offset, device.length, options)
  }

  /**
   * The fields of a device section, by the VM description.
   * @throws FormatError (`ERR_STREAM`) for a description that does not fit the section
   */
  async decodeDevice(device: DeviceState, options?: CallOptions): Promise<Record<string, DeviceValue>> {
    return this.#decode(device, deviceBudget(device.length), options)
  }

  async #decode(device: DeviceState, budget: ValueBudget, options?: CallOptions): Promise<Record<string, DeviceValue>> {
    const { description } = device
    if (description === undefined) throw new UnsupportedError(`device '${device.name}': the stream has no VM description`, ['VM description'])
    return decodeStruct(description, await this.readDevice(device, options), 0, budget)
  }

  /** All devices decoded, by `name (instance)`, in the order of the stream; a repeated key gets `#2`, `#3`, … */
  async decodeDevices(options?: CallOptions): Promise<Record<string, Record<string, DeviceValue>>> {
    const all = Object.create(null) as Record<string, Record<string, DeviceValue>>
    const seen = new Map<string, number>()
    const turn = turns()
    let left: number = limits.allValues
    for (const device of this.devices) {
      const key = `${device.name} (${device.instanceId})`
      const times = (seen.get(key) ?? 0) + 1
      seen.set(key, times)
      let free = times === 1 ? key : `${key} #${times}`
      while (free in all) free += ' #'
      const budget = deviceBudget(device.length)
      const before = (budget.left = Math.min(budget.left, left))
      all[free] = await this.#decode(device, budget, options)
      left -= before - budget.left
      await turn()
      options?.signal?.throwIfAborted()
    }
    return all
  }

  /**
   * The stream without its pages, `before` or `after` the place where they belong. Together they are
   * a well-formed stream; a mapped-ram file's becomes that of a plain stream. The chunks belong to the caller.
   */
  async *rest(part: 'before' | 'after', options?: CallOptions): AsyncGenerator<Uint8Array, void, undefined> {
    this.assertOpen()
    for (const piece of this.#rest[part]) {
      if (piece instanceof Uint8Array) yield piece.slice()
      else for (let at = 0; at < piece.length; at += restRead) yield await this.storage.read(piece.offset + at, Math.min(restRead, piece.length - at), options)
    }
  }

  protected async onClose(): Promise<void> {
    for (const device of this.#owned) await device.close()
  }
}

function placementOf(storage: BlockDevice, { devices, tailOffset, end }: StreamIndex, options: CallOptions): Promise<MemoryPlacement> {
  const sections = devices.map(({ section, offset, length }) => ({ name: section.idstr, instanceId: section.instanceId, offset, length }))
  return readPlacement(storage, sections, tailOffset === undefined ? undefined : { offset: tailOffset, end }, options)
}

function deviceState({ section, offset, length }: IndexedDevice, description: DeviceDescription | undefined): DeviceState {
  const { idstr: name, instanceId, versionId, id: sectionId } = section
  return { name, instanceId, versionId, sectionId, offset, length, description }
}

async function compressionOf(
  device: BlockDevice,
  offset: number,
  libvirt: LibvirtSaveHeader | undefined,
  options: CallOptions,
): Promise<FileCompression | undefined> {
  const format = libvirt?.format ?? 'raw'
  if (format === 'gzip' || format === 'zstd') return format
  if (format === 'bzip2' || format === 'xz' || format === 'lzop') {
    throw new UnsupportedError(`libvirt save header: the stream is compressed with ${format}, which Node cannot read; decompress it first: tail -c +${offset + 1} FILE | ${format} -d > STREAM`, [format])
  }
  const magic = await device.read(offset, Math.min(4, device.size - offset), options)
  if (magic[0] === 0x1f && magic[1] === 0x8b) return 'gzip'
  if (magic[0] === 0x28 && magic[1] === 0xb5 && magic[2] === 0x2f && magic[3] === 0xfd) return 'zstd'
  return undefined
}

/** The spool, which belongs to the VM state from now on. */
async function opened(spool: Spool | undefined, owned: BlockDevice[]): Promise<BlockDevice | undefined> {
  if (typeof spool !== 'function') return spool
  const device = await spool()
  owned.push(device)
  return device
}

/** Saved VMs in images are read from any place of the file, which no compressed one allows. */
function refuseImage(start: Uint8Array, compression: FileCompression): void {
  if (![0x51, 0x46, 0x49, 0xfb].every((byte, index) => start[index] === byte)) return
  const tool = compression === 'gzip' ? 'gzip -d' : 'zstd -d'
  throw new UnsupportedError(`a qcow2 image compressed with ${compression}: decompress the file first (${tool})`, [compression])
}

/** Into the spool, if there is one. */
async function decompress(
  device: BlockDevice,
  offset: number,
  compression: FileCompression,
  options: CallOptions & { readonly spool: BlockDevice | undefined },
): Promise<BlockDevice> {
  const { signal } = options
  // of its whole size from the start: what is not written takes no memory
  const spool = options.spool ?? new MemoryDevice(memorySpoolLimit)
  const turn = turns()
  let at = 0
  for await (const chunk of decoded(compression, offset, decompressStream(compression, deviceChunks(device, offset, { signal })))) {
    signal?.throwIfAborted()
    if (at === 0) refuseImage(chunk, compression)
    if (options.spool === undefined && at + chunk.length > memorySpoolLimit) {
      throw new UnsupportedError(`the ${compression} stream holds more than ${memorySpoolLimit} bytes: give a device as spool, or decompress it first`, ['spool'])
    }
    await spool.write(at, chunk, { signal })
    at += chunk.length
    await turn()
  }
  return options.spool ?? slice(spool, 0, at)
}

/** The chunks, with a failure of the codec told as a damaged stream. */
async function* decoded(compression: FileCompression, offset: number, chunks: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array, void, undefined> {
  try {
    yield* chunks
  } catch (cause) {
    if (Qcow2Error.is(cause) || !(cause instanceof Error)) throw cause
    throw new FormatError(`the data is damaged: ${cause.message}`, { structure: `${compression} stream`, offset }, 'ERR_STREAM', { cause })
  }
}
