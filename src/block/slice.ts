/** A window onto a part of a device. */
import { Qcow2Error } from '../core/errors.ts'
import {
  checkRange,
  type BlockDevice,
  type CallOptions,
  type Extent,
  type MapOptions,
  type WriteOptions,
  type WriteZeroesOptions,
} from './device.ts'
import { FilterDevice } from './filter.ts'

/** Options of {@link slice}. */
export interface SliceOptions {
  /** Refuse writes even where the inner device takes them. */
  readonly readOnly?: boolean | undefined
  /** Closing the slice leaves the inner device open, so that several slices can share it. */
  readonly keepOpen?: boolean | undefined
}

/**
 * The bytes `[offset, offset + length)` of `device` as a device of their own, of fixed size.
 * @param length in bytes; default to the end of the device
 * @throws RangeError if the range is not within the device
 * @throws Qcow2Error `ERR_ALIGNMENT` if the range breaks the device's request alignment
 */
export function slice(device: BlockDevice, offset: number, length?: number, options: SliceOptions = {}): BlockDevice {
  const bytes = length ?? device.size - offset
  checkRange(offset, bytes, device.size)
  const { requestAlignment } = device.limits
  const reachesEnd = offset + bytes === device.size
  if (offset % requestAlignment !== 0 || (bytes % requestAlignment !== 0 && !reachesEnd)) {
    throw new Qcow2Error(
      'ERR_ALIGNMENT',
      `slice of ${bytes} bytes at offset ${offset}: both must be multiples of ${requestAlignment}; wrap the device in pad() first`,
    )
  }
  return new SliceDevice(device, offset, bytes, options)
}

class SliceDevice extends FilterDevice {
  readonly #offset: number
  readonly #length: number
  readonly #options: SliceOptions
  readonly #isWhole: boolean

  constructor(inner: BlockDevice, offset: number, length: number, options: SliceOptions) {
    super(inner)
    this.#offset = offset
    this.#length = length
    this.#options = options
    this.#isWhole = offset === 0 && length === inner.size
  }

  /** A part of a file is another thing than the file. */
  override get path(): string | undefined {
    return this.#isWhole ? super.path : undefined
  }

  override get identity(): string | undefined {
    return this.#isWhole ? super.identity : undefined
  }

  override get size(): number {
    return this.#length
  }

  override get readOnly(): boolean {
    return this.#options.readOnly ?? this.inner.readOnly
  }

  override get growable(): boolean {
    return false
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    return this.inner.readInto(this.#offset + offset, target, options)
  }

  protected override onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.inner.write(this.#offset + offset, source, options)
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    return this.inner.writeZeroes(this.#offset + offset, length, options)
  }

  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.inner.discard(this.#offset + offset, length, options)
  }

  protected override onResize(): Promise<void> {
    return Promise.reject(new Qcow2Error('ERR_UNSUPPORTED', 'a slice has a fixed size'))
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    for await (const extent of this.inner.map({ ...options, offset: this.#offset + offset, length })) {
      yield { ...extent, start: extent.start - this.#offset }
    }
  }

  protected override onClose(): Promise<void> {
    return this.#options.keepOpen === true ? Promise.resolve() : this.inner.close()
  }
}
