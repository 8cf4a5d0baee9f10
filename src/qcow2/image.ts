/**
 * A qcow2 image as a block device: the facade over the engine. It wires the paths together and holds
 * no logic of its own.
 */
import {
  BaseDevice,
  checkRange,
  type BlockDevice,
  type BlockLimits,
  type CallOptions,
  type Extent,
  type MapOptions,
  type WriteZeroesOptions,
} from '../block/device.ts'
import { openFile } from '../block/file.ts'
import { checkImageLocks, holdImageFile } from '../block/file-lock.ts'
import { openSource, type Source } from '../block/source.ts'
import { Qcow2Error } from '../core/errors.ts'
import { Bitmaps } from './bitmaps.ts'
import { checkOpenImage } from './check-open.ts'
import type { CheckReport } from './check-report.ts'
import type { CheckOptions } from './check.ts'
import { freshState, planLayout, writeLayout, type LayoutOptions } from './create.ts'
import type { EncryptionOptions } from './encryption.ts'
import type { Engine } from './engine.ts'
import { mapLayer } from './map.ts'
import { assembleEngine, hostFile, openEngine, readState, type OpenEngineOptions } from './open.ts'
import { readLayer } from './read.ts'
import { createDataFile, openBacking, rootContext, type ReferenceContext, type ReferenceOptions } from './references.ts'
import { resizeDisk } from './resize.ts'
import { closeEngine } from './shutdown.ts'
import { Snapshots } from './snapshots.ts'
import { writeActive } from './write.ts'
import { storeClusters, writeCompressed } from './write-compressed.ts'
import { zeroActive } from './zero.ts'

/** Options of {@link Qcow2Image.open}. */
export interface OpenOptions extends ReferenceOptions, CallOptions {
  /** Default false. */
  readonly readOnly?: boolean | undefined
  /** Direct I/O for paths: past the page cache. Default false. */
  readonly direct?: boolean | undefined
  /** Requests of at most this many bytes to files are made synchronously; see `openFile`. Default 0. */
  readonly syncLimit?: number | undefined
  /** Read an image even while a running QEMU writes to it: what is read may contradict itself. */
  readonly forceShare?: boolean | undefined
  /** Opens an encrypted image: the LUKS passphrase, or the key of legacy AES. */
  readonly passphrase?: string | Uint8Array | undefined
}

/** Options of {@link Qcow2Image.create}. */
export interface CreateOptions extends Omit<LayoutOptions, 'size'>, Omit<ReferenceOptions, 'backing' | 'dataFile'>, CallOptions {
  /** Virtual size of the disk in bytes; rounded up to a multiple of 512. An overlay may leave it to its backing file. */
  readonly size?: number | undefined
  /** Direct I/O for paths: past the page cache. Default false. */
  readonly direct?: boolean | undefined
  /** Requests of at most this many bytes to the new file are made synchronously; see `openFile`. Default 0. */
  readonly syncLimit?: number | undefined
  /** Fail with `ERR_EXISTS` if the file exists, instead of replacing it. Default false. */
  readonly exclusive?: boolean | undefined
  /** Encrypt guest data. Default: not. */
  readonly encryption?: EncryptionOptions | undefined
}

/**
 * An open qcow2 image: the guest's view of the disk. Requests may be of any size, at any offset, any
 * number at once.
 *
 * Aborting `signal` ends a long request between two clusters or batches of them. The image is consistent; of
 * an aborted `write`, `writeZeroes` or `discard` any part may have been done, an aborted `resize` leaves the
 * old size, when shrinking with an end that may read as zeroes, or as the backing file, already. Shrinking can be
 * aborted while it empties whole clusters; once it gives up L2 tables it goes through.
 */
export class Qcow2Image extends BaseDevice {
  readonly limits: BlockLimits
  /** The internal snapshots. */
  readonly snapshots: Snapshots
  /** The dirty bitmaps. */
  readonly bitmaps: Bitmaps
  readonly #engine: Engine
  /** Lets others open the file for writing. */
  readonly #release: () => void

