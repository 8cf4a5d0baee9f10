/**
 * A stored migration stream as a {@link PageSource}: a stream file, the VM state of an internal snapshot,
 * a mapped-ram file, a libvirt save image. Owns that opening reads the two ends of the stream only: where the
 * pages are is found out while the guest already starts, and whoever reads a page waits for that.
 */
import type { BlockDevice, CallOptions, Extent, MapOptions } from '../block/device.ts'
import { ReadOnlyDevice } from '../block/read-only.ts'
import { concat } from '../bytes/concat.ts'
import { AbortPoints } from '../core/abort-points.ts'
import { Qcow2Error } from '../core/errors.ts'
import { MigrationParser } from '../migration/parser.ts'
import { StreamRest } from '../migration/stream-rest.ts'
import { splitStream, type StreamParts } from '../migration/stream-parts.ts'
import { deviceLengths, locateVmDescription, parseVmDescription, type DeviceDescription } from '../migration/vm-description.ts'
import { VmState, type Spool } from '../migration/vm-state.ts'
import { encodeRecord } from '../migration/writer.ts'
import type { SavedRamBlock } from './page-source.ts'
import { SavedVm } from './saved-vm.ts'

/** Options of {@link StreamSource.open}. */
export interface StreamSourceOptions extends CallOptions {
  /** Leave the device open when the source is closed. */
  readonly keepOpen?: boolean | undefined
  /** Closed after the device. */
  readonly owner?: AsyncDisposable | undefined
  /** Name of the internal snapshot that the stream is in. */
  readonly snapshot?: string | undefined
  /** See {@link openSaved}; closed with the source. */
  readonly spool?: Spool | undefined
}

/** First read of the stream's start; more if the list of RAM blocks is longer. */
const startRead = 64 << 10
const startLimit = 64 << 20
/** First read of the stream's end; more if the VM description begins before. */
const endRead = 512 << 10
const endLimit = 64 << 20

/** A saved VM in a stored stream. */
export class StreamSource extends SavedVm<SavedRamBlock> {
  readonly snapshot: string | undefined
  readonly runState: string | undefined
  readonly #device: BlockDevice
  readonly #options: StreamSourceOptions
  readonly #abort: AbortController
  readonly #indexing: Promise<VmState>

  private constructor(
    device: BlockDevice,
    options: StreamSourceOptions,
    parts: StreamParts & { readonly pageSize: number; readonly runState?: string | undefined },
    indexing: Promise<VmState>,
    abort: AbortController,
  ) {
    super(parts, parts.pageSize, parts.blocks.map(({ name, length }) => ({ name, length, content: new BlockContent(indexing, name, length) })))
    this.snapshot = options.snapshot
    this.runState = parts.runState
    this.#device = device
    this.#options = options
    this.#indexing = indexing
    this.#abort = abort
  }

  /**
   * Opens the stream that `device` holds. The source owns the device and closes it (see `keepOpen`), also when
   * opening fails.
   * @throws FormatError (`ERR_STREAM`) for a damaged stream; damage between the ends shows when pages are read.
   */
  static async open(device: BlockDevice, options: StreamSourceOptions = {}): Promise<StreamSource> {
    const abort = new AbortController()
    const index = (): Promise<VmState> => VmState.index(device, { keepOpen: true, spool: options.spool, signal: abort.signal })
    try {
      const ends = await readEnds(device, options)
      if (ends !== undefined) {
        const indexing = index()
        indexing.catch(() => undefined) // reported by whoever reads a page
        return new StreamSource(device, options, ends, indexing, abort)
      }
      const vm = await index()
      const parts = splitStream(await gather(vm.rest('before', options)), await gather(vm.rest('after', options)))
      // libvirt stops a VM to save it, and remembers here that it ran
      const runState = vm.libvirt?.wasRunning === true ? 'running' : undefined
      return new StreamSource(device, options, { ...parts, pageSize: vm.ram.pageSize, runState }, Promise.resolve(vm), abort)
    } catch (error) {
      if (options.keepOpen !== true) await device.close()
      await options.owner?.[Symbol.asyncDispose]()
      throw error
    }
  }

  /** The index of the stream, once the pass over it is done. */
  index(): Promise<VmState> {
    return this.#indexing
  }

  protected async onClose(): Promise<void> {
    this.#abort.abort(new Qcow2Error('ERR_CLOSED', 'StreamSource is closed'))
    await this.#indexing.then((vm) => vm.close()).catch(() => undefined)
    if (this.#options.keepOpen !== true) await this.#device.close()
    await this.#options.owner?.[Symbol.asyncDispose]()
  }
}

/** A RAM block whose pages are known only when the index is there. */
class BlockContent extends ReadOnlyDevice {
  readonly size: number
  readonly #indexing: Promise<VmState>
  readonly #name: string
  #inner: BlockDevice | undefined

