/** Reading as much of a damaged disk as can be read: what cannot is told and reads as zeroes. */
import { extent, type BlockDevice, type CallOptions, type Extent, type MapOptions } from '../../block/device.ts'
import { FilterDevice } from '../../block/filter.ts'
import { reasonOf } from './reasons.ts'

/** What is tried again one by one where a longer read fails. */
const sector = 512
/** How far behind a place the map of which cannot be read the next one is looked for; what lies between is read. */
const mapStep = 1 << 16

/** The device, read as far as possible. `warn` is told of each range that is lost, or, with `eachSector`, of each sector, as by qemu-img. */
export function salvaged(device: BlockDevice, warn: (message: string) => void, eachSector = false): BlockDevice {
  return new SalvagedDevice(device, warn, eachSector)
}

class SalvagedDevice extends FilterDevice {
  readonly #warn: (message: string) => void
  readonly #eachSector: boolean

  constructor(inner: BlockDevice, warn: (message: string) => void, eachSector: boolean) {
    super(inner)
    this.#warn = warn
    this.#eachSector = eachSector
  }

  protected override async onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    try {
      await this.inner.readInto(offset, target, options)
    } catch (error) {
      options?.signal?.throwIfAborted()
      if (target.length <= sector) this.#lose(offset, target, error)
      else await this.#readSectors(offset, target, options)
    }
  }

  async #readSectors(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    let lost = false
    for (let at = 0; at < target.length; at += sector) {
      const part = target.subarray(at, at + sector)
      try {
        await this.inner.readInto(offset + at, part, options)
        lost = false
      } catch (error) {
        options?.signal?.throwIfAborted()
        // a range is told once, by its first sector
        if (lost && !this.#eachSector) part.fill(0)
        else this.#lose(offset + at, part, error)
        lost = true
      }
    }
  }

  #lose(offset: number, target: Uint8Array, error: unknown): void {
    target.fill(0)
    this.#warn(`error while reading offset ${offset}: ${reasonOf(error)}`)
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    const end = offset + length
    for (let at = offset; at < end; ) {
      try {
        for await (const found of this.inner.map({ ...options, offset: at, length: end - at })) {
          at = found.start + found.length
          yield found
        }
      } catch (error) {
        options?.signal?.throwIfAborted()
        this.#warn(`error while reading block status at offset ${at}: ${reasonOf(error)}`)
        const next = Math.min(end, (Math.floor(at / mapStep) + 1) * mapStep)
        yield extent({ start: at, length: next - at, depth: 0, present: true, zero: false, data: true, compressed: false })
        at = next
      }
    }
  }
}
