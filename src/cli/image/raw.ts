/**
 * A raw image: any bytes, as whole sectors. Owns the zeroes between the end of a file and the end of
 * its last sector, as QEMU shows them.
 */
import { anyRequest, BaseDevice, extent, type BlockDevice, type BlockLimits, type CallOptions, type Extent, type MapOptions, type WriteOptions, type WriteZeroesOptions } from '../../block/device.ts'

const sector = 512

/** The device itself where its size is whole sectors, else a view that is; the view owns the device. */
export function rawImage(device: BlockDevice): BlockDevice {
  return device.size % sector === 0 ? device : new RawImage(device)
}

class RawImage extends BaseDevice {
  readonly #file: BlockDevice

  constructor(file: BlockDevice) {
    super()
    this.#file = file
  }

  override get below(): readonly BlockDevice[] {
    return [this.#file]
  }

  get size(): number {
    return Math.ceil(this.#file.size / sector) * sector
  }

  get readOnly(): boolean {
    return this.#file.readOnly
  }

  get limits(): BlockLimits {
    return { ...anyRequest, optimalTransfer: this.#file.limits.optimalTransfer }
  }

  protected async onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const stored = Math.max(0, Math.min(target.length, this.#file.size - offset))
    if (stored > 0) await this.#file.readInto(offset, target.subarray(0, stored), options)
    target.fill(0, stored)
  }

  protected onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.#file.write(offset, source, options)
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    return this.#file.writeZeroes(offset, length, options)
  }

  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    const stored = Math.min(length, this.#file.size - offset)
    return stored > 0 ? this.#file.discard(offset, stored, options) : Promise.resolve()
  }

  protected override onResize(size: number, options?: CallOptions): Promise<void> {
    return this.#file.resize(size, options)
  }

  protected onFlush(options?: CallOptions): Promise<void> {
    return this.#file.flush(options)
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    const stored = Math.max(0, Math.min(length, this.#file.size - offset))
    if (stored > 0) yield* this.#file.map({ ...options, offset, length: stored })
    if (stored < length) {
      const start = offset + stored
      yield extent({ start, length: length - stored, depth: 0, present: true, zero: true, data: false, compressed: false })
    }
  }

  protected onClose(): Promise<void> {
    return this.#file.close()
  }
}