  constructor(indexing: Promise<VmState>, name: string, size: number) {
    super()
    this.#indexing = indexing
    this.#name = name
    this.size = size
  }

  protected async onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    await (this.#inner ?? (await this.#open())).readInto(offset, target, options)
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    yield* (await this.#open()).map({ ...options, offset, length })
  }

  async #open(): Promise<BlockDevice> {
    const { ram } = await this.#indexing
    return (this.#inner ??= ram.device(this.#name))
  }
}

/**
 * Start and end of a plain or mapped-ram stream; undefined for everything that needs the whole pass: compressed
 * files, libvirt images, streams with padding or without VM description.
 */
async function readEnds(device: BlockDevice, options: CallOptions): Promise<(StreamParts & { pageSize: number }) | undefined> {
  if (device.limits.requestAlignment > 1) return undefined
  const start = await readStart(device, options)
  if (start === undefined) return undefined
  const end = await readEnd(device, options)
  if (end === undefined) return undefined
  const from = end.eof - devicesLength(end.description.slice(start.early), start.footers)
  if (from < 0) return undefined
  try {
    const parts = splitStream(start.before, end.tail.subarray(from, end.end))
    return { ...parts, pageSize: start.pageSize }
  } catch (error) {
    if (Qcow2Error.is(error)) return undefined // the whole pass will say what is wrong, with its place
    throw error
  }
}

interface Start {
  /** The stream up to the place of the pages. */
  readonly before: Uint8Array
  /** Device sections in it. */
  readonly early: number
  readonly footers: boolean
  readonly pageSize: number
}

async function readStart(device: BlockDevice, options: CallOptions): Promise<Start | undefined> {
  const magic = await device.read(0, Math.min(4, device.size), options)
  if (magic[0] !== 0x51 || magic[1] !== 0x45 || magic[2] !== 0x56 || magic[3] !== 0x4d) return undefined
  const parser = new MigrationParser()
  const rest = new StreamRest()
  const pieces: Uint8Array[] = []
  let early = 0
  let footers = false
  for (let at = 0, read = 0; at < device.size && read < startLimit; read += startRead) {
    const chunk = await device.read(at, Math.min(startRead, device.size - at), options)
    for (const record of parser.push(chunk)) {
      const kept = rest.accept(record)
      if (rest.pagesSeen) return { before: concat(pieces), early, footers, pageSize: parser.pageSize }
      if (kept !== undefined) pieces.push(new Uint8Array(encodeRecord(kept)))
      if (record.kind === 'section' && record.type === 'full') early++
      if (record.kind === 'footer') footers = true
    }
    at += chunk.length
    const jump = Math.min(parser.skippable, device.size - at) // the page areas of mapped-ram
    if (jump > 0) parser.skip(jump)
    at += jump
  }
  return undefined
}

interface End {
  readonly tail: Uint8Array
  /** Positions in `tail`. */
  readonly eof: number
  readonly end: number
  readonly description: readonly DeviceDescription[]
}

async function readEnd(device: BlockDevice, options: CallOptions): Promise<End | undefined> {
  const points = new AbortPoints(options.signal)
  for (let length = Math.min(endRead, device.size); ; length = Math.min(length * 8, device.size, endLimit)) {
    await points.pass()
    const tail = await device.read(device.size - length, length, options)
    const found = locateVmDescription(tail)
    if (found !== undefined) {
      const { devices } = parseVmDescription(tail.subarray(found.start, found.start + found.length), device.size - length + found.start)
      const needed = tail.length - found.eof + devicesLength(devices, true)
      const end = found.start + found.length
      if (needed <= length) return { tail, eof: found.eof, end, description: devices }
      if (needed > Math.min(device.size, endLimit)) return undefined
      const whole = await device.read(device.size - needed, needed, options)
      const shift = needed - length
      return { tail: whole, eof: found.eof + shift, end: end + shift, description: devices }
    }
    if (length === device.size || length >= endLimit) return undefined
  }
}

/** Bytes of device sections with heads and footers. */
function devicesLength(devices: readonly DeviceDescription[], footers: boolean): number {
  const encoder = new TextEncoder()
  return deviceLengths({ devices }).reduce((sum, { name, bodyLength }) => {
    return sum + 1 + 4 + 1 + encoder.encode(name).length + 4 + 4 + bodyLength + (footers ? 5 : 0)
  }, 0)
}

async function gather(chunks: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const pieces: Uint8Array[] = []
  for await (const chunk of chunks) pieces.push(new Uint8Array(chunk))
  return concat(pieces)
}
