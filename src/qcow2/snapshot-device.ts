/** An internal snapshot as read-only devices: the disk as it was, and the VM state behind it. */
import type { BlockDevice, CallOptions, Extent, MapOptions } from '../block/device.ts'
import { ReadOnlyDevice } from '../block/read-only.ts'
import type { Engine, Layer } from './engine.ts'
import { mapLayer } from './map.ts'
import { readLayer } from './read.ts'

/** A window of a layer. */
class LayerDevice extends ReadOnlyDevice {
  readonly size: number
  readonly #engine: Engine
  readonly #layer: Layer
  readonly #base: number

  constructor(engine: Engine, layer: Layer, base: number, size: number) {
    super()
    this.#engine = engine
    this.#layer = layer
    this.#base = base
    this.size = size
  }

  override get below(): readonly BlockDevice[] {
    return this.#engine.below
  }

  protected onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const engine = this.#engine
    const read = (): Promise<void> => readLayer(engine, this.#layer, this.#base + offset, target, options?.signal)
    return engine.readOnly ? read() : engine.requests.run(read)
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    for await (const extent of mapLayer(this.#engine, { layer: () => this.#layer, size: () => Infinity }, this.#base + offset, length, options)) {
      yield { ...extent, start: extent.start - this.#base }
      this.assertOpen() // once it is closed the snapshot may be deleted
    }
  }
}

/**
 * The disk of an internal snapshot, read-only, as large as it was then. Unallocated clusters are those
 * of the image's backing file. As long as it is open the snapshot cannot be deleted.
 */
export class SnapshotDevice extends LayerDevice {
  /** The VM state: exactly the bytes of the migration stream; of size 0 without one. */
  readonly vmState: BlockDevice
  readonly #onClose: () => void

  /** @internal Made by `Snapshots.open`. */
  constructor(engine: Engine, layer: Layer, sizes: { disk: number; vmState: number; vmStateBase: number }, onClose: () => void) {
    super(engine, layer, 0, sizes.disk)
    const stateLayer = { l1: layer.l1, backing: undefined }
    this.vmState = new LayerDevice(engine, stateLayer, sizes.vmStateBase, sizes.vmState)
    this.#onClose = onClose
  }

  /** The snapshot may be deleted from now on. */
  protected override async onClose(): Promise<void> {
    this.#onClose()
    await this.vmState.close()
  }
}
