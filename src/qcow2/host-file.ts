/**
 * The file that holds an image, as the engine sees it: bytes past its end read as zeroes, and a
 * write there makes it longer. Owns the device; knows nothing of what the bytes mean.
 */
import type { BlockDevice } from '../block/device.ts'
import { FormatError, IoError, Qcow2Error, type FormatLocation } from '../core/errors.ts'
import { InFlight } from '../core/in-flight.ts'

/** A write that is part of a batch. */
export interface Piece {
  /** Host offset in bytes. */
  readonly offset: number
  readonly bytes: Uint8Array
}

/** Requests of one batch in flight at a time. */
const batchDepth = 16

export class HostFile {
  readonly device: BlockDevice
  /** Takes memory the device can transfer from and to directly. */
  readonly allocate: (length: number) => Uint8Array
  /**
   * Asked before every change of the file: an error refuses it. All changes of an open image pass here, so a rule about
   * them is kept by whoever writes.
   */
  guard: ((offset: number, length: number) => Error | undefined) | undefined
  #growing: Promise<void> = Promise.resolve()
  /** The errors that tell of damage in this very file. */
  readonly #damage = new WeakSet()

  constructor(device: BlockDevice, allocate: (length: number) => Uint8Array = plainMemory) {
    this.device = device
    this.allocate = allocate
  }

  get size(): number {
    return this.device.size
  }

  /** Fills `target`; what lies past the end of the file is zeroes. */
  readInto(offset: number, target: Uint8Array, signal?: AbortSignal): Promise<void> {
    const options = signal === undefined ? undefined : { signal }
    const present = this.device.size - offset
    if (present >= target.length) return this.device.readInto(offset, target, options)
    if (present <= 0) {
      target.fill(0)
      return done
    }
    target.fill(0, present)
    return this.device.readInto(offset, target.subarray(0, present), options)
  }

  /** An error to throw: metadata in this file contradict the format. */
  damaged(detail: string, location: FormatLocation): FormatError {
    const error = new FormatError(detail, location, 'ERR_CORRUPT')
    this.#damage.add(error)
    return error
  }

  /** True for an error that {@link damaged} made: not for one about the backing file, or a data file that is an image itself. */
  isDamagedBy(error: unknown): boolean {
    return typeof error === 'object' && error !== null && this.#damage.has(error)
  }

  /** Throws if the range may not be changed. */
  assertWritable(offset: number, length: number): void {
    const refusal = this.guard?.(offset, length)
    if (refusal !== undefined) throw refusal
  }

  /** Stores `source`; the file grows if it must. */
  write(offset: number, source: Uint8Array): Promise<void> {
    const { device } = this
    const refusal = this.guard?.(offset, source.length)
    if (refusal !== undefined) return Promise.reject(refusal)
    if (device.growable || offset + source.length <= device.size) return device.write(offset, source)
    return this.ensureSize(offset + source.length).then(() => device.write(offset, source))
  }

  /** Makes the range read as zeroes. What lies past the end of the file does already. */
  writeZeroes(offset: number, length: number): Promise<void> {
    const refusal = this.guard?.(offset, length)
    if (refusal !== undefined) return Promise.reject(refusal)
    const present = Math.min(length, this.device.size - offset)
    return present > 0 ? this.device.writeZeroes(offset, present) : done
  }

  flush(): Promise<void> {
    return this.device.flush()
  }

  /** Makes the file at least `size` bytes long. */
  ensureSize(size: number): Promise<void> {
    const grow = async (): Promise<void> => {
      if (this.device.size >= size) return
      this.assertWritable(this.device.size, size - this.device.size)
      try {
        await this.device.resize(size)
      } catch (error) {
        // a block device that was extended meanwhile knows it now, though it has another size than was asked for
        if (this.device.size >= size) return
        // what has a fixed size is full, and scripts look for these words
        if (!Qcow2Error.is(error, 'ERR_UNSUPPORTED')) throw error
        const cause = new Error(`${error.message}: No space left on device`, { cause: error })
        throw new IoError('resize', cause, { code: 'ERR_NO_SPACE', offset: this.device.size, length: size - this.device.size })
      }
    }
    this.#growing = this.#growing.then(grow, grow)
    return this.#growing
  }

  /** Cuts the file to `size` bytes if it is longer. */
  async truncate(size: number): Promise<void> {
    if (this.device.size <= size) return
    this.assertWritable(size, this.device.size - size)
    await this.device.resize(size)
  }

  /** Writes all pieces, several at a time, neighbours together. Resolves when all are written. */
  async writeAll(pieces: readonly Piece[]): Promise<void> {
    const queue = merge(pieces)
    const writing = new InFlight()
    for (const { offset, bytes } of queue) {
      writing.add(this.write(offset, bytes))
      if (writing.count >= batchDepth) await writing.settle(batchDepth - 1)
    }
    await writing.settle()
  }
}

const done: Promise<void> = Promise.resolve()
const mergeLimit = 1 << 20

const plainMemory = (length: number): Uint8Array => new Uint8Array(length)

/** Sorts pieces and joins small neighbours into one. */
function merge(pieces: readonly Piece[]): Piece[] {
  const sorted = [...pieces].sort((a, b) => a.offset - b.offset)
  const merged: Piece[] = []
  for (let first = 0; first < sorted.length; ) {
    let end = sorted[first]!.offset + sorted[first]!.bytes.length
    let last = first + 1
    while (last < sorted.length && sorted[last]!.offset === end && end - sorted[first]!.offset < mergeLimit) {
      end += sorted[last++]!.bytes.length
    }
    merged.push(last === first + 1 ? sorted[first]! : join(sorted.slice(first, last), end))
    first = last
  }
  return merged
}

function join(pieces: readonly Piece[], end: number): Piece {
  const offset = pieces[0]!.offset
  const bytes = new Uint8Array(end - offset)
  for (const piece of pieces) bytes.set(piece.bytes, piece.offset - offset)
  return { offset, bytes }
}
