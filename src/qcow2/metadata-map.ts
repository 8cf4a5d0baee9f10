/**
 * Which host clusters hold metadata, as far as it is known: so that a write of data, or a new
 * allocation, that would hit one is stopped before it goes out. Knows nothing of whose they are.
 */
import type { Geometry } from './geometry.ts'

/** Clusters of one page of the map. */
const pageClusters = 1 << 16

export class MetadataMap {
  readonly #clusterSize: number
  /** One bit for each cluster, in pages that exist where there is metadata. */
  readonly #pages = new Map<number, Uint8Array>()
  #end = 0

  constructor(geometry: Geometry) {
    this.#clusterSize = geometry.clusterSize
  }

  /** Marks every cluster the range touches. */
  add(offset: number, length: number): void {
    this.#each(offset, length, (cluster) => {
      const key = Math.floor(cluster / pageClusters)
      let page = this.#pages.get(key)
      if (page === undefined) this.#pages.set(key, (page = new Uint8Array(pageClusters / 8)))
      const bit = cluster - key * pageClusters
      page[bit >> 3]! |= 1 << (bit & 7)
      if (cluster >= this.#end) this.#end = cluster + 1
    })
  }

  /** Unmarks every cluster the range touches. */
  remove(offset: number, length: number): void {
    this.#each(offset, length, (cluster) => {
      const key = Math.floor(cluster / pageClusters)
      const bit = cluster - key * pageClusters
      const page = this.#pages.get(key)
      if (page !== undefined) page[bit >> 3]! &= ~(1 << (bit & 7))
    })
  }

  /** Unmarks everything. */
  clear(): void {
    this.#pages.clear()
    this.#end = 0
  }

  /** True if the range touches a marked cluster. */
  overlaps(offset: number, length: number): boolean {
    const first = Math.floor(offset / this.#clusterSize)
    const end = Math.min(this.#end, Math.ceil((offset + length) / this.#clusterSize))
    for (let cluster = first; cluster < end; cluster++) {
      const key = Math.floor(cluster / pageClusters)
      const bit = cluster - key * pageClusters
      const page = this.#pages.get(key)
      if (page === undefined) cluster = (key + 1) * pageClusters - 1
      else if ((page[bit >> 3]! & (1 << (bit & 7))) !== 0) return true
    }
    return false
  }

  #each(offset: number, length: number, visit: (cluster: number) => void): void {
    const end = Math.ceil((offset + length) / this.#clusterSize)
    for (let cluster = Math.floor(offset / this.#clusterSize); cluster < end; cluster++) visit(cluster)
  }
}
