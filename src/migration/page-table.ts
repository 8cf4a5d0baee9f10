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
  #background = 0
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
    return segment === undefined ? this.#background : segment[page % segmentPages]!
  }

  /** Sets the entry of a page of the block. */
  set(page: number, entry: number): void {
    this.segment(page)[page % segmentPages] = entry
  }

  /** Sets the entries of all pages; before any other is set. */
  fill(entry: number): void {
    this.#background = entry
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
    if (this.#background !== 0) segment.fill(this.#background)
    return (this.#segments[index] = segment)
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
