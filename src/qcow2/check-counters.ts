/**
 * How many references were found to each host cluster, and from what kinds of structures. Pages of counters appear as they are used, so
 * memory follows what an image refers to and not the length it claims to have.
 */
import { Budget } from '../core/budget.ts'
import type { RefcountLayout } from './refcount-layout.ts'
import { PageIndex } from './page-index.ts'

/** Clusters whose counters lie side by side. Small, because a hostile image may use one cluster in each. */
const pageSize = 16
/** Bytes that a page takes: a count and the owners for each cluster, and its place in the index. */
const pageBytes = pageSize * 4 + 32
/** Stands for every counter from here on, which is then kept apart. */
const large = 0xffff

/** What refers to a cluster, as a bit: a cluster with two kinds of owners is damaged. */
export const owner = {
  header: 1,
  l1Table: 2,
  l2Table: 4,
  data: 8,
  compressed: 16,
  refcountTable: 32,
  refcountBlock: 64,
  snapshotTable: 128,
  bitmaps: 256,
  luksHeader: 512,
} as const

const ownerNames: Record<keyof typeof owner, string> = {
  header: 'the header',
  l1Table: 'an L1 table',
  l2Table: 'an L2 table',
  data: 'guest data',
  compressed: 'compressed data',
  refcountTable: 'the refcount table',
  refcountBlock: 'a refcount block',
  snapshotTable: 'the snapshot table',
  bitmaps: 'bitmaps',
  luksHeader: 'the LUKS header',
}

/** The owners in a set of bits, in words. */
export function describeOwners(bits: number): string {
  const names = (Object.keys(owner) as (keyof typeof owner)[]).filter((name) => (bits & owner[name]) !== 0)
  return names.map((name) => ownerNames[name]).join(' and ')
}

/** A counter for each cluster number, and who its owners are. */
export class ClusterCounters {
  readonly #budget: Budget
  readonly #pages = new PageIndex()
  /** By the number of the page in order of appearance. */
  #counts = new Uint16Array(256 * pageSize)
  #owners = new Uint16Array(256 * pageSize)
  /** Counters of {@link large} or more, by their place in the arrays. */
  readonly #large = new Map<number, number>()
  /** The page that was looked for last. */
  #number = -1
  #start = 0
  /** Highest cluster whose counter was ever raised; -1 if none. */
  highest = -1

  /** @param budget what the counters may take, in bytes */
  constructor(budget: Budget = new Budget('counters of clusters')) {
    this.#budget = budget
  }

  /**
   * Raises the counter of one cluster. `by` is a bit of {@link owner}, or 0.
   * @throws Qcow2Error `ERR_UNSUPPORTED` if the clusters in use need more memory than the budget has.
   */
  add(cluster: number, count: number, by = 0): void {
    let place = this.#find(cluster)
    if (place < 0) place = this.#newPage(cluster)
    this.#owners[place] = this.#owners[place]! | by
    const value = this.#at(place) + count
    this.#counts[place] = Math.min(value, large)
    if (value >= large) this.#large.set(place, value)
    if (cluster > this.highest) this.highest = cluster
  }

  get(cluster: number): number {
    const place = this.#find(cluster)
    return place < 0 ? 0 : this.#at(place)
  }

  /** Bits of {@link owner}. */
  owners(cluster: number): number {
    const place = this.#find(cluster)
    return place < 0 ? 0 : this.#owners[place]!
  }

  /** First cluster in `[from, to)` with a counter above zero, or `to`. */
  nextUsed(from: number, to: number): number {
    const pages = this.#pages
    for (let at = pages.rank(Math.floor(from / pageSize)); at < pages.size; at++) {
      const base = pages.ascending(at) * pageSize
      if (base >= to) break
      const start = pages.find(base / pageSize) * pageSize
      const end = Math.min(to - base, pageSize)
      for (let index = Math.max(0, from - base); index < end; index++) if (this.#counts[start + index] !== 0) return base + index
    }
    return to
  }

  /** First cluster in `[from, to)` with another counter than `count`, or other owners than `by`; or `to`. */
  nextOther(from: number, to: number, count: number, by: number): number {
    if (count === 0 && by === 0) return this.nextUsed(from, to)
    let cluster = from
    while (cluster < to && this.get(cluster) === count && this.owners(cluster) === by) cluster++
    return cluster
  }

  /**
   * First cluster in `[from, to)` that is not in use, has not exactly one kind of owner, or another counter than `block` has for it;
   * `index` is that of `from` in the block. It may find one that is like those before, if its counter is very large.
   */
  nextUnlike(from: number, to: number, layout: RefcountLayout, block: Uint8Array, index: number): number {
    for (let at = from; at < to; ) {
      let place = this.#find(at)
      if (place < 0) return at
      const end = Math.min(to, at - (at % pageSize) + pageSize)
      for (; at < end; at++, place++) {
        const by = this.#owners[place]!
        const count = this.#counts[place]!
        const isPlain = count > 0 && count < large && by > 0 && (by & (by - 1)) === 0
        if (!isPlain || count !== layout.get(block, index + at - from)) return at
      }
    }
    return to
  }

  /** Place of a cluster's counter, or -1. */
  #find(cluster: number): number {
    const number = Math.floor(cluster / pageSize)
    if (number !== this.#number) {
      const page = this.#pages.find(number)
      if (page < 0) return -1
      this.#number = number
      this.#start = page * pageSize
    }
    return this.#start + (cluster % pageSize)
  }

  #at(place: number): number {
    const count = this.#counts[place]!
    return count < large ? count : this.#large.get(place)!
  }

  #newPage(cluster: number): number {
    this.#budget.take(pageBytes)
    const start = this.#pages.add(Math.floor(cluster / pageSize)) * pageSize
    if (start === this.#counts.length) {
      this.#counts = doubled(this.#counts)
      this.#owners = doubled(this.#owners)
    }
    return start + (cluster % pageSize)
  }
}

function doubled(array: Uint16Array<ArrayBuffer>): Uint16Array<ArrayBuffer> {
  const grown = new Uint16Array(array.length * 2)
  grown.set(array)
  return grown
}
