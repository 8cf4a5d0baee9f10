// A device of one's own: anything that reads and writes bytes can hold an image.
import { Qcow2Image } from 'qcow2'
import { anyRequest, BaseDevice, type BlockLimits } from 'qcow2/block'

/** Keeps every 64 KiB in a map: a place for bytes that no file has. */
class SparseDevice extends BaseDevice {
  readonly readOnly = false
  readonly limits: BlockLimits = anyRequest
  readonly pieces = new Map<number, Uint8Array>()
  #size = 0

  get size(): number {
    return this.#size
  }

  override get growable(): boolean {
    return true
  }

  protected onRead(offset: number, target: Uint8Array): Promise<void> {
    for (let n = 0; n < target.length; n++) {
      const at = offset + n
      target[n] = this.pieces.get(Math.floor(at / 65_536))?.[at % 65_536] ?? 0
    }
    return Promise.resolve()
  }

  protected onWrite(offset: number, source: Uint8Array): Promise<void> {
    for (let n = 0; n < source.length; n++) {
      const at = offset + n
      const key = Math.floor(at / 65_536)
      if (!this.pieces.has(key)) this.pieces.set(key, new Uint8Array(65_536))
      this.pieces.get(key)![at % 65_536] = source[n]!
    }
    this.#size = Math.max(this.#size, offset + source.length)
    return Promise.resolve()
  }

  protected override onResize(size: number): Promise<void> {
    this.#size = size
    return Promise.resolve()
  }

  protected onFlush(): Promise<void> {
    return Promise.resolve()
  }

  protected onClose(): Promise<void> {
    return Promise.resolve()
  }
}

const device = new SparseDevice()
await using image = await Qcow2Image.create(device, { size: 2 ** 40 })
await image.write(2 ** 39, new TextEncoder().encode('far away'))
await image.flush()
console.log(new TextDecoder().decode(await image.read(2 ** 39, 8)), `in ${device.pieces.size} pieces`)
