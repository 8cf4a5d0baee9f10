/**
 * Which host clusters hold metadata, as far as it is known: so that a write of data, or a new
 * allocation, that would hit one is stopped before it goes out. Beside them the places where metadata may not be
 * written either. Knows nothing of what the metadata mean.
 */
import type { Geometry } from './geometry.ts'

/** A place that metadata claims and may not be written to. Offsets in bytes. */
export interface Contested {
  readonly start: number
  readonly end: number
  /** The structure, by its specification's name. */
  readonly structure: string
  /** What is wrong with it. */
  readonly detail: string
}

/** More contested places than these: nothing in the image is where it should be. */
const mostContested = 64

export class MetadataMap {
  readonly #all: ClusterSet
  /** All but L2 tables. */
  readonly #structures: ClusterSet
  #contested: Contested[] = []

  constructor({ clusterSize }: Geometry) {
    this.#all = new ClusterSet(clusterSize)
    this.#structures = new ClusterSet(clusterSize)
  }

  /** Marks every cluster that a structure touches. */
  add(offset: number, length: number): void {
    this.#all.add(offset, length)
    this.#structures.add(offset, length)
  }

  /** Marks the cluster of an L2 table. */
  addL2Table(offset: number, length: number): void {
    this.#all.add(offset, length)
  }

  /** Unmarks every cluster the range touches. */
  remove(offset: number, length: number): void {
    this.#all.remove(offset, length)
    this.#structures.remove(offset, length)
  }

  /** Unmarks everything. */
  clear(): void {
    this.#all.clear()
    this.#structures.clear()
    this.#contested = []
  }

  /** True if the range touches a marked cluster. */
  overlaps(offset: number, length: number): boolean {
    return this.#all.overlaps(offset, length)
  }

  /** True if the range touches a cluster of a structure that is no L2 table. */
  overlapsStructure(offset: number, length: number): boolean {
    return this.#structures.overlaps(offset, length)
  }

  /** From now on nothing may be written to this place. */
  contest(place: Contested): void {
    if (this.#contested.length < mostContested) this.#contested.push(place)
    else this.#contested[0] = { ...place, start: 0, end: Number.MAX_SAFE_INTEGER }
  }

  /** A contested place that the range touches. Sound images have none. */
  contestedAt(offset: number, length: number): Contested | undefined {
    if (this.#contested.length === 0) return undefined
    return this.#contested.find(({ start, end }) => start < offset + length && offset < end)
  }
}

/** Clusters of a file, by any byte in them. */
class ClusterSet {
  readonly #clusterSize: number
  /**
   * One bit for each cluster, 32 in a word, by the index of the word. Only words with a bit set are
   * there: metadata far apart in a file cost no more than side by side.
   */
  readonly #words = new Map<number, number>()
  #end = 0

  constructor(clusterSize: number) {
    this.#clusterSize = clusterSize
  }

  add(offset: number, length: number): void {
    this.#each(offset, length, (word, mask) => {
      this.#words.set(word, (this.#words.get(word) ?? 0) | mask)
      return false
    })
    this.#end = Math.max(this.#end, offset + length)
  }

  remove(offset: number, length: number): void {
    this.#each(offset, length, (word, mask) => {
      const left = (this.#words.get(word) ?? 0) & ~mask
      if (left === 0) this.#words.delete(word)
      else this.#words.set(word, left)
      return false
    })
  }

  clear(): void {
    this.#words.clear()
    this.#end = 0
  }

  overlaps(offset: number, length: number): boolean {
    const known = Math.min(length, this.#end + this.#clusterSize - offset)
    return this.#each(offset, known, (word, mask) => ((this.#words.get(word) ?? 0) & mask) !== 0)
  }

  /** Visits the words of a range, with the bits that lie in it, until `visit` is true; true if it was. */
  #each(offset: number, length: number, visit: (word: number, mask: number) => boolean): boolean {
    const end = Math.ceil((offset + length) / this.#clusterSize)
    for (let cluster = Math.floor(offset / this.#clusterSize); cluster < end; ) {
      const word = Math.floor(cluster / 32)
      const next = Math.min(end, word * 32 + 32)
      const mask = (-1 >>> (32 - (next - cluster))) << (cluster - word * 32)
      if (visit(word, mask)) return true
      cluster = next
    }
    return false
  }
}
