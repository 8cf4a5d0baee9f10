/**
 * The requests that QEMU 7.2 and 10.0 issue for a VM state, replayed on a file. Owns the order and shape
 * of requests, as recorded from both versions with strace; knows nothing of who measures them.
 *
 * Written with `cache=none`, one after another, nothing queued, for each write of 131,328 bytes at an
 * odd offset into clusters that the image has just allocated:
 *
 * ```
 *   read   the sector in which it begins     512 B
 *   write  the data, rounded out             131,584 or 132,096 B
 *   read   the sector in which it ends       512 B
 *   write  zeroes to the end of the cluster  0 to 65,536 B
 * ```
 *
 * All calls are synchronous: cheaper for each request than QEMU's hand-over to a thread, so the replay is
 * a little faster than the original.
 */
import * as fs from 'node:fs'
import { allocateAligned } from '../src/block.ts'

const sector = 512
const cluster = 65_536

const down = (value: number, unit: number): number => value - (value % unit)
const up = (value: number, unit: number): number => Math.ceil(value / unit) * unit

export interface ReplayShape {
  /** Past the page cache: whole sectors only. */
  readonly direct: boolean
  /** The clusters are new to the image: what the data leaves of them is zeroed. */
  readonly freshClusters: boolean
}

/** Writes pieces of a stream to a file in QEMU's requests. The file then holds the stream. */
export class QemuWriteReplay {
  readonly #fd: number
  readonly #shape: ReplayShape
  readonly #bounce: Uint8Array = allocateAligned(1 << 18)
  readonly #edge: Uint8Array = allocateAligned(cluster)
  #at = 0

  constructor(fd: number, shape: ReplayShape) {
    this.#fd = fd
    this.#shape = shape
  }

  /** One write as QEMU hands it to its block layer; at most 256 KiB less two sectors. */
  write(piece: Uint8Array): void {
    if (this.#shape.direct) this.#writeSectors(piece)
    else fs.writeSync(this.#fd, piece, 0, piece.length, this.#at)
    this.#at += piece.length
    if (this.#shape.freshClusters) this.#zeroRestOfCluster()
  }

  #writeSectors(piece: Uint8Array): void {
    const start = down(this.#at, sector)
    const end = this.#at + piece.length
    const length = up(end, sector) - start
    const body = this.#bounce.subarray(0, length)
    if (this.#at > start) this.#readSector(body.subarray(0, sector), start)
    // clusters new to the image read as zeroes: no need to ask the disk
    if (this.#shape.freshClusters) body.fill(0, end - start)
    else if (end % sector !== 0) this.#readSector(body.subarray(length - sector), start + length - sector)
    body.set(piece, this.#at - start)
    fs.writeSync(this.#fd, body, 0, length, start)
  }

  #zeroRestOfCluster(): void {
    const end = up(this.#at, cluster)
    if (end === this.#at) return
    const start = this.#shape.direct ? down(this.#at, sector) : this.#at
    const rest = this.#edge.subarray(0, end - start)
    rest.fill(0)
    if (this.#shape.direct && this.#at > start) {
      this.#readSector(rest.subarray(0, sector), start)
      rest.fill(0, this.#at - start, sector)
    }
    fs.writeSync(this.#fd, rest, 0, rest.length, start)
  }

  #readSector(into: Uint8Array, offset: number): void {
    const read = fs.readSync(this.#fd, into, 0, sector, offset)
    into.fill(0, read)
  }
}

/** QEMU's reads of a VM state: 28,728 bytes (7 page records), with `cache=none` rounded out to sectors. */
export const qemuReadLength = 7 * 4104

/** The stream in QEMU's reads, each piece valid until the next. */
export function* qemuReadReplay(fd: number, length: number, direct: boolean): Generator<Uint8Array> {
  const buffer = allocateAligned(up(qemuReadLength, sector) + sector)
  for (let at = 0; at < length; at += qemuReadLength) {
    const wanted = Math.min(qemuReadLength, length - at)
    const start = direct ? down(at, sector) : at
    const end = direct ? up(at + wanted, sector) : at + wanted
    const read = fs.readSync(fd, buffer, 0, end - start, start)
    if (read < at + wanted - start) throw new Error(`short read at ${start}: ${read} bytes`)
    yield buffer.subarray(at - start, at - start + wanted)
  }
}
