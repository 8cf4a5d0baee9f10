/**
 * A table of 8-byte entries that is held in memory whole: an L1 table or the refcount table. Owns
 * which parts changed since they were last written; the meaning of the entries is its user's.
 */
import { viewOf } from '../bytes/view.ts'
import { entryOffset, offsetHigh, offsetLow } from './l2-entry.ts'
import type { HostFile, Piece } from './host-file.ts'

/** Changes are written in pieces of this many bytes. */
const sectorSize = 512

export class PointerTable {
  /** Host offset in bytes. */
  readonly offset: number
  /** Number of entries. */
  readonly length: number
  /** The entries, padded with zeroes to whole sectors. */
  readonly bytes: Uint8Array
  readonly #view: DataView
  /** The entries in the order of the machine, where only zero or not matters. */
  #words: Uint32Array | undefined
  readonly #dirty = new Set<number>()

  constructor(offset: number, length: number, bytes: Uint8Array = tableBytes(length)) {
    this.offset = offset
    this.length = length
    this.bytes = bytes
    this.#view = viewOf(bytes)
  }

  /** Reads a table of `length` entries; check the length against the limits before. */
  static async read(host: HostFile, offset: number, length: number, signal?: AbortSignal): Promise<PointerTable> {
    const bytes = tableBytes(length)
    await host.readInto(offset, bytes.subarray(0, length * 8), signal)
    return new PointerTable(offset, length, bytes)
  }

  get hasDirty(): boolean {
    return this.#dirty.size > 0
  }

  /** High half of an entry; 0 beyond the table. */
  high(index: number): number {
    return index < this.length ? this.#view.getUint32(index * 8) : 0
  }

  /** Low half of an entry; 0 beyond the table. */
  low(index: number): number {
    return index < this.length ? this.#view.getUint32(index * 8 + 4) : 0
  }

  /** The cluster offset in an L1 entry, 0 for none. Reserved bits are masked. */
  offsetAt(index: number): number {
    return entryOffset(this.high(index), this.low(index))
  }

  /** The first entry from `from` on that is not zero, or `length`. Tables are long and mostly empty. */
  nextUsed(from: number): number {
    const words = (this.#words ??= new Uint32Array(this.bytes.buffer, this.bytes.byteOffset, this.bytes.length / 4))
    for (let index = from; index < this.length; index++) if ((words[2 * index]! | words[2 * index + 1]!) !== 0) return index
    return this.length
  }

  /** Stores an offset with flags for the high half; written back later. */
  set(index: number, offset: number, flags = 0): void {
    this.#view.setUint32(index * 8, offsetHigh(offset) + flags)
    this.#view.setUint32(index * 8 + 4, offsetLow(offset))
    this.#dirty.add(Math.floor((index * 8) / sectorSize))
  }

  /** The first `entries` entries without COPIED flags, as the table of another owner holds them. */
  sharedCopy(entries: number): Uint8Array {
    const bytes = tableBytes(entries)
    bytes.set(this.bytes.subarray(0, Math.min(entries, this.length) * 8))
    for (let at = 0; at < entries * 8; at += 8) bytes[at]! &= 0x7f
    return bytes
  }

  /** The changed parts as they are at this moment. They count as written unless given to `failed`. */
  takeDirty(): Piece[] {
    const pieces = [...this.#dirty].map((sector) => ({
      offset: this.offset + sector * sectorSize,
      bytes: this.bytes.slice(sector * sectorSize, (sector + 1) * sectorSize),
    }))
    this.#dirty.clear()
    return pieces
  }

  /** Parts that were taken but not written are dirty again. */
  failed(pieces: readonly Piece[]): void {
    for (const { offset } of pieces) this.#dirty.add((offset - this.offset) / sectorSize)
  }
}

/** Zeroed bytes for `length` entries, rounded up to whole sectors. */
export function tableBytes(length: number): Uint8Array {
  return new Uint8Array(Math.ceil((length * 8) / sectorSize) * sectorSize)
}
