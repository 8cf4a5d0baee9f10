/** Two devices one after another, as one that can only be read. */
import type { BlockDevice, CallOptions } from './device.ts'
import { ReadOnlyDevice } from './read-only.ts'

/** The bytes of `first`, then those of `second`. Neither is owned: both stay open. */
export function join(first: BlockDevice, second: BlockDevice): BlockDevice {
  return new JoinedDevice(first, second)
}

class JoinedDevice extends ReadOnlyDevice {
  readonly #first: BlockDevice
  readonly #second: BlockDevice

  constructor(first: BlockDevice, second: BlockDevice) {
    super()
    this.#first = first
    this.#second = second
  }

  override get below(): readonly BlockDevice[] {
    return [this.#first, this.#second]
  }

  get size(): number {
    return this.#first.size + this.#second.size
  }

  protected onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    return this.inSteps(this.#read(offset, target, options))
  }

  async #read(offset: number, target: Uint8Array, options: CallOptions | undefined): Promise<void> {
    const border = this.#first.size
    const before = Math.max(0, Math.min(target.length, border - offset))
    if (before > 0) await this.#first.readInto(offset, target.subarray(0, before), options)
    if (before < target.length) await this.#second.readInto(offset + before - border, target.subarray(before), options)
  }
}
