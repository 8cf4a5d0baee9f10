/**
 * A LUKS1 volume in a file of its own, QEMU's format `luks`: the header, then the disk through the cipher. The header and
 * the key slots are `codec/crypto`. (LUKS1 on-disk format specification 1.2.3.)
 */
import { BaseDevice, extent, type BlockDevice, type BlockLimits, type CallOptions, type Extent, type WriteOptions } from '../block/device.ts'
import { FilterDevice } from '../block/filter.ts'
import { pad } from '../block/pad.ts'
import { closeUnlessGiven, isReadOnly, openSource, openTarget, type Source } from '../block/source.ts'
import { decodeLuksHeader, maxLuksArea, type LuksHeader } from '../codec/crypto/luks-header.ts'
import type { SectorCipher } from '../codec/crypto/sector-cipher.ts'
import { viewOf } from '../bytes/view.ts'
import { FormatError, IoError } from '../core/errors.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'

/** How a LUKS volume is opened. */
export interface LuksOptions extends CallOptions {
  /** Opens a key slot. A string is taken as UTF-8. */
  readonly passphrase: string | Uint8Array
  /** Default false. */
  readonly readOnly?: boolean | undefined
  /** Direct I/O for paths: past the page cache. Default false. */
  readonly direct?: boolean | undefined
}

/** A new LUKS volume. */
export interface CreateLuksImageOptions extends CallOptions {
  /** Bytes of the disk, a multiple of 512. */
  readonly size: number
  readonly passphrase: string | Uint8Array
  /** PBKDF2 iterations of the key slot; default 600,000. */
  readonly iterations?: number | undefined
}

const openOptions: OptionNames<LuksOptions> = { passphrase: true, readOnly: true, direct: true, signal: true }
const createOptions: OptionNames<CreateLuksImageOptions> = { size: true, passphrase: true, iterations: true, signal: true }

const sectorSize = 512

/** Node's ciphers take a few milliseconds to load: only who uses them waits. */
const loadCrypto = (): Promise<typeof import('../codec/crypto/luks.ts')> => import('../codec/crypto/luks.ts')

const payloadOffsetAt = 104
/** Encrypted or decrypted in one go, so that a long request does not hold the event loop. */
const pieceBytes = 1 << 20

/**
 * The disk in a LUKS1 volume. Requests may be of any size, at any offset. Nothing distinguishes zeroes from data in such
 * a volume, so its map is one extent of data; a new one reads as random bytes where nothing was written.
 *
 * @example
 * ```ts
 * import { convertToQcow2, LuksImage } from 'qcow2'
 *
 * await using volume = await LuksImage.open('disk.luks', { passphrase: 'secret', readOnly: true })
 * await convertToQcow2(volume, 'disk.qcow2')
 * ```
 */
export class LuksImage extends FilterDevice {
  /** Of the volume. */
  readonly header: LuksHeader

  private constructor(host: BlockDevice, header: LuksHeader, cipher: SectorCipher) {
    super(pad(new Volume(host, header, cipher)))
    this.header = header
  }

  /**
   * Opens a volume; a device given belongs to the image then.
   * @throws FormatError if the header is malformed; Qcow2Error `ERR_NOT_FOUND` if the passphrase opens no key slot;
   * UnsupportedError for LUKS2 and ciphers other than AES; TypeError for an unknown option.
   */
  static async open(source: Source, options: LuksOptions): Promise<LuksImage> {
    refuseUnknownOptions('LuksImage.open', options, openOptions)
    const { passphrase, direct, signal } = options
    const host = await openSource(source, { readOnly: options.readOnly === true || isReadOnly(source), direct, signal })
    try {
      const area = await readArea(host)
      const { openLuks } = await loadCrypto()
      return new LuksImage(host, decodeLuksHeader(area), await openLuks(area, passphrase, { signal }))
    } catch (error) {
      await closeUnlessGiven(host, source)
      throw error
    }
  }

  /**
   * Makes a new volume as QEMU does (aes-256, xts-plain64, sha256), durable, and opens it for writing. A file at a path is
   * replaced; the disk in a device of fixed size reaches to its end.
   * @throws Qcow2Error `ERR_BUSY` if the file at a path is in use, `ERR_NO_SPACE` for a device that is too small; RangeError for a size that is not a multiple of 512; what {@link open} throws of options.
   */
  static async create(target: Source, options: CreateLuksImageOptions): Promise<LuksImage> {
    refuseUnknownOptions('LuksImage.create', options, createOptions)
    const { size, passphrase, iterations, signal } = options
    if (!Number.isSafeInteger(size) || size < 0 || size % sectorSize !== 0) throw new RangeError(`size must be a multiple of 512, not ${size}`)
    const { createLuks } = await loadCrypto()
    const { area, cipher } = await createLuks(passphrase, { iterations })
    const file = await openTarget(target, { signal })
    try {
      const host = pad(file.device)
      await layOut(host, area, size, { signal })
      await file.keep()
      return new LuksImage(host, decodeLuksHeader(area), cipher)
    } catch (error) {
      await file.discard()
      throw error
    }
  }
}

