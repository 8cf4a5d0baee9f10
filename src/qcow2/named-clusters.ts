/**
 * Clusters that something in a damaged image names, though a check did not count them: regions that end past the end of
 * the file. A repair neither frees them nor puts anything there, so that what can be read stays so.
 */
import type { CheckContext } from './check-context.ts'

export class NamedClusters {
  /** First cluster and end of each run, ascending, not overlapping. */
  readonly #runs: number[] = []

  constructor({ pastEnd, geometry }: CheckContext) {
    const { clusterSize } = geometry
    const regions: [number, number][] = []
    for (let i = 0; i < pastEnd.length; i += 2) {
      const [offset, length] = [pastEnd[i]!, pastEnd[i + 1]!]
      regions.push([Math.floor(offset / clusterSize), Math.ceil((offset + length) / clusterSize)])
    }
    regions.sort(([a], [b]) => a - b)
    for (const [first, end] of regions) {
      const last = this.#runs.length - 1
      if (last >= 0 && first <= this.#runs[last]!) this.#runs[last] = Math.max(this.#runs[last]!, end)
      else this.#runs.push(first, end)
    }
  }

  has(cluster: number): boolean {
    const run = this.#runFrom(cluster)
    return run < this.#runs.length && this.#runs[run]! <= cluster
  }

  /** The first named cluster from `cluster` on; Infinity if there is none. */
  next(cluster: number): number {
    const run = this.#runFrom(cluster)
    return run < this.#runs.length ? Math.max(cluster, this.#runs[run]!) : Infinity
  }

  /** The first cluster from `cluster` on that is not named. */
  nextFree(cluster: number): number {
    return this.has(cluster) ? this.#runs[this.#runFrom(cluster) + 1]! : cluster
  }

  /** Named clusters below `end`. */
  *below(end: number): Generator<number, void, undefined> {
    for (let run = 0; run < this.#runs.length; run += 2) {
      for (let cluster = this.#runs[run]!; cluster < Math.min(end, this.#runs[run + 1]!); cluster++) yield cluster
    }
  }

  /** Place of the first run that ends after `cluster`. */
  #runFrom(cluster: number): number {
    let [low, high] = [0, this.#runs.length / 2]
    while (low < high) {
      const middle = (low + high) >>> 1
      if (this.#runs[2 * middle + 1]! <= cluster) low = middle + 1
      else high = middle
    }
    return 2 * low
  }
}
