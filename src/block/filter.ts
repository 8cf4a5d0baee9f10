/** The base of devices that stand on one other device: everything passes, each filter changes one thing. */
import {
  BaseDevice,
  type BlockDevice,
  type BlockLimits,
  type CallOptions,
  type Extent,
  type MapOptions,
  type WriteOptions,
  type WriteZeroesOptions,
} from './device.ts'

/** Passes every request to the inner device, which it owns and closes. */
export abstract class FilterDevice extends BaseDevice {
  /** The device underneath. */
  readonly inner: BlockDevice

  constructor(inner: BlockDevice) {
    super()
    this.inner = inner
  }

  override get below(): readonly BlockDevice[] {
    return [this.inner]
  }

  get size(): number {
    return this.inner.size
  }

  get readOnly(): boolean {
    return this.inner.readOnly
  }

  override get growable(): boolean {
    return this.inner.growable
  }

  get limits(): BlockLimits {
    return this.inner.limits
  }

  /** A filter shows what the inner device shows: the names in it, and who else may write, are judged by the same file. */
  get path(): string | undefined {
    return this.inner.path
  }

  /** The device and inode of that file. */
  get identity(): string | undefined {
    return this.inner.identity
  }

  protected onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    return this.inner.readInto(offset, target, options)
  }

  protected onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.inner.write(offset, source, options)
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    return this.inner.writeZeroes(offset, length, options)
  }

  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.inner.discard(offset, length, options)
  }

  protected onFlush(options?: CallOptions): Promise<void> {
    return this.inner.flush(options)
  }

  protected override onResize(size: number, options?: CallOptions): Promise<void> {
    return this.inner.resize(size, options)
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    yield* this.inner.map({ ...options, offset, length })
  }

  protected onClose(): Promise<void> {
    return this.inner.close()
  }
}
