/** A saved VM whose pages come as fast as a test lets them. */
import { FilterDevice } from '../../src/block/filter.ts'
import type { BlockDevice, CallOptions, Extent, MapOptions } from '../../src/block/device.ts'
import type { PageSource } from '../../src/snapshot/page-source.ts'

/** Reads beyond `bytes` wait until `release` is called. */
export class SlowSource {
  readonly source: PageSource
  #left: number
  #waiting: (() => void)[] = []

  constructor(source: PageSource, bytes: number) {
    this.#left = bytes
    this.source = withContents(source, (content) => new SlowDevice(content, (length) => this.#admit(length)))
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

/** The source, its background fill held back until the guest has waited for `reads` reads: the fill has to look at the map first. */
export function faultsFirst(source: PageSource, reads: number): PageSource {
  let left = reads
  let begin!: () => void
  const begun = new Promise<void>((resolve) => (begin = resolve))
  const onRead = (): void => {
    if (--left === 0) begin()
  }
  return withContents(source, (content) => new LateMapDevice(content, begun, onRead))
}

/** The same VM, the contents of its blocks wrapped. */
function withContents(source: PageSource, wrap: (content: BlockDevice) => BlockDevice): PageSource {
  const blocks = source.blocks.map((block) => ({ ...block, content: wrap(block.content) }))
  const { machine, pageSize, head, ramSectionId, footers, earlyDevices, devices, vmDescription } = source
  const close = (): Promise<void> => source.close()
  return { machine, pageSize, head, ramSectionId, footers, earlyDevices, devices, vmDescription, blocks, close, [Symbol.asyncDispose]: close }
}

class LateMapDevice extends FilterDevice {
  readonly #begun: Promise<void>
  readonly #readBegins: () => void

  constructor(inner: BlockDevice, begun: Promise<void>, onRead: () => void) {
    super(inner)
    this.#begun = begun
    this.#readBegins = onRead
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    this.#readBegins()
    return super.onRead(offset, target, options)
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    await this.#begun
    yield* super.onMap(offset, length, options)
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
