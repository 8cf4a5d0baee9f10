/** Several disks one behind the other, as `convert` with several sources reads them. */
import type { BlockDevice, CallOptions, Extent, MapOptions } from '../../block/device.ts'
import { ReadOnlyDevice } from '../../block/read-only.ts'

/** The devices as one, read-only; they stay the caller's. A single device is itself. */
export function concatenated(devices: readonly BlockDevice[]): BlockDevice {
  return devices.length === 1 ? devices[0]! : new Concatenated(devices)
}

class Concatenated extends ReadOnlyDevice {
  readonly size: number
  readonly #parts: readonly { readonly start: number; readonly device: BlockDevice }[]

  constructor(devices: readonly BlockDevice[]) {
    super()
    let start = 0
    this.#parts = devices.map((device) => {
      const part = { start, device }
      start += device.size
      return part
    })
    this.size = start
  }

  protected async onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    for (const { device, at, length, from } of this.#cut(offset, target.length)) {
      await device.readInto(at, target.subarray(from, from + length), options)
    }
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    for (const { device, at, length: bytes, from } of this.#cut(offset, length)) {
      for await (const extent of device.map({ ...options, offset: at, length: bytes })) {
        yield { ...extent, start: extent.start - at + from + offset }
      }
    }
  }

  /** The parts of a range: where each is in its device, and how far into the range. */
  *#cut(offset: number, length: number): Generator<{ device: BlockDevice; at: number; length: number; from: number }, void, undefined> {
    for (const { start, device } of this.#parts) {
      const first = Math.max(offset, start)
      const end = Math.min(offset + length, start + device.size)
      if (end > first) yield { device, at: first - start, length: end - first, from: first - offset }
    }
  }
}
