/** A saved VM whose pages come as fast as a test lets them. */
import { FilterDevice } from '../../src/block/filter.ts'
import type { BlockDevice, CallOptions } from '../../src/block/device.ts'
import type { PageSource } from '../../src/snapshot/page-source.ts'

/** Reads beyond `bytes` wait until `release` is called. */
export class SlowSource {
  readonly source: PageSource
  #left: number
  #waiting: (() => void)[] = []

  constructor(source: PageSource, bytes: number) {
    this.#left = bytes
    const blocks = source.blocks.map((block) => ({ ...block, content: new SlowDevice(block.content, (length) => this.#admit(length)) }))
    const { machine, pageSize, head, ramSectionId, footers, earlyDevices, devices, vmDescription } = source
    const close = (): Promise<void> => source.close()
    this.source = { machine, pageSize, head, ramSectionId, footers, earlyDevices, devices, vmDescription, blocks, close, [Symbol.asyncDispose]: close }
  }

  release(): void {
    this.#left = Infinity
    for (const wake of this.#waiting.splice(0)) wake()
  }

  async #admit(length: number): Promise<void> {
    this.#left -= length
    if (this.#left < 0) await new Promise<void>((wake) => this.#waiting.push(wake))
  }
}

class SlowDevice extends FilterDevice {
  readonly #admit: (length: number) => Promise<void>

  constructor(inner: BlockDevice, admit: (length: number) => Promise<void>) {
    super(inner)
    this.#admit = admit
  }

  protected override async onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    await this.#admit(target.length)
    await super.onRead(offset, target, options)
  }
}