/** The sectors of the disk, through the cipher. */
class Volume extends BaseDevice {
  readonly #host: BlockDevice
  readonly #header: LuksHeader
  readonly #cipher: SectorCipher

  constructor(host: BlockDevice, header: LuksHeader, cipher: SectorCipher) {
    super()
    this.#host = host
    this.#header = header
    this.#cipher = cipher
  }

  override get below(): readonly BlockDevice[] {
    return [this.#host]
  }

  /** Of the disk, in bytes: whole sectors. */
  get size(): number {
    return luksDiskSize(this.#host, this.#header)
  }

  get readOnly(): boolean {
    return this.#host.readOnly
  }

  get limits(): BlockLimits {
    return { requestAlignment: sectorSize, memoryAlignment: 1, optimalTransfer: this.#host.limits.optimalTransfer, discardAlignment: sectorSize }
  }

  protected onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    return this.inSteps(this.#read(offset, target, options))
  }

  async #read(offset: number, target: Uint8Array, options: CallOptions | undefined): Promise<void> {
    for (let at = 0; at < target.length; at += pieceBytes) {
      const piece = target.subarray(at, at + pieceBytes)
      await this.#host.readInto(this.#header.payloadOffset + offset + at, piece, options)
      this.#cipher.decrypt(piece, (offset + at) / sectorSize)
    }
  }

  protected onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.inSteps(this.#write(offset, source, options))
  }

  async #write(offset: number, source: Uint8Array, options: WriteOptions | undefined): Promise<void> {
    for (let at = 0; at < source.length; at += pieceBytes) {
      const piece = source.slice(at, at + pieceBytes)
      this.#cipher.encrypt(piece, (offset + at) / sectorSize)
      await this.#host.write(this.#header.payloadOffset + offset + at, piece, options)
    }
  }

  // eslint-disable-next-line @typescript-eslint/require-await -- there is nothing to look up
  protected override async *onMap(offset: number, length: number): AsyncGenerator<Extent, void, undefined> {
    yield extent({ start: offset, length, depth: 0, present: true, zero: false, data: true, compressed: false })
  }

  protected onFlush(options?: CallOptions): Promise<void> {
    return this.#host.flush(options)
  }

  /** Zeroes are written where the disk grows: the file's own would read as random bytes. */
  protected override async onResize(size: number, options?: CallOptions): Promise<void> {
    if (size % sectorSize !== 0) throw new RangeError(`size must be a multiple of 512, not ${size}`)
    const before = this.size
    await this.#host.resize(this.#header.payloadOffset + size, options)
    if (size > before) await this.onWriteZeroes(before, size - before, options)
  }

  protected onClose(): Promise<void> {
    return this.#host.close()
  }
}

/**
 * The header of a volume; no key is needed. A device given stays open.
 * @throws FormatError, UnsupportedError if it cannot be understood.
 */
export async function readLuksHeader(host: BlockDevice): Promise<LuksHeader> {
  return decodeLuksHeader(await readArea(host))
}

/** Bytes of the disk in a volume: whole sectors. */
export function luksDiskSize(host: BlockDevice, { payloadOffset }: LuksHeader): number {
  const bytes = Math.max(0, host.size - payloadOffset)
  return bytes - (bytes % sectorSize)
}

/** The header and the key material: all that lies before the disk. */
async function readArea(host: BlockDevice): Promise<Uint8Array> {
  const fixed = await host.read(0, Math.min(sectorSize, host.size))
  if (fixed.length < sectorSize) throw new FormatError(`the file has ${host.size} bytes, the header alone takes 592`, { structure: 'LUKS header', offset: 0 })
  const length = viewOf(fixed).getUint32(payloadOffsetAt) * sectorSize
  if (length > host.size || length > maxLuksArea) {
    const detail = `the payload offset is ${length}; it must lie in the file, which has ${host.size} bytes, and be at most ${maxLuksArea}`
    throw new FormatError(detail, { structure: 'LUKS header', field: 'payload_offset', offset: payloadOffsetAt })
  }
  return host.read(0, length)
}

/** Bytes that hold what makes a file a volume. */
const headerBytes = 4096

/** Writes the area before the disk. Its first bytes go last, when the rest is durable, and those of an older volume first. */
async function layOut(host: BlockDevice, area: Uint8Array, size: number, options: CallOptions): Promise<void> {
  const end = area.length + size
  if (!host.growable && host.size < end) {
    const cause = new Error(`the volume takes ${end} bytes, the device has ${host.size}: No space left on device`)
    throw new IoError('resize', cause, { code: 'ERR_NO_SPACE', offset: host.size, length: end - host.size })
  }
  if (host.size > 0) {
    await (host.growable ? host.resize(0, options) : host.writeZeroes(0, sectorSize, options))
    await host.flush(options)
  }
  if (host.growable) await host.resize(end, options)
  await host.write(headerBytes, area.subarray(headerBytes), options)
  await host.flush(options)
  await host.write(0, area.subarray(0, headerBytes), options)
  await host.flush(options)
}
