/** A device in memory. Owns its bytes; the fastest device there is, and the model in tests. */
import { anyRequest, BaseDevice, type BlockLimits, type WriteOptions } from './device.ts'

/** Options of {@link MemoryDevice}. */
export interface MemoryOptions {
  /** Writes past the end extend the device, as they do a file; default false, as a disk. */
  readonly growable?: boolean | undefined
  /** Refuse changes. Default false. */
  readonly readOnly?: boolean | undefined
  /** Demands to pose on callers, for trying how they cope; default none. */
  readonly limits?: Partial<BlockLimits> | undefined
}

/** Bytes in memory as a `BlockDevice`. Discarded ranges read as zeroes. */
export class MemoryDevice extends BaseDevice {
  readonly readOnly: boolean
  readonly limits: BlockLimits
  readonly #growable: boolean
  #bytes: Uint8Array
  #size: number

  /**
   * @param content the size in bytes, or the bytes themselves: these are used in place, until the
   *   device grows past them
   * @throws RangeError if the size cannot be had
   */
  constructor(content: number | Uint8Array, options: MemoryOptions = {}) {
    super()
    this.#bytes = typeof content === 'number' ? new Uint8Array(content) : content
    this.#size = this.#bytes.length
    this.readOnly = options.readOnly ?? false
    this.#growable = options.growable ?? false
    this.limits = { ...anyRequest, ...options.limits }
  }

  get size(): number {
    return this.#size
  }

  override get growable(): boolean {
    return this.#growable
  }

  /** The content, in place: it changes with the device, and a device that grows moves to new bytes. */
  get bytes(): Uint8Array {
    return this.#bytes.subarray(0, this.#size)
  }

  protected onRead(offset: number, target: Uint8Array): Promise<void> {
    target.set(this.#bytes.subarray(offset, offset + target.length))
    return done
  }

  protected async onWrite(offset: number, source: Uint8Array, _options?: WriteOptions): Promise<void> {
    this.#reach(offset + source.length)
    this.#bytes.set(source, offset)
    return done
  }

  protected override async onWriteZeroes(offset: number, length: number): Promise<void> {
    this.#reach(offset + length)
    this.#bytes.fill(0, offset, offset + length)
    return done
  }

  protected override onDiscard(offset: number, length: number): Promise<void> {
    this.#bytes.fill(0, offset, Math.min(offset + length, this.#size))
    return done
  }

  protected onFlush(): Promise<void> {
    return done
  }

  protected override async onResize(size: number): Promise<void> {
    if (size < this.#size) this.#bytes.fill(0, size, this.#size)
    this.#reserve(size)
    this.#size = size
    return done
  }

  protected onClose(): Promise<void> {
    return done
  }

  #reach(end: number): void {
    this.#reserve(end)
    this.#size = Math.max(this.#size, end)
  }

  /** Doubles the bytes, so that many small extensions copy each byte only about once. */
  #reserve(size: number): void {
    if (size <= this.#bytes.length) return
    const grown = new Uint8Array(Math.max(size, Math.min(this.#bytes.length * 2, size + (64 << 20))))
    grown.set(this.bytes)
    this.#bytes = grown
  }
}

const done: Promise<void> = Promise.resolve()
