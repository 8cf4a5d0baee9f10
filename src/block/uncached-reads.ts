/**
 * Large reads of a file that go past the page cache where it does not hold the bytes. The system reads far ahead of a
 * sequential reader, up to 8 MiB, and whoever reads elsewhere in the file meanwhile waits for all of that. Owns the
 * judgement whether the page cache holds a place.
 */
import type { BlockDevice, CallOptions } from './device.ts'
import { FileDevice, openFile } from './file.ts'
import { FilterDevice } from './filter.ts'
import { pad } from './pad.ts'
import { memoryPage } from './slab.ts'

/** Reads of fewer bytes go through the page cache: they are those somebody waits for. */
const bulk = 128 << 10
/** Bytes behind a place that was not in the page cache that are taken to be not in it either. */
const coldStretch = 16 << 20
/** Milliseconds within which a page counts as read from the page cache: that takes a tenth of it, a fast disk takes more. */
const cachedWithin = 0.04

/** Reads of at least 128 KiB past the page cache, once {@link start} is called, unless it holds them. */
export class UncachedReads extends FilterDevice {
  readonly #path: string
  readonly #identity: string
  readonly #cachedWithin: number
  readonly #probe = new Uint8Array(memoryPage)
  #coldFrom = 0
  #coldTo = 0
  #started = false
  #opening: Promise<BlockDevice | undefined> | undefined

  private constructor(file: FileDevice, path: string, within: number) {
    super(file)
    this.#path = path
    this.#identity = file.identity
    this.#cachedWithin = within
  }

  /**
   * Over a file that was opened read-only by its path, with a `syncLimit` of at least a page: a read that has to go
   * through the thread pool does not tell the page cache from a disk. Anything else is returned as it is. `within` in
   * milliseconds, for a page.
   */
  static over(device: BlockDevice, syncLimit: number, within: number = cachedWithin): BlockDevice {
    const suits = device instanceof FileDevice && device.path !== undefined && device.readOnly && syncLimit >= memoryPage
    return suits ? new UncachedReads(device, device.path, within) : device
  }

  /** From now on large reads are not expected to be wanted again. */
  start(): void {
    this.#started = true
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    if (!this.#started || target.length < bulk) return this.inner.readInto(offset, target, options)
    return this.inSteps(this.#readBulk(offset, target, options))
  }

  async #readBulk(offset: number, target: Uint8Array, options: CallOptions | undefined): Promise<void> {
    if (await this.#isCold(offset, target.length)) {
      const direct = await (this.#opening ??= this.#openDirect())
      if (direct !== undefined) return direct.readInto(offset, target, options)
    }
    return this.inner.readInto(offset, target, options)
  }

  protected override async onClose(): Promise<void> {
    await (await this.#opening)?.close()
    await super.onClose()
  }

  async #isCold(offset: number, length: number): Promise<boolean> {
    if (offset >= this.#coldFrom && offset < this.#coldTo) return true
    const cached = (await this.#isCached(offset)) && (await this.#isCached(offset + length - memoryPage))
    if (cached) return false
    this.#coldFrom = offset
    this.#coldTo = offset + coldStretch
    return true
  }

  async #isCached(offset: number): Promise<boolean> {
    const before = performance.now()
    await this.inner.readInto(offset, this.#probe)
    return performance.now() - before < this.#cachedWithin
  }

  /** Undefined where the file system has no direct I/O, or another file has the name by now. */
  async #openDirect(): Promise<BlockDevice | undefined> {
    const file = await openFile(this.#path, { readOnly: true, direct: true }).catch(() => undefined)
    if (file === undefined || file.identity === this.#identity) return file && pad(file)
    await file.close()
    return undefined
  }
}
