/**
 * Gathers guest pages that come in any order into whole clusters. Owns the open areas: a few of 1 MiB
 * where pages come in sequence, and single clusters for pages that come out of it (a background
 * snapshot sends pages early that the guest wants to write). An area is given away when all its pages
 * are there, or to make room. Does no I/O; knows nothing of images.
 */
import { allocateAligned } from '../block/slab.ts'

/** What is known of a page in an area. */
export const pageState = { missing: 0, data: 1, zero: 2 } as const

/** Part of the disk with pages gathered for it. */
export interface PageArea {
  /** Offset in the disk. */
  readonly base: number
  readonly bytes: Uint8Array
  /** {@link pageState} of each page. The bytes of missing and zero pages are arbitrary. */
  readonly pages: Uint8Array
  /** Pages not missing. */
  present: number
}

/** Options of {@link PageGatherer}. */
export interface GathererOptions {
  readonly pageSize: number
  /** Bytes of the unit that is best written at once; at least a page. */
  readonly clusterSize: number
  /** Takes an area over; `recycle` its bytes when done with them. */
  readonly emit: (area: PageArea) => void
  /** Areas of 1 MiB open at once. Default 8. */
  readonly openAreas?: number | undefined
  /** Bytes of single clusters open at once. Default 64 MiB: a busy guest writes to many places before their turn comes. */
  readonly strayBytes?: number | undefined
}

const areaSize = 1 << 20

/** Pages in, areas out. */
export class PageGatherer {
  readonly #options: GathererOptions
  readonly #size: number
  readonly #openLimit: number
  readonly #strayLimit: number
  readonly #open = new Map<number, PageArea>()
  readonly #strays = new Map<number, PageArea>()
  readonly #spare = new Map<number, Uint8Array[]>()
  #last: PageArea | undefined
  /** Where the page after the last one would be. */
  #next = -1

  constructor(options: GathererOptions) {
    this.#options = options
    this.#size = Math.max(areaSize, options.clusterSize)
    this.#openLimit = options.openAreas ?? 8
    this.#strayLimit = Math.max(1, Math.floor((options.strayBytes ?? 64 << 20) / options.clusterSize))
  }

  /** Adds the page at `position`, copied from `source[at]`. */
  data(position: number, source: Uint8Array, at: number): void {
    const { pageSize } = this.#options
    const area = this.#area(position)
    const inArea = position - area.base
    copyPage(area.bytes, inArea, source, at, pageSize)
    this.#mark(area, inArea / pageSize, pageState.data)
    this.#next = position + pageSize
  }

  /** Adds a zero page at `position`. */
  zero(position: number): void {
    const { pageSize } = this.#options
    const area = this.#area(position)
    this.#mark(area, (position - area.base) / pageSize, pageState.zero)
    this.#next = position + pageSize
  }

  /** Gives away everything open. */
  flush(): void {
    for (const area of [...this.#open.values(), ...this.#strays.values()].sort((a, b) => a.base - b.base)) this.#options.emit(area)
    this.#open.clear()
    this.#strays.clear()
    this.#last = undefined
  }

  /** Takes back the bytes of an area that was given away. All are kept: the first touch of fresh memory costs ten copies. */
  recycle(area: PageArea): void {
    const spare = this.#spare.get(area.bytes.length)
    if (spare === undefined) this.#spare.set(area.bytes.length, [area.bytes])
    else spare.push(area.bytes)
  }

  #area(position: number): PageArea {
    const last = this.#last
    if (last !== undefined && position >= last.base && position < last.base + last.bytes.length) return last
    const key = Math.floor(position / this.#size)
    let area = this.#open.get(key)
    if (area === undefined && (position === this.#next || this.#next === -1)) area = this.#openArea(key)
    if (area === undefined) return this.#stray(position)
    this.#last = area
    return area
  }

  #openArea(key: number): PageArea {
    if (this.#open.size >= this.#openLimit) this.#evict()
    const area = this.#newArea(key * this.#size, this.#size)
    this.#open.set(key, area)
    const { clusterSize } = this.#options
    for (let base = area.base; base < area.base + this.#size; base += clusterSize) {
      const stray = this.#strays.get(base / clusterSize)
      if (stray === undefined) continue
      this.#strays.delete(base / clusterSize)
      this.#absorb(area, stray)
    }
    return area
  }

  #absorb(area: PageArea, stray: PageArea): void {
    const { pageSize } = this.#options
    const first = (stray.base - area.base) / pageSize
    area.bytes.set(stray.bytes, stray.base - area.base)
    area.pages.set(stray.pages, first)
    area.present += stray.present
    this.recycle(stray)
  }

  /** Closes the area opened first; its incomplete clusters stay open by themselves. */
  #evict(): void {
    const [key, area] = this.#open.entries().next().value!
    this.#open.delete(key)
    if (this.#last === area) this.#last = undefined
    const { clusterSize, pageSize } = this.#options
    const clusterPages = clusterSize / pageSize
    for (let first = 0; first < area.pages.length; first += clusterPages) {
      const pages = area.pages.subarray(first, first + clusterPages)
      const present = pages.reduce((sum, state) => sum + Number(state !== pageState.missing), 0)
      if (present === 0 || present === clusterPages) continue
      const stray = this.#newStray(area.base + first * pageSize)
      stray.bytes.set(area.bytes.subarray(first * pageSize, first * pageSize + clusterSize))
      stray.pages.set(pages)
      stray.present = present
      pages.fill(pageState.missing)
      area.present -= present
    }
    if (area.present > 0) this.#options.emit(area)
    else this.recycle(area)
  }

  #stray(position: number): PageArea {
    const { clusterSize } = this.#options
    return this.#strays.get(Math.floor(position / clusterSize)) ?? this.#newStray(Math.floor(position / clusterSize) * clusterSize)
  }

  #newStray(base: number): PageArea {
    if (this.#strays.size >= this.#strayLimit) {
      const [key, oldest] = this.#strays.entries().next().value!
      this.#strays.delete(key)
      this.#options.emit(oldest)
    }
    const stray = this.#newArea(base, this.#options.clusterSize)
    this.#strays.set(base / this.#options.clusterSize, stray)
    return stray
  }

  #newArea(base: number, size: number): PageArea {
    const bytes = this.#spare.get(size)?.pop() ?? allocateAligned(size)
    return { base, bytes, pages: new Uint8Array(size / this.#options.pageSize), present: 0 }
  }

  #mark(area: PageArea, page: number, state: number): void {
    if (area.pages[page] === pageState.missing) area.present++
    area.pages[page] = state
    if (area.present < area.pages.length) return
    const { clusterSize } = this.#options
    if (area.bytes.length === this.#size && this.#open.get(area.base / this.#size) === area) this.#open.delete(area.base / this.#size)
    else this.#strays.delete(area.base / clusterSize)
    if (this.#last === area) this.#last = undefined
    this.#options.emit(area)
  }
}

function copyPage(target: Uint8Array, position: number, source: Uint8Array, at: number, length: number): void {
  target.set(source.subarray(at, at + length), position)
}
