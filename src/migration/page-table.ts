/**
 * One number for each page of a RAM block; where none was set, the same number for all. Memory grows with the pages that are
 * set, not with the length that a stream claims for the block. Knows nothing of what the numbers mean.
 */

/** Pages of one segment. */
export const segmentPages = 1024
/** Bytes of one segment. */
export const segmentLength: number = segmentPages * Float64Array.BYTES_PER_ELEMENT

/** Entries by page. */
export class PageTable {
  /** Pages of the block. */
  readonly pages: number
  readonly #segments: (Float64Array | undefined)[] = []
  /** What the pages without a segment have: from a multiple of 1024 pages on, in ascending order. */
  #runs: { readonly from: number; readonly entry: number }[] = [{ from: 0, entry: 0 }]
  #count = 0

  constructor(pages: number) {
    this.pages = pages
  }

  /** Segments that take memory. */
  get segments(): number {
    return this.#count
  }

  /** The entry of a page. */
  get(page: number): number {
    const segment = this.#segments[Math.floor(page / segmentPages)]
    return segment === undefined ? this.#common(page) : segment[page % segmentPages]!
  }

  /** Sets the entry of a page of the block. */
  set(page: number, entry: number): void {
    this.segment(page)[page % segmentPages] = entry
  }

  /** Sets the entries of all pages; before any other is set. */
  fill(entry: number): void {
    this.#runs = [{ from: 0, entry }]
    this.#segments.length = 0
    this.#count = 0
  }

  /** The segment that holds a page, with the entries of the 1024 pages from a multiple of 1024 on. */
  segment(page: number): Float64Array {
    const index = Math.floor(page / segmentPages)
    const known = this.#segments[index]
    if (known !== undefined) return known
    this.#count++
    const segment = new Float64Array(segmentPages)
    const common = this.#common(page)
    if (common !== 0) segment.fill(common)
    return (this.#segments[index] = segment)
  }

  /** Sets the entries of the pages from `from` up to `to` to one entry; ascending ranges take no memory for what is between their ends. */
  fillRange(from: number, to: number, entry: number): void {
    const first = Math.ceil(from / segmentPages) * segmentPages
    const last = to === this.pages ? to : Math.floor(to / segmentPages) * segmentPages
    if (first >= last || first < this.#runs.at(-1)!.from) {
      for (let page = from; page < to; page++) this.set(page, entry)
      return
    }
    for (let page = from; page < first; page++) this.set(page, entry)
    const { entry: before } = this.#runs.at(-1)!
    if (this.#runs.at(-1)!.from === first) this.#runs.pop()
    this.#runs.push({ from: first, entry })
    if (last < this.pages) this.#runs.push({ from: last, entry: before })
    for (let index = first / segmentPages; index < Math.min(last / segmentPages, this.#segments.length); index++) {
      if (this.#segments[index] === undefined) continue
      this.#segments[index] = undefined
      this.#count--
    }
    for (let page = last; page < to; page++) this.set(page, entry)
  }

  /** The entry of a page without a segment. */
  #common(page: number): number {
    let [low, high] = [0, this.#runs.length - 1]
    while (low < high) {
      const middle = Math.ceil((low + high) / 2)
      if (this.#runs[middle]!.from <= page) low = middle
      else high = middle - 1
    }
    return this.#runs[low]!.entry
  }

  /** One past the last page from `page` on that is known to have the entry of all, without looking at each; `page` itself if unknown. */
  sameUntil(page: number): number {
    const index = Math.floor(page / segmentPages)
    return this.#segments[index] === undefined ? Math.min((index + 1) * segmentPages, this.pages) : page
  }

  /** Calls `visit` with each entry and for how many pages in a row it stands. */
  forEachRun(visit: (entry: number, pages: number) => void): void {
    for (let page = 0; page < this.pages; ) {
      const same = this.sameUntil(page)
      visit(this.get(page), same > page ? same - page : 1)
      page = Math.max(same, page + 1)
    }
  }
}
