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
import { holdImageFile } from '../block/file-claim.ts'
import { closeUnlessGiven, isReadOnly, openSource, pathOf, type Source } from '../block/source.ts'
import { Qcow2Error } from '../core/errors.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { Bitmaps } from './bitmaps.ts'
import { checkOpenImage } from './check-open.ts'
import type { CheckReport } from './check-report.ts'
import type { CheckOptions } from './check.ts'
import type { Engine } from './engine.ts'
import { mapLayer } from './map.ts'
import { createEngine, type CreateOptions } from './new-image.ts'
import { openEngine, type OpenEngineOptions } from './open.ts'
import { readLayer } from './read.ts'
import { rootContext, type ReferenceContext, type ReferenceOptions } from './references.ts'
import { resizeDisk, type ResizeOptions } from './resize.ts'
import { closeEngine } from './shutdown.ts'
import { Snapshots } from './snapshots.ts'
import { writeActive } from './write.ts'
import { writeCompressed } from './write-compressed.ts'
import { zeroActive } from './zero.ts'

/** Options of {@link Qcow2Image.open}. */
export interface OpenOptions extends ReferenceOptions, CallOptions {
  /** Default false. */
  readonly readOnly?: boolean | undefined
  /** Direct I/O for paths: past the page cache. Default false. */
  readonly direct?: boolean | undefined
  /** Requests of at most this many bytes to files are made synchronously; see `openFile`. Default as there. */
  readonly syncLimit?: number | undefined
  /** Read an image even while a running QEMU writes to it: what is read may contradict itself. */
  readonly forceShare?: boolean | undefined
  /** False: open it whoever else uses it, also for writing. Default true. */
  readonly locking?: boolean | undefined
  /** Opens an encrypted image: the LUKS passphrase, or the key of legacy AES. */
  readonly passphrase?: string | Uint8Array | undefined
  /** Called when refcounts that the last writer postponed (dirty bit) were set right before the image opened for writing. */
  readonly onRepair?: ((report: CheckReport) => void) | undefined
}

const openOptions: OptionNames<OpenOptions> = {
  readOnly: true,
  direct: true,
  syncLimit: true,
  forceShare: true,
  locking: true,
  passphrase: true,
  onRepair: true,
  references: true,
  backing: true,
  dataFile: true,
  cacheSize: true,
  probeBackingFormat: true,
  signal: true,
}

const mark = Symbol.for('qcow2.image')