  private constructor(engine: Engine, release: () => void = () => undefined) {
    super()
    this.#engine = engine
    this.#release = release
    this.snapshots = new Snapshots(engine)
    this.bitmaps = new Bitmaps(engine)
    this.limits = {
      requestAlignment: engine.cipher === undefined ? 1 : 512,
      memoryAlignment: 1,
      optimalTransfer: engine.data.device.limits.optimalTransfer,
      discardAlignment: engine.geometry.clusterSize,
    }
  }

  /**
   * Opens an image, and what it refers to under the policy of the options.
   * @throws Qcow2Error `ERR_FORMAT` not an image or malformed, `ERR_UNSUPPORTED` features this library
   * does not have or a reference the policy refuses, `ERR_CORRUPT` marked corrupt and not `readOnly`, `ERR_BUSY` a
   * running QEMU uses the file, or an image of this process is open for writing on it and this one would write too.
   */
  static async open(source: Source, options: OpenOptions = {}): Promise<Qcow2Image> {
    options.signal?.throwIfAborted()
    const readOnly = options.readOnly === true || isReadOnly(source)
    const device = await openSource(source, { ...defined(options), readOnly })
    let release: (() => void) | undefined
    try {
      if (!device.readOnly) release = holdImageFile(device)
      const context = await rootContext(pathOf(source), options, openNested)
      return new Qcow2Image(
        await openEngine(device, { readOnly: device.readOnly, cacheSize: options.cacheSize, context, openCipher: cipherFrom(options) }),
        release,
      )
    } catch (error) {
      release?.()
      if (device !== source) await device.close()
      throw error
    }
  }

  /** @internal The image over an engine. */
  static over(engine: Engine, release?: () => void): Qcow2Image {
    return new Qcow2Image(engine, release)
  }

  /**
   * Makes a new image and opens it for writing. A device must be empty or is overwritten.
   * @throws RangeError or TypeError for options outside the format, `ERR_EXISTS` with `exclusive`.
   */
  static async create(target: Source, options: CreateOptions): Promise<Qcow2Image> {
    options.signal?.throwIfAborted()
    const { references, probeBackingFormat, cacheSize } = options
    const context = await rootContext(pathOf(target), { references, probeBackingFormat, cacheSize }, openNested)
    if (options.size !== undefined) return createImage(target, { ...options, size: options.size }, context)
    const { backing } = options
    if (backing === undefined) throw new TypeError('size is missing: only an overlay may leave it to its backing file')
    const device = await openBacking(backing.file, backing.format, context)
    try {
      return await createImage(target, { ...options, size: device.size }, { ...context, sizedBy: device })
    } catch (error) {
      await device.close()
      throw error
    }
  }

  /** Virtual size of the disk in bytes: that of the header rounded down to a multiple of 512, as in QEMU. */
  get size(): number {
    const { size } = this.#engine.header
    return size - (size % 512)
  }

  get readOnly(): boolean {
    return this.#engine.readOnly
  }

  protected onRead(offset: number, target: Uint8Array): Promise<void> {
    const engine = this.#engine
    const { requests } = engine
    if (engine.readOnly) return readLayer(engine, engine.active, offset, target)
    if (!requests.held) return requests.track(readLayer(engine, engine.active, offset, target))
    return requests.run(() => readLayer(engine, engine.active, offset, target))
  }

  protected onWrite(offset: number, source: Uint8Array, options?: CallOptions): Promise<void> {
    const engine = this.#engine
    const signal = options?.signal
    if (!engine.requests.held) return engine.requests.track(writeActive(engine, offset, source, signal))
    return engine.requests.run(() => writeActive(engine, offset, source, signal))
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    const mode = options?.unmap === true ? 'unmap' : 'keep'
    return this.#engine.requests.run(() => zeroActive(this.#engine, offset, length, mode, options?.signal))
  }

