/**
 * Cached L2 tables and refcount blocks, in slices of at most 64 KiB, bounded in number. Slices are
 * changed in memory and written back later, in the order that `write-back.ts` declares; this file
 * knows nothing of that order or of what the bytes mean.
 *
 * A slice object may be used until the next `await`: after that it may have been evicted, so look it
 * up again. Change it only between `modify` and the next `await`.
 */
import { viewOf } from '../bytes/view.ts'
import type { HostFile, Piece } from './host-file.ts'

/** Part of a table. */
export interface Slice {
  /** Host offset in bytes. */
  readonly offset: number
  readonly bytes: Uint8Array
  readonly view: DataView
}

interface CachedSlice {
  readonly offset: number
  bytes: Uint8Array
  view: DataView
  dirty: boolean
  /** Handed out for writing: the bytes must not change until they are written. */
  frozen: boolean
  /** Looked up since the eviction hand last passed. */
  used: boolean
  gone: boolean
}

/** What a write-back takes from the cache. Exactly one of the two callbacks must be called. */
export interface DirtySlices {
  readonly pieces: readonly Piece[]
  written(): void
  /** The pieces were not written: they are dirty again. */
  failed(): void
}

const maxSliceSize = 64 << 10
const fewestSlices = 8

export class TableCache {
  /** Bytes of a slice. */
  readonly sliceSize: number
  readonly #host: HostFile
  readonly #limit: number
  readonly #writeBack: () => Promise<void>
  readonly #slices = new Map<number, CachedSlice>()
  readonly #loading = new Map<number, Promise<Slice>>()
  readonly #dirty = new Set<CachedSlice>()
  readonly #ring: CachedSlice[] = []
  /** Memory of evicted slices, used again: fresh memory is slow. */
  readonly #spare: Uint8Array[] = []
  #hand = 0

  /** `budget` in bytes; `writeBack` makes all slices clean. */
  constructor(host: HostFile, tableSize: number, budget: number, writeBack: () => Promise<void>) {
    this.#host = host
    this.sliceSize = Math.min(tableSize, maxSliceSize)
    this.#limit = Math.max(fewestSlices, Math.floor(budget / this.sliceSize))
    this.#writeBack = writeBack
  }

  get hasDirty(): boolean {
    return this.#dirty.size > 0
  }

  /** The slice at a host offset, if it is in memory. */
  peek(offset: number): Slice | undefined {
    const slice = this.#slices.get(offset)
    if (slice !== undefined) slice.used = true
    return slice
  }

  /** The slice at a host offset, read from the file if need be. */
  load(offset: number): Promise<Slice> {
    const found = this.peek(offset)
    if (found !== undefined) return Promise.resolve(found)
    const running = this.#loading.get(offset)
    if (running !== undefined) return running
    const loading = this.#read(offset).finally(() => this.#loading.delete(offset))
    this.#loading.set(offset, loading)
    return loading
  }

  /** Runs `use` on the slice at a host offset, in the same turn in which it was looked up. */
  async with<T>(offset: number, use: (slice: Slice) => T): Promise<T> {
    for (;;) {
      const slice = this.peek(offset)
      if (slice !== undefined) return use(slice)
      await this.load(offset)
    }
  }

  /** Room for one more slice; call before `create` where memory has to stay bounded. */
  async makeRoom(): Promise<void> {
    if (this.#slices.size < this.#limit || this.#evict()) return
    await this.#writeBack()
    this.#evict()
  }

  /** Puts a new dirty slice in place, whatever was known of that offset. */
  create(offset: number, bytes: Uint8Array): void {
    this.forget(offset)
    this.#markDirty(this.#insert(offset, bytes))
  }

  /** The slice, ready to be changed until the next `await`, and written back later. */
  modify(slice: Slice): Slice {
    this.#host.assertWritable(slice.offset, this.sliceSize)
    const cached = slice as CachedSlice
    if (cached.gone) throw new Error('an evicted slice was changed')
    if (cached.frozen) {
      const copy = this.#host.allocate(cached.bytes.length)
      copy.set(cached.bytes)
      cached.bytes = copy
      cached.view = viewOf(copy)
      cached.frozen = false
    }
    this.#markDirty(cached)
    return cached
  }

  /** Drops what is cached of a table that no longer exists there, or was written around the cache. */
  forget(offset: number, length: number = this.sliceSize): void {
    for (let at = offset; at < offset + length; at += this.sliceSize) {
      const slice = this.#slices.get(at)
      if (slice === undefined) continue
      this.#slices.delete(at)
      this.#dirty.delete(slice)
      slice.gone = true
    }
  }

  /** Drops every slice that is not dirty. */
  forgetClean(): void {
    for (const slice of this.#slices.values()) {
      if (!slice.dirty && !slice.frozen) this.forget(slice.offset)
    }
  }

  /** All dirty slices, frozen at this moment. */
  takeDirty(): DirtySlices {
    const taken = [...this.#dirty].map((slice) => {
      slice.dirty = false
      slice.frozen = true
      return { slice, offset: slice.offset, bytes: slice.bytes }
    })
    this.#dirty.clear()
    const thaw = (again: boolean): void => {
      for (const { slice, bytes } of taken) {
        if (slice.bytes === bytes) slice.frozen = false
        if (again && !slice.gone) this.#markDirty(slice)
      }
    }
    return { pieces: taken, written: () => thaw(false), failed: () => thaw(true) }
  }

  async #read(offset: number): Promise<Slice> {
    await this.makeRoom()
    const bytes = this.#spare.pop() ?? this.#host.allocate(this.sliceSize)
    await this.#host.readInto(offset, bytes)
    return this.#slices.get(offset) ?? this.#insert(offset, bytes)
  }

  #insert(offset: number, bytes: Uint8Array): CachedSlice {
    const slice = { offset, bytes, view: viewOf(bytes), dirty: false, frozen: false, used: true, gone: false }
    this.#slices.set(offset, slice)
    this.#ring.push(slice)
    return slice
  }

  #markDirty(slice: CachedSlice): void {
    if (slice.dirty) return
    slice.dirty = true
    this.#dirty.add(slice)
  }

  /** Second-chance eviction of one clean slice; false if there is none. */
  #evict(): boolean {
    for (let steps = 2 * this.#ring.length; steps > 0; steps--) {
      if (this.#ring.length === 0) return false
      this.#hand %= this.#ring.length
      const slice = this.#ring[this.#hand]!
      if (!slice.gone && (slice.used || slice.dirty || slice.frozen)) {
        slice.used = false
        this.#hand++
        continue
      }
      this.#ring[this.#hand] = this.#ring[this.#ring.length - 1]!
      this.#ring.pop()
      if (slice.gone) continue
      this.#slices.delete(slice.offset)
      slice.gone = true
      if (this.#spare.length < fewestSlices) this.#spare.push(slice.bytes)
      return true
    }
    return false
  }
}
