/**
 * Turns the large aligned writes of a VM state into the requests QEMU would have made of the same
 * stream, so that old and new can be compared on the very same image. Bytes and places stay the same.
 */
import type { BlockDevice, CallOptions } from '../src/block.ts'
import { FilterDevice } from '../src/block/filter.ts'
import { allocateAligned } from '../src/block.ts'

const cluster = 65_536
const down = (value: number, unit: number): number => value - (value % unit)
const up = (value: number, unit: number): number => Math.ceil(value / unit) * unit

/**
 * A device that rewrites large sequential writes as pieces of `lengths`, one after another: the sector of
 * the beginning is read, the piece is written, the sector of the end is read, the rest of the cluster is
 * zeroed. Everything else passes. Flush it before reading.
 */
export class OldWay extends FilterDevice {
  /** What the disk can write at least: partial ones are read first. */
  readonly #sector: number
  readonly #lengths: readonly number[]
  readonly #collected: Uint8Array
  readonly #bounce: Uint8Array = allocateAligned(1 << 18)
  /** Place in the device of the first collected byte; undefined before the first large write. */
  #at: number | undefined
  #filled = 0
  #piece = 0
  #turn: Promise<void> = Promise.resolve()

  constructor(inner: BlockDevice, lengths: readonly number[]) {
    super(inner)
    this.#sector = Math.max(512, inner.limits.requestAlignment)
    this.#lengths = lengths
    this.#collected = new Uint8Array(Math.max(...lengths) + (2 << 20))
  }

  protected override onWrite(offset: number, source: Uint8Array): Promise<void> {
    const next = this.#at === undefined ? offset : this.#at + this.#filled
    if (source.length < 2 * cluster || offset !== next) return this.#last(offset, source)
    return this.#inTurn(() => this.#collect(offset, source))
  }

  protected override onFlush(options?: CallOptions): Promise<void> {
    return this.#inTurn(async () => {
      if (this.#at !== undefined) await this.#writePiece(this.#filled)
      await this.inner.flush(options)
    })
  }

  /** A write that is not part of the run of large ones, or its end. */
  #last(offset: number, source: Uint8Array): Promise<void> {
    return this.#inTurn(async () => {
      if (this.#at !== undefined && offset === this.#at + this.#filled) await this.#collect(offset, source)
      else await this.inner.write(offset, source)
    })
  }

  #inTurn(task: () => Promise<void>): Promise<void> {
    return (this.#turn = this.#turn.then(task))
  }

  async #collect(offset: number, source: Uint8Array): Promise<void> {
    this.#at ??= offset
    this.#collected.set(source, this.#filled)
    this.#filled += source.length
    for (let length = this.#lengths[this.#piece]; length !== undefined && length <= this.#filled; length = this.#lengths[this.#piece]) {
      await this.#writePiece(length)
      this.#piece++
    }
  }

  async #writePiece(length: number): Promise<void> {
    const at = this.#at!
    const sector = this.#sector
    const start = down(at, sector)
    const end = at + length
    const body = this.#bounce.subarray(0, up(end, sector) - start).fill(0)
    if (at > start) await this.inner.readInto(start, body.subarray(0, sector))
    body.set(this.#collected.subarray(0, length), at - start)
    await this.inner.write(start, body)
    await this.#zeroRestOfCluster(end)
    this.#collected.copyWithin(0, length, this.#filled)
    this.#filled -= length
    this.#at = end
  }

  async #zeroRestOfCluster(end: number): Promise<void> {
    if (end % cluster === 0) return
    const sector = this.#sector
    const start = down(end, sector)
    const rest = this.#bounce.subarray(0, up(end, cluster) - start).fill(0)
    if (end > start) await this.inner.readInto(start, rest.subarray(0, sector))
    await this.inner.write(start, rest)
  }
}
