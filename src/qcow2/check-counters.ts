/**
 * How many references were found to each host cluster, and from what kinds of structures. Pages of counters appear as they are used, so
 * memory follows what an image refers to and not the length it claims to have.
 */

import type { RefcountLayout } from './refcount-layout.ts'

const pageBits = 14
const pageSize = 1 << pageBits

/** Two bytes a cluster; a page that has to count further is widened. */
type Page = Uint16Array | Float64Array

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

/** A counter for each cluster number from 0 up to 2^40, and who its owners are. */
export class ClusterCounters {
  readonly #pages: (Page | undefined)[] = []
  readonly #owners: (Uint16Array | undefined)[] = []
  /** Numbers of the pages that are there, ascending; undefined after one was added. */
  #numbers: number[] | undefined
  /** Highest cluster whose counter was ever raised; -1 if none. */
  highest = -1

  /** Raises the counter of one cluster. `by` is a bit of {@link owner}, or 0. */
  add(cluster: number, count: number, by = 0): void {
    const number = Math.floor(cluster / pageSize)
    const index = cluster % pageSize
    const page = this.#pages[number] ?? this.#newPage(number)
    const owners = (this.#owners[number] ??= new Uint16Array(pageSize))
    owners[index] = owners[index]! | by
    const value = page[index]! + count
    if (value > 0xffff && page instanceof Uint16Array) {
      const wide = new Float64Array(page)
      wide[index] = value
      this.#pages[number] = wide
    } else {
      page[index] = value
    }
    if (cluster > this.highest) this.highest = cluster
  }

  get(cluster: number): number {
    return this.#pages[Math.floor(cluster / pageSize)]?.[cluster % pageSize] ?? 0
  }

  /** Bits of {@link owner}. */
  owners(cluster: number): number {
    return this.#owners[Math.floor(cluster / pageSize)]?.[cluster % pageSize] ?? 0
  }

  set(cluster: number, value: number): void {
    this.add(cluster, value - this.get(cluster))
  }

  /** First cluster in `[from, to)` with a counter above zero, or `to`. */
  nextUsed(from: number, to: number): number {
    const numbers = this.#sorted()
    for (let at = firstNotBelow(numbers, Math.floor(from / pageSize)); at < numbers.length; at++) {
      const page = this.#pages[numbers[at]!]!
      const base = numbers[at]! * pageSize
      const end = Math.min(to - base, pageSize)
      for (let index = Math.max(0, from - base); index < end; index++) if (page[index] !== 0) return base + index
    }
    return to
  }

  /**
   * First cluster in `[from, to)` that is not in use, has not exactly one kind of owner, or another counter than `block` has for it; `index` is that of
   * `from` in the block. Looks as far as it can at once, so the cluster found may be like those before.
   */
  nextUnlike(from: number, to: number, layout: RefcountLayout, block: Uint8Array, index: number): number {
    const number = Math.floor(from / pageSize)
    const [page, owners] = [this.#pages[number], this.#owners[number]]
    if (page === undefined || owners === undefined) return from
    const end = Math.min(to - number * pageSize, pageSize)
    let at = from - number * pageSize
    for (let counter = index; at < end; at++, counter++) {
      const by = owners[at]!
      if (page[at] === 0 || by === 0 || (by & (by - 1)) !== 0 || page[at] !== layout.get(block, counter)) break
    }
    return number * pageSize + at
  }

  /** Visits every cluster with a counter above zero, in ascending order. */
  forEach(visit: (cluster: number, count: number) => void): void {
    for (const number of this.#sorted()) {
      const page = this.#pages[number]!
      for (let index = 0; index < pageSize; index++) if (page[index] !== 0) visit(number * pageSize + index, page[index]!)
    }
  }

  #newPage(number: number): Page {
    this.#numbers = undefined
    return (this.#pages[number] = new Uint16Array(pageSize))
  }

  /** Pages may be far apart: going through all numbers in between would take as long as the file claims to be. */
  #sorted(): readonly number[] {
    return (this.#numbers ??= Object.keys(this.#pages).map(Number))
  }
}

/** Index of the first of ascending numbers that is at least `least`. */
function firstNotBelow(numbers: readonly number[], least: number): number {
  let [low, high] = [0, numbers.length]
  while (low < high) {
    const middle = (low + high) >>> 1
    if (numbers[middle]! < least) low = middle + 1
    else high = middle
  }
  return low
}