  /** Whole clusters then read as zeroes; version 2 images over a backing file stay unchanged. */
  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.#engine.requests.run(() => zeroActive(this.#engine, offset, length, 'discard', options?.signal))
  }

  /** Grows or shrinks the disk, to a multiple of 512 bytes. New bytes read as zeroes. */
  protected override onResize(size: number, options?: CallOptions): Promise<void> {
    return this.#engine.requests.exclusive(() => resizeDisk(this.#engine, size, options?.signal))
  }

  /**
   * Stores bytes compressed, cluster by cluster, as far as they become smaller. `offset` and length are
   * whole clusters, but for the last one of the disk.
   * @throws Qcow2Error `ERR_ALIGNMENT`, or `ERR_UNSUPPORTED` with a data file or encryption, or for zstd
   * on a Node that has none.
   */
  writeCompressed(offset: number, source: Uint8Array, options: CallOptions = {}): Promise<void> {
    return this.#changeWhole(offset, source.length, options, () => writeCompressed(this.#engine, offset, source, options.signal))
  }

  /**
   * Stores clusters that are compressed already, with the image's compression type: one for each guest
   * cluster from `offset` on.
   * @internal For compressing in workers.
   */
  storeCompressed(offset: number, payloads: readonly Uint8Array[], options: CallOptions = {}): Promise<void> {
    const length = Math.min(payloads.length * this.#engine.geometry.clusterSize, this.size - offset)
    return this.#changeWhole(offset, length, options, () => storeClusters(this.#engine, offset, payloads))
  }

  /**
   * Gives whole clusters back so that the backing file shows through again; parts of clusters stay.
   * @internal For emptying an overlay after a commit.
   */
  forget(offset: number, length: number, options: CallOptions = {}): Promise<void> {
    options.signal?.throwIfAborted()
    checkRange(offset, length, this.size)
    return this.#engine.requests.run(() => zeroActive(this.#engine, offset, length, 'forget', options.signal))
  }

  /**
   * Checks the whole image, and repairs it if asked: `leaks` frees what nothing refers to, `all` also
   * repairs corruptions. Requests wait meanwhile. What snapshots under construction hold is no leak.
   * @throws Qcow2Error `ERR_BUSY` for a repair while a snapshot is being written or is open.
   */
  check(options: CheckOptions & { readonly repair?: 'leaks' | 'all' | undefined } = {}): Promise<CheckReport> {
    this.assertOpen()
    return checkOpenImage(this.#engine, options)
  }

  /** @internal The parts of the image, for the layers of this folder. */
  get engine(): Engine {
    return this.#engine
  }

  async #changeWhole(offset: number, length: number, options: CallOptions, task: () => Promise<void>): Promise<void> {
    this.assertOpen()
    options.signal?.throwIfAborted()
    checkRange(offset, length, this.size)
    const { clusterSize } = this.#engine.geometry
    if (offset % clusterSize !== 0 || (length % clusterSize !== 0 && offset + length !== this.size)) {
      throw new Qcow2Error('ERR_ALIGNMENT', `compressed write of ${length} bytes at offset ${offset}: both must be whole clusters of ${clusterSize} bytes`)
    }
    if (this.readOnly) throw new Qcow2Error('ERR_READ_ONLY', 'the image is open read-only; open it for writing')
    await this.#engine.requests.run(task)
  }

  protected onFlush(): Promise<void> {
    const engine = this.#engine
    return engine.damage === undefined ? engine.flush() : Promise.reject(engine.damage)
  }

  protected override onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    return mapLayer(this.#engine, () => this.#engine.active, offset, length, options)
  }

  protected async onClose(): Promise<void> {
    try {
      await this.snapshots.close()
    } finally {
      await closeEngine(this.#engine).finally(this.#release)
    }
  }
}

async function createImage(target: Source, options: CreateOptions & LayoutOptions, context: ReferenceContext): Promise<Qcow2Image> {
  const layout = planLayout(options)
  if (options.encryption !== undefined) checkEncryption(options)
  const device = await createTarget(target, options)
  const host = hostFile(device)
  let release: (() => void) | undefined
  try {
    release = holdImageFile(device)
    if (options.dataFile !== undefined) await createDataFile(options.dataFile, layout.content.header.size, context)
    await writeLayout(host, layout)
    const state = layout.preallocation === 'off' ? freshState(layout) : await readState(host, layout.content, false)
    const engine = await assembleEngine(host, state, { readOnly: false, cacheSize: options.cacheSize, context })
    if (options.encryption !== undefined) engine.cipher = await (await encryptionCode()).encryptEmptyImage(engine, options.encryption)
    engine.unchanged = false
    engine.untouched = false
    return Qcow2Image.over(engine, release)
  } catch (error) {
    release?.()
    if (device !== target) await device.close()
    throw error
  }
}

/** A fresh file for a path; anything else as it is. A file that a running QEMU uses is left alone. */
async function createTarget(target: Source, options: CreateOptions): Promise<BlockDevice> {
  if (typeof target !== 'string' && !(target instanceof URL)) return openSource(target)
  const { direct, syncLimit } = options
  const flags = { ...(direct === undefined ? {} : { direct }), ...(syncLimit === undefined ? {} : { syncLimit }) }
  try {
    return await openFile(target, { ...flags, create: 'wx' })
  } catch (error) {
    if (options.exclusive === true || !Qcow2Error.is(error, 'ERR_EXISTS')) throw error
  }
  await checkImageLocks(target, 'write')
  return openFile(target, { ...flags, create: 'w' })
}

/** Preallocated clusters would read as decrypted zeroes, and version 2 knows only legacy AES. */
function checkEncryption({ encryption, preallocation = 'off', version, dataFile }: CreateOptions): void {
  if (preallocation !== 'off' || dataFile !== undefined) throw new TypeError('encryption goes with neither preallocation nor a data file')
  if (version === 2 && encryption?.format === 'luks') throw new TypeError('version 2 has only the legacy encryption aes; use version 3')
}

/** Loaded for encrypted images only: Node's ciphers take a few milliseconds to load. */
const encryptionCode = (): Promise<typeof import('./encryption.ts')> => import('./encryption.ts')

/** How the engine gets the cipher of an encrypted image; without a passphrase it refuses such images. */
function cipherFrom({ passphrase, signal }: Pick<OpenOptions, 'passphrase' | 'signal'>): OpenEngineOptions['openCipher'] {
  return passphrase === undefined ? undefined : async (content, host) => (await encryptionCode()).openDataCipher(passphrase, content, host, signal)
}

/** The options a caller gave, without those set to undefined. */
function defined(options: OpenOptions): { direct?: boolean; syncLimit?: number; forceShare?: boolean; signal?: AbortSignal } {
  const { direct, syncLimit, forceShare, signal } = options
  return Object.fromEntries(Object.entries({ direct, syncLimit, forceShare, signal }).filter(([, value]) => value !== undefined))
}

function isReadOnly(source: Source): boolean {
  if (source instanceof URL) return source.protocol !== 'file:'
  return typeof source === 'object' && 'readOnly' in source && source.readOnly
}

function pathOf(source: Source): string | undefined {
  if (typeof source === 'string') return source
  if (source instanceof URL) return source.protocol === 'file:' ? decodeURIComponent(source.pathname) : undefined
  return 'path' in source && typeof source.path === 'string' ? source.path : undefined
}

async function openNested(device: BlockDevice, _path: string, context: ReferenceContext): Promise<BlockDevice> {
  return Qcow2Image.over(await openEngine(device, { readOnly: true, cacheSize: context.options.cacheSize, context }))
}
