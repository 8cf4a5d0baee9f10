/**
 * Which pages of a RAM block a postcopy source has sent. Owns the rule that makes postcopy safe: after
 * LISTEN a page goes out exactly once, in whole host pages, and the guest never misses one that is not
 * zero.
 */
import type { RamPart } from '../migration/ram-part.ts'
import { isZero } from '../bytes/zero.ts'
import type { SavedRamBlock } from './page-source.ts'

/** The state of one page, a byte each. */
const pageState = {
  /** Not looked at. */
  pending: 0,
  /** Sent, or promised to be sent. */
  sent: 1,
  /** Found to be zero and not sent: the destination has zeroes there. */
  zero: 2,
} as const

/** A range of a block that is about to be sent. */
export interface Claim {
  /** Byte offset in the block. */
  readonly offset: number
  readonly length: number
  /** Pages of the range to send, as indexes within it, in the order to send them. */
  readonly pages: readonly number[]
}

/** Sent pages of one RAM block. */
export class BlockProgress {
  readonly block: SavedRamBlock
  /** Bytes read and sent together around a fault: a cluster, or a host page where that is larger. */
  readonly clusterSize: number
  readonly #pageSize: number
  readonly #hostPageSize: number
  readonly #states: Uint8Array

  constructor(block: SavedRamBlock, pageSize: number, hostPageSize: number, clusterSize: number) {
    this.block = block
    this.#pageSize = pageSize
    this.#hostPageSize = hostPageSize
    this.clusterSize = Math.max(clusterSize, hostPageSize)
    this.#states = new Uint8Array(block.length / pageSize)
  }

  /** Bytes of a page as the destination places them. */
  get hostPageSize(): number {
    return this.#hostPageSize
  }

  /** Marks what a destination reports as received: bit `i & 7` of byte `i >> 3` for page `i`. */
  received(bitmap: Uint8Array): void {
    for (let page = 0; page < this.#states.length; page++) {
      if (((bitmap[page >> 3] ?? 0) >> (page & 7)) % 2 === 1) this.#states[page] = pageState.sent
    }
  }

  /** True if the range holds a page that was neither sent nor found zero. */
  pending(offset: number, length: number): boolean {
    const end = (offset + length) / this.#pageSize
    const next = this.#states.indexOf(pageState.pending, offset / this.#pageSize)
    return next >= 0 && next < end
  }

  /**
   * Promises the cluster around a fault: every page of it not sent yet, those that fault first. Undefined
   * if all were sent before: they are on their way.
   */
  claimFault(offset: number, length: number): Claim | undefined {
    const first = offset - (offset % this.#hostPageSize)
    const claimed = this.claimCluster(offset)
    if (claimed === undefined) return undefined
    const from = (first - claimed.offset) / this.#pageSize
    const to = from + Math.max(length, this.#hostPageSize) / this.#pageSize
    const faulting = claimed.pages.filter((page) => page >= from && page < to)
    const others = claimed.pages.filter((page) => page < from || page >= to)
    return { ...claimed, pages: [...faulting, ...others] }
  }

  /** Promises every page of the cluster at `offset` that was not sent yet; undefined if there is none. */
  claimCluster(offset: number): Claim | undefined {
    const start = offset - (offset % this.clusterSize)
    const length = Math.min(this.clusterSize, this.block.length - start)
    const firstPage = start / this.#pageSize
    const pages: number[] = []
    for (let page = 0; page < length / this.#pageSize; page++) {
      if (this.#states[firstPage + page] === pageState.sent) continue
      this.#states[firstPage + page] = pageState.sent
      pages.push(page)
    }
    return pages.length === 0 ? undefined : { offset: start, length, pages }
  }

  /** Writes promised pages; `bytes` is the content of the claimed range. Gives the number of pages that are not zero. */
  write(part: RamPart, claim: Claim, bytes: Uint8Array): number {
    let data = 0
    for (const page of claim.pages) data += this.#writePage(part, claim.offset, bytes, page * this.#pageSize)
    return data
  }

  /**
   * Writes what is pending in `[offset, offset + bytes.length)`; host pages that are zero are left out, as
   * the destination has zeroes there. `bytes` is the content of that range. Gives the number of pages
   * that are not zero.
   */
  writePending(part: RamPart, offset: number, bytes: Uint8Array): number {
    let data = 0
    for (let at = 0; at < bytes.length; at += this.#hostPageSize) {
      const page = (offset + at) / this.#pageSize
      if (this.#states[page] !== pageState.pending) continue
      const zero = isZero(bytes, at, this.#hostPageSize)
      this.#states.fill(zero ? pageState.zero : pageState.sent, page, page + this.#hostPageSize / this.#pageSize)
      if (zero) continue
      for (let within = 0; within < this.#hostPageSize; within += this.#pageSize) {
        data += this.#writePage(part, offset, bytes, at + within)
      }
    }
    return data
  }

  #writePage(part: RamPart, offset: number, bytes: Uint8Array, at: number): 0 | 1 {
    if (isZero(bytes, at, this.#pageSize)) {
      part.zero(offset + at)
      return 0
    }
    part.page(offset + at, bytes, at)
    return 1
  }
}
