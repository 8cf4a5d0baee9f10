/**
 * Any request to a device that demands alignment. The only place in the library where requests are
 * padded: the body goes through as it is, partial sectors at both ends are read, changed and written.
 */
import { RangeLock, type Release } from '../core/lock.ts'
import {
  type BlockDevice,
  type BlockLimits,
  type CallOptions,
  type WriteOptions,
  type WriteZeroesOptions,
} from './device.ts'
import { FilterDevice } from './filter.ts'
import { allocateAligned, isMemoryAligned } from './slab.ts'

/** A request cut at sector borders: `[offset, body)` head, `[body, tail)` whole sectors, `[tail, end)` tail. */
export interface Padding {
  /** End of the head; equal to the offset if it is aligned. */
  readonly body: number
  /** Start of the tail; equal to the end if that is aligned. `body === tail === end` within one sector. */
  readonly tail: number
}

/** Cuts `[offset, end)` at multiples of `alignment`. */
export function padding(offset: number, end: number, alignment: number): Padding {
  const body = Math.min(end, roundUp(offset, alignment))
  return { body, tail: Math.max(body, end - (end % alignment)) }
}

/**
 * Takes any request, whatever `device` demands. Writes of whole sectors from aligned memory pass as
 * they are; others go over a bounce buffer, partial sectors with a read before the write. A device
 * without demands is returned itself.
 */
export function pad(device: BlockDevice): BlockDevice {
  const { requestAlignment, memoryAlignment } = device.limits
  return requestAlignment <= 1 && memoryAlignment <= 1 ? device : new PaddedDevice(device)
}

const bounceSize = 256 << 10
const bouncesKept = 8

class PaddedDevice extends FilterDevice {
  readonly #limits: BlockLimits
  readonly #alignment: number
  readonly #memoryAlignment: number
  /** Writes take turns where their sectors overlap: a partial sector writes its neighbours' bytes too. */
  readonly #writing = new RangeLock()
  /**
   * Held shared by reads over a bounce buffer, alone while the size changes within a sector: a read of that sector is cut
   * to the size, and has to find the same size wherever it is looked at again on its way.
   */
  readonly #edge = new RangeLock()
  readonly #bounces: Uint8Array[] = []
  /** May end within a sector; the inner size is then longer, by zeroes, until the next flush. */
  #size: number

  constructor(inner: BlockDevice) {
    super(inner)
    const { requestAlignment, memoryAlignment } = inner.limits
    this.#alignment = requestAlignment
    this.#memoryAlignment = memoryAlignment
    this.#limits = { ...inner.limits, requestAlignment: 1, memoryAlignment: 1 }
    this.#size = inner.size
  }

  /** A device of fixed size has the size it has now: what stands below may have changed it. */
  override get size(): number {
    return this.inner.growable ? this.#size : this.inner.size
  }

  override get limits(): BlockLimits {
    return this.#limits
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const end = offset + target.length
    if (this.#passes(offset, end, target)) return this.inner.readInto(offset, target, options)
    return this.inSteps(this.#readPadded(offset, target, options))
  }

  protected override onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.inSteps(this.#write(offset, source, options))
  }

  async #write(offset: number, source: Uint8Array, options: WriteOptions | undefined): Promise<void> {
    const end = offset + source.length
    const release = this.#tryLock(offset, end) ?? (await this.#lock(offset, end))
    const leaveEdge = this.#crossesEdge(end) ? await this.#lockEdge(end) : undefined
    try {
      if (this.#passes(offset, end, source)) await this.inner.write(offset, source, options)
      else await this.#writePadded(offset, source, options)
      this.#size = Math.max(this.#size, end)
    } finally {
      leaveEdge?.()
      release()
    }
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    return this.inSteps(this.#writeZeroes(offset, length, options))
  }

  async #writeZeroes(offset: number, length: number, options: WriteZeroesOptions | undefined): Promise<void> {
    const end = offset + length
    const { body, tail } = padding(offset, end, this.#alignment)
    const release = await this.#lock(offset, end)
    const leaveEdge = this.#crossesEdge(end) ? await this.#lockEdge(end) : undefined
    try {
      if (offset < body) await this.#changeSector(offset, body, (bytes) => bytes.fill(0), options)
      if (body < tail) await this.inner.writeZeroes(body, tail - body, options)
      if (tail < end) await this.#changeSector(tail, end, (bytes) => bytes.fill(0), options)
      this.#size = Math.max(this.#size, end)
    } finally {
      leaveEdge?.()
      release()
    }
  }

  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.inSteps(this.#discard(offset, length, options))
  }

  async #discard(offset: number, length: number, options: CallOptions | undefined): Promise<void> {
    const release = await this.#lock(offset, offset + length)
    try {
      await this.inner.discard(offset, length, options)
    } finally {
      release()
    }
  }

  protected override async onFlush(options?: CallOptions): Promise<void> {
    await this.#cutPadding(options)
    await this.inner.flush(options)
  }

  protected override async onResize(size: number, options?: CallOptions): Promise<void> {
    const release = await this.#lock(Math.min(size, this.size), Number.MAX_SAFE_INTEGER)
    const leaveEdge = await this.#lockEdge(size)
    try {
      await this.inner.resize(size, options)
      this.#size = size
    } finally {
      leaveEdge()
      release()
    }
  }

  protected override async onClose(): Promise<void> {
    try {
      if (!this.readOnly) await this.#cutPadding()
    } finally {
      await this.inner.close()
    }
  }

  /** A tail written past the end made the inner device longer than what was written: cut it back. */
  async #cutPadding(options?: CallOptions): Promise<void> {
    if (this.inner.size <= this.size) return
    const release = await this.#lock(this.#size, Number.MAX_SAFE_INTEGER)
    const leaveEdge = await this.#lockEdge(this.#size)
    try {
      if (this.inner.size > this.#size) await this.inner.resize(this.#size, options)
    } finally {
      leaveEdge()
      release()
    }
  }

  /** A write up to `end` makes a device longer that ends within a sector. */
  #crossesEdge(end: number): boolean {
    return this.inner.size % this.#alignment !== 0 && roundUp(end, this.#alignment) > this.inner.size
  }

  /** Everything from the sector on in which the device ends now, or will. Writers hold their sectors already. */
  #lockEdge(size: number): Promise<Release> {
    const first = Math.min(size, this.inner.size)
    return this.#edge.acquire(first - (first % this.#alignment), Number.MAX_SAFE_INTEGER)
  }

