/**
 * Finds places for compressed data: one behind the other, several in a host cluster, across the border
 * to the next one where that is adjacent. Each compressed cluster counts once for every host cluster it
 * touches; the packer counts once itself for the cluster it is filling, so that nobody else gets it
 * when all data in it is freed meanwhile.
 */
import { Mutex } from '../core/lock.ts'
import type { Allocator } from './allocator.ts'
import type { Geometry } from './geometry.ts'
import type { Refcounts } from './refcounts.ts'

export class Packer {
  readonly #allocator: Allocator
  readonly #refcounts: Refcounts
  readonly #geometry: Geometry
  readonly #mutex = new Mutex()
  /** Next free byte of the cluster being filled; -1 without one. */
  #next = -1

  constructor(allocator: Allocator, refcounts: Refcounts) {
    this.#allocator = allocator
    this.#refcounts = refcounts
    this.#geometry = refcounts.geometry
  }

  /** The host offset of `length` bytes, less than a cluster, that are now counted. */
  place(length: number): Promise<number> {
    return this.#mutex.run(() => this.#place(length))
  }

  /** Gives up the count for the cluster being filled. */
  finish(): Promise<void> {
    return this.#mutex.run(() => this.#leave())
  }

  get isFilling(): boolean {
    return this.#next >= 0
  }

  async #place(length: number): Promise<number> {
    const { clusterSize } = this.#geometry
    if (this.#next >= 0 && !(await this.#mayJoin())) await this.#leave()
    if (this.#next >= 0) {
      const left = clusterSize - (this.#next % clusterSize)
      const offset = this.#next
      if (length <= left) {
        await this.#join(offset)
        this.#next += length
        if (length === left) await this.#leave(offset)
        return offset
      }
      const { offset: added } = await this.#allocator.allocate(1)
      if (added === offset + left) {
        await this.#join(offset)
        await this.#leave()
        await this.#enter(added, length - left)
        return offset
      }
      await this.#leave()
      await this.#enter(added, length)
      return added
    }
    const { offset } = await this.#allocator.allocate(1)
    await this.#enter(offset, length)
    return offset
  }

  /** The counter of the cluster being filled can take one more. */
  async #mayJoin(): Promise<boolean> {
    return (await this.#refcounts.get(this.#clusterOf(this.#next))) < this.#refcounts.layout.max
  }

  #join(offset: number): Promise<void> {
    return this.#allocator.adjust(this.#clusterOf(offset), 1, 1)
  }

  /** Begins to fill a cluster that holds `used` bytes of data, which the allocation counted. */
  async #enter(cluster: number, used: number): Promise<void> {
    if (this.#refcounts.layout.max < 2 || used >= this.#geometry.clusterSize) return
    await this.#allocator.adjust(this.#clusterOf(cluster), 1, 1)
    this.#next = cluster + used
  }

  async #leave(offset: number = this.#next): Promise<void> {
    if (offset < 0) return
    this.#next = -1
    await this.#allocator.adjust(this.#clusterOf(offset), 1, -1)
  }

  #clusterOf(offset: number): number {
    return Math.floor(offset / this.#geometry.clusterSize)
  }
}
