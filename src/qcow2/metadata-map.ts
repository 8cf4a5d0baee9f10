/**
 * Which host clusters hold metadata, as far as it is known: so that a write of data, or a new
 * allocation, that would hit one is stopped before it goes out. Knows nothing of whose they are.
 */
import type { Geometry } from './geometry.ts'

export class MetadataMap {
  readonly #clusterSize: number
  /**
   * One bit for each cluster, 32 in a word, by the index of the word. Only words with a bit set are
   * there: metadata far apart in a file cost no more than side by side.
   */
  readonly #words = new Map<number, number>()
  #end = 0

  constructor(geometry: Geometry) {
    this.#clusterSize = geometry.clusterSize
  }

  /** Marks every cluster the range touches. */
  add(offset: number, length: number): void {
    this.#each(offset, length, (word, mask) => {
      this.#words.set(word, (this.#words.get(word) ?? 0) | mask)
      return false
    })
    this.#end = Math.max(this.#end, offset + length)
  }

  /** Unmarks every cluster the range touches. */
  remove(offset: number, length: number): void {
    this.#each(offset, length, (word, mask) => {
      const left = (this.#words.get(word) ?? 0) & ~mask
      if (left === 0) this.#words.delete(word)
      else this.#words.set(word, left)
      return false
    })
  }

  /** Unmarks everything. */
  clear(): void {
    this.#words.clear()
    this.#end = 0
  }

  /** True if the range touches a marked cluster. */
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