/**
 * An open qcow2 image: the guest's view of the disk. Requests may be of any size, at any offset, any
 * number at once.
 *
 * Aborting `signal` ends a long request, a read too, between two clusters or batches of them. The image is consistent; of
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
    Object.defineProperty(this, mark, { value: true })
    this.snapshots = new Snapshots(engine)
    this.bitmaps = new Bitmaps(engine)
    this.limits = {
      requestAlignment: 1,
      memoryAlignment: 1,
      optimalTransfer: engine.data.device.limits.optimalTransfer,
      discardAlignment: engine.geometry.clusterSize,
    }
  }

  /**
   * Opens an image, and what it refers to under the policy of the options.
   * @throws Qcow2Error `ERR_FORMAT` not an image or malformed, `ERR_UNSUPPORTED` features this library
   * does not have or a reference the policy refuses, `ERR_CORRUPT` marked corrupt and not `readOnly`, `ERR_BUSY` a
   * running QEMU uses the file, or this one would write and another image of this process, or another process of this library,
   * writes to the file already (see `locking`);
   * TypeError for an unknown option.
   */
  static async open(source: Source, options: OpenOptions = {}): Promise<Qcow2Image> {
    refuseUnknownOptions('Qcow2Image.open', options, openOptions)
    const { direct, syncLimit, forceShare, locking, cacheSize, onRepair, signal } = options
    signal?.throwIfAborted()
    const readOnly = options.readOnly === true || isReadOnly(source)
    const device = await openSource(source, { readOnly, direct, syncLimit, forceShare, locking, signal })
    const held: (() => void)[] = []
    const release = (): void => held.forEach((free) => free())
    try {
      const context = { ...rootContext({ path: pathOf(source), identity: device.identity }, options, openNested), held, signal }
      if (!device.readOnly && locking !== false) context.held.push(await holdImageFile(device))
      return new Qcow2Image(
        await openEngine(device, { readOnly: device.readOnly, cacheSize, context, openCipher: cipherFrom(options), onRepair, signal }),
        release,
      )
    } catch (error) {
      release()
      await closeUnlessGiven(device, source)
      throw error
    }
  }

  /** True for an open image of this library, of either build: the ESM and the CommonJS build have different classes. A filter over one is none. */
  static is(value: unknown): value is Qcow2Image {
    return typeof value === 'object' && value !== null && mark in value
  }

  /** @internal The image over an engine. */
  static over(engine: Engine, release?: () => void): Qcow2Image {
    return new Qcow2Image(engine, release)
  }

  /**
   * Makes a new image and opens it for writing. A path is a new file: it is written beside what has the name and replaces it
   * when it is whole and durable, so that a failure or a crash leaves the old file or the new one; a symbolic link stays one.
   * The content of a device is lost, and nothing of it shows.
   * @throws RangeError or TypeError for options outside the format and unknown ones; Qcow2Error `ERR_EXISTS` with `exclusive`,
   *   `ERR_BUSY` if the file at the path is in use (this process has it open, under any name; another process of this library writes
   *   to it; a running QEMU has it) or the image would be its own backing file, `ERR_NO_SPACE` for a device that is too small.
   */
  static async create(target: Source, options: CreateOptions): Promise<Qcow2Image> {
    const { engine, release } = await createEngine(target, options, openNested)
    return new Qcow2Image(engine, release)
  }

  /** Virtual size of the disk in bytes: that of the header rounded down to a multiple of 512, as in QEMU. */
  get size(): number {
    const { size } = this.#engine.header
    return size - (size % 512)
  }

  get readOnly(): boolean {
    return this.#engine.readOnly
  }

  override get below(): readonly BlockDevice[] {
    return this.#engine.below
  }

  protected onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const engine = this.#engine
    const signal = options?.signal
    if (engine.readOnly) return readLayer(engine, engine.active, offset, target, signal)
    if (!engine.requests.held) return engine.requests.track(readLayer(engine, engine.active, offset, target, signal))
    return this.#held(offset, target.length, () => readLayer(engine, engine.active, offset, target, signal), signal)
  }

  protected onWrite(offset: number, source: Uint8Array, options?: CallOptions): Promise<void> {
    const engine = this.#engine
    const signal = options?.signal
    if (!engine.requests.held) return engine.requests.track(writeActive(engine, offset, source, signal))
    return this.#held(offset, source.length, () => writeActive(engine, offset, source, signal), signal)
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    const mode = options?.unmap === true ? 'unmap' : 'keep'
    return this.#held(offset, length, () => zeroActive(this.#engine, offset, length, mode, options?.signal))
  }

  /** Whole clusters then read as zeroes; version 2 images over a backing file stay unchanged. */
  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.#held(offset, length, () => zeroActive(this.#engine, offset, length, 'discard', options?.signal))
  }

  /** Runs a request when none is held back any more. The disk may have another size by then. */
  #held(offset: number, length: number, task: () => Promise<void>, signal?: AbortSignal): Promise<void> {
    return this.#engine.requests.run(async () => {
      checkRange(offset, length, this.size)
      signal?.throwIfAborted()
      await task()
    })
  }

  /** Grows or shrinks the disk, to a multiple of 512 bytes. New bytes read as zeroes. */
  override resize(size: number, options?: ResizeOptions): Promise<void> {
    return super.resize(size, options)
  }

  protected override onResize(size: number, options?: ResizeOptions): Promise<void> {
    return this.#engine.requests.exclusive(() => resizeDisk(this.#engine, size, options))
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
   * Gives whole clusters back so that the backing file shows through again; parts of clusters stay.
   * @internal For emptying an overlay after a commit.
   */
  forget(offset: number, length: number, options: CallOptions = {}): Promise<void> {
    options.signal?.throwIfAborted()
    return this.#held(offset, length, () => zeroActive(this.#engine, offset, length, 'forget', options.signal))
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
    if (this.readOnly) throw new Qcow2Error('ERR_READ_ONLY', 'the image is open read-only; open it for writing')
    // what is the last cluster of the disk is decided when the request begins: until then the size may change
    await this.#held(offset, length, () => {
      this.#assertWhole(offset, length)
      return task()
    })
  }

  #assertWhole(offset: number, length: number): void {
    const { clusterSize } = this.#engine.geometry
    if (offset % clusterSize === 0 && (length % clusterSize === 0 || offset + length === this.size)) return
    throw new Qcow2Error('ERR_ALIGNMENT', `compressed write of ${length} bytes at offset ${offset}: both must be whole clusters of ${clusterSize} bytes`)
  }

  protected onFlush(): Promise<void> {
    const engine = this.#engine
    return engine.damage === undefined ? engine.flush() : Promise.reject(engine.damage)
  }

  protected override onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    return mapLayer(this.#engine, { layer: () => this.#engine.active, size: () => this.size }, offset, length, options)
  }

  protected async onClose(): Promise<void> {
    try {
      await this.snapshots.close()
    } finally {
      await closeEngine(this.#engine).finally(this.#release)
    }
  }
}

/** How the engine gets the cipher of an encrypted image; without a passphrase it refuses such images. */
function cipherFrom({ passphrase, signal }: Pick<OpenOptions, 'passphrase' | 'signal'>): OpenEngineOptions['openCipher'] {
  if (passphrase === undefined) return undefined
  // for encrypted images only: Node's ciphers take a few milliseconds to load
  return async (content, host) => (await import('./encryption.ts')).openDataCipher(passphrase, content, host, signal)
}

async function openNested(device: BlockDevice, _path: string, context: ReferenceContext): Promise<BlockDevice> {
  return Qcow2Image.over(await openEngine(device, { readOnly: true, cacheSize: context.options.cacheSize, context: { ...context, backing: undefined }, signal: context.signal }))
}