  async #readPadded(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const end = offset + target.length
    for (let at = offset; at < end; ) {
      const start = at - (at % this.#alignment)
      const stop = Math.min(roundUp(end, this.#alignment), start + bounceSize)
      const body = this.#straightPart(at, end, target, offset)
      if (body > 0) {
        await this.inner.readInto(at, target.subarray(at - offset, at - offset + body), options)
        at += body
        continue
      }
      const bounce = this.#takeBounce()
      const leaveEdge = this.#edge.tryAcquire(start, stop, 'shared') ?? (await this.#edge.acquire(start, stop, 'shared'))
      try {
        const length = Math.min(stop, this.inner.size) - start
        await this.inner.readInto(start, bounce.subarray(0, length), options)
        const next = Math.min(end, stop)
        target.set(bounce.subarray(at - start, next - start), at - offset)
        at = next
      } finally {
        leaveEdge()
        this.#bounces.push(bounce)
      }
    }
  }

  async #writePadded(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    const end = offset + source.length
    const { body, tail } = padding(offset, end, this.#alignment)
    const part = (from: number, to: number): Uint8Array => source.subarray(from - offset, to - offset)
    if (offset < body) await this.#changeSector(offset, body, (bytes) => bytes.set(part(offset, body)), options)
    for (let at = body; at < tail; ) {
      const straight = this.#straightPart(at, tail, source, offset)
      const length = straight > 0 ? straight : Math.min(tail - at, bounceSize)
      const bytes = part(at, at + length)
      await (straight > 0 ? this.inner.write(at, bytes, options) : this.#writeBounced(at, bytes, options))
      at += length
    }
    if (tail < end) await this.#changeSector(tail, end, (bytes) => bytes.set(part(tail, end)), options)
  }

  /** Bytes from `at` that can go straight between the caller's memory and the device; 0 if none. */
  #straightPart(at: number, end: number, memory: Uint8Array, offset: number): number {
    if (at % this.#alignment !== 0) return 0
    const length = end - (end % this.#alignment) - at
    return length > 0 && isMemoryAligned(memory.subarray(at - offset), this.#memoryAlignment) ? length : 0
  }

  async #writeBounced(offset: number, bytes: Uint8Array, options?: WriteOptions): Promise<void> {
    const bounce = this.#takeBounce()
    try {
      bounce.set(bytes)
      await this.inner.write(offset, bounce.subarray(0, bytes.length), options)
    } finally {
      this.#bounces.push(bounce)
    }
  }

  /** Reads the sector that holds `[from, to)`, changes these bytes, and writes it back. */
  async #changeSector(from: number, to: number, change: (bytes: Uint8Array) => void, options?: WriteOptions): Promise<void> {
    const start = from - (from % this.#alignment)
    const bounce = this.#takeBounce()
    try {
      const sector = bounce.subarray(0, this.#alignment)
      const present = Math.max(0, Math.min(this.#alignment, this.inner.size - start))
      sector.fill(0, present)
      if (present > 0) await this.inner.readInto(start, sector.subarray(0, present), options)
      change(sector.subarray(from - start, to - start))
      await this.inner.write(start, sector, options)
    } finally {
      this.#bounces.push(bounce)
    }
  }

  #passes(offset: number, end: number, memory: Uint8Array): boolean {
    const aligned = offset % this.#alignment === 0 && end % this.#alignment === 0
    return aligned && isMemoryAligned(memory, this.#memoryAlignment)
  }

  /** The sectors of `[offset, end)` without waiting, or undefined if another write has one of them. */
  #tryLock(offset: number, end: number): Release | undefined {
    return this.#writing.tryAcquire(offset - (offset % this.#alignment), roundUp(end, this.#alignment))
  }

  #lock(offset: number, end: number): Promise<Release> {
    return this.#writing.acquire(offset - (offset % this.#alignment), roundUp(end, this.#alignment))
  }

  #takeBounce(): Uint8Array {
    if (this.#bounces.length > bouncesKept) this.#bounces.length = bouncesKept
    return this.#bounces.pop() ?? allocateAligned(bounceSize)
  }
}

function roundUp(value: number, alignment: number): number {
  return Math.ceil(value / alignment) * alignment
}
