/**
 * One number for each page of a RAM block, 0 where none was set. Memory grows with the pages that are
 * set, not with the length that a stream claims for the block. Knows nothing of what the numbers mean.
 */

/** Pages of one segment. */
export const segmentPages = 1024

/** Entries by page. */
export class PageTable {
  /** Pages of the block. */
  readonly pages: number
  readonly #segments: (Float64Array | undefined)[] = []

  constructor(pages: number) {
    this.pages = pages
  }

  /** The entry of a page; 0 if none was set. */
  get(page: number): number {
    const segment = this.#segments[Math.floor(page / segmentPages)]
    return segment === undefined ? 0 : segment[page % segmentPages]!
  }

  /** Sets the entry of a page of the block. */
  set(page: number, entry: number): void {
    this.segment(page)[page % segmentPages] = entry
  }

  /** The segment that holds a page, with the entries of the 1024 pages from a multiple of 1024 on. */
  segment(page: number): Float64Array {
    const index = Math.floor(page / segmentPages)
    return (this.#segments[index] ??= new Float64Array(segmentPages))
  }

  /** One past the last page from `page` on that is known to have no entry, without looking at each; `page` itself if unknown. */
  emptyUntil(page: number): number {
    const index = Math.floor(page / segmentPages)
    return this.#segments[index] === undefined ? Math.min((index + 1) * segmentPages, this.pages) : page
  }
}
