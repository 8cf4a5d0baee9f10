/**
 * Puts gathered areas of guest memory into an image: whole units of pages, nothing for zeroes, over a backing file
 * only what changed. Owns what was written so far and what is being written; knows nothing of streams.
 */
import { equalBytes } from '../bytes/equal.ts'
import { isZero } from '../bytes/zero.ts'
import { InFlight } from '../core/in-flight.ts'
import { RangeLock } from '../core/lock.ts'
import type { Qcow2Image } from '../qcow2/image.ts'
import { pageState, type PageArea } from './ram-image-pages.ts'

/** What was stored. All in bytes. */
export interface RamImageStatistics {
  /** Written to the disk of the image. */
  written: number
  /** Pages with content that the backing file has already. */
  unchanged: number
}

/** Options of {@link AreaStore}. */
export interface AreaStoreOptions {
  readonly pageSize: number
  /** Bytes of the disk that are written together; at least a page. */
  readonly unit: number
  /** Bytes of the disk. */
  readonly size: number
  /** Compare with what the backing file has. */
  readonly incremental: boolean
  readonly statistics: RamImageStatistics
  /** Takes an area back when nothing refers to its bytes any more. */
  readonly recycle: (area: PageArea) => void
}

/** Areas in, requests to the image out. Errors surface in `drain`. */
export class AreaStore {
  readonly #options: AreaStoreOptions
  readonly #locks = new RangeLock()
  readonly #waiting: PageArea[] = []
  readonly #writing = new Set<Promise<void>>()
  /** One byte a unit of the disk: it was written. */
  readonly #written: Uint8Array
  /** For what the backing file holds; used again. */
  readonly #spareBases: Uint8Array[] = []
  #image: Qcow2Image | undefined
  #bytesInFlight = 0
  #failure: { readonly error: unknown } | undefined

  constructor(options: AreaStoreOptions) {
    this.#options = options
    this.#written = new Uint8Array(Math.ceil(options.size / options.unit))
  }

  /** There is more to do, or to say, than goes on by itself: `drain` has to be called. */
  needsDrain(limit: number): boolean {
    return this.#failure !== undefined || this.#waiting.length > 0 || this.#bytesInFlight > limit
  }

  /** Takes an area over; it waits until there is an image. */
  add(area: PageArea): void {
    this.#bytesInFlight += area.bytes.length
    if (this.#image === undefined) this.#waiting.push(area)
    else this.#store(area)
  }

  /** Where everything goes. */
  open(image: Qcow2Image): void {
    this.#image = image
    for (const area of this.#waiting.splice(0)) this.#store(area)
  }

  /** Resolves when at most `limit` bytes are being written; throws the first error. */
  async drain(limit: number, signal?: AbortSignal): Promise<void> {
    for (;;) {
      signal?.throwIfAborted()
      if (this.#failure !== undefined) throw this.#failure.error
      if (this.#bytesInFlight <= limit || this.#writing.size === 0) return
      await Promise.race(this.#writing)
    }
  }

  /** Begins nothing more; resolves when nothing touches the image. */
  async stop(error: unknown): Promise<void> {
    this.#failure ??= { error }
    await Promise.all(this.#writing)
  }

  #store(area: PageArea): void {
    const task = this.#storeLocked(area)
      .catch((error: unknown) => {
        this.#failure ??= { error }
      })
      .finally(() => {
        this.#writing.delete(task)
        this.#bytesInFlight -= area.bytes.length
        this.#options.recycle(area)
      })
    this.#writing.add(task)
  }

  /** A page that comes again may be in two areas: they are stored one after the other. */
  async #storeLocked(area: PageArea): Promise<void> {
    const end = area.base + area.bytes.length
    const release = this.#locks.tryAcquire(area.base, end) ?? (await this.#locks.acquire(area.base, end))
    try {
      if (this.#failure !== undefined) return
      if (this.#options.incremental) await this.#completeFromBase(area)
      await this.#writeRuns(area)
    } finally {
      release()
    }
  }

  /** Over a backing file, units are completed with what they hold; those that would not change are left out. */
  async #completeFromBase(area: PageArea): Promise<void> {
    const { length } = area.bytes
    const buffer = this.#spareBases.pop() ?? new Uint8Array(Math.max(1 << 20, this.#options.unit))
    const base = buffer.subarray(0, length)
    const inside = Math.min(length, this.#image!.size - area.base)
    await this.#image!.readInto(area.base, base.subarray(0, inside))
    base.fill(0, inside)
    this.#keepChanged(area, base)
    this.#spareBases.push(buffer)
  }

  /** Units that differ from what the backing file has become data as a whole, the others missing. */
  #keepChanged(area: PageArea, base: Uint8Array): void {
    const { pageSize, unit, statistics } = this.#options
    const unitPages = unit / pageSize
    for (let first = 0; first < area.pages.length; first += unitPages) {
      let changed = false
      let present = 0
      for (let page = first; page < first + unitPages; page++) {
        const at = page * pageSize
        const state = area.pages[page]!
        if (state === pageState.missing) {
          area.bytes.set(base.subarray(at, at + pageSize), at)
          continue
        }
        present++
        if (state === pageState.zero) area.bytes.fill(0, at, at + pageSize)
        changed ||= !equalBytes(area.bytes, base, at, pageSize)
      }
      if (!changed) statistics.unchanged += present * pageSize
      area.pages.fill(changed ? pageState.data : pageState.missing, first, first + unitPages)
    }
  }

  /** Writes what has to be written of an area, neighbours in one request. */
  async #writeRuns(area: PageArea): Promise<void> {
    const image = this.#image!
    const writes = new InFlight()
    for (const { start, end, zero } of this.#runs(area)) {
      if (zero) writes.add(image.writeZeroes(area.base + start, end - start))
      else writes.add(image.write(area.base + start, area.bytes.subarray(start, end)))
      this.#options.statistics.written += zero ? 0 : end - start
    }
    await writes.settle()
  }

  #runs(area: PageArea): Run[] {
    const { unit: unitSize, incremental } = this.#options
    const runs: Run[] = []
    const add = (start: number, length: number, zero: boolean): void => {
      const last = runs.at(-1)
      if (last?.end === start && last.zero === zero) last.end += length
      else runs.push({ start, end: start + length, zero })
    }
    for (let at = 0; at < area.bytes.length; at += unitSize) {
      const unit = (area.base + at) / unitSize
      if (this.#written[unit] !== 0) this.#addPages(area, at, add)
      else if (this.#prepareUnit(area, at)) {
        const zero = isZero(area.bytes, at, unitSize)
        if (zero && !incremental) continue
        this.#written[unit] = 1
        add(at, unitSize, zero)
      }
    }
    return runs
  }

  /** In a unit that was written before: only the pages that came now, zeroes too. */
  #addPages(area: PageArea, at: number, add: (start: number, length: number, zero: boolean) => void): void {
    const { pageSize, unit } = this.#options
    for (let page = at / pageSize; page < (at + unit) / pageSize; page++) {
      const state = area.pages[page]
      if (state === pageState.missing) continue
      if (state === pageState.zero) area.bytes.fill(0, page * pageSize, (page + 1) * pageSize)
      add(page * pageSize, pageSize, false)
    }
  }

  /** Fills what is no data in a fresh unit with zeroes; false if there is no data: it stays unallocated. */
  #prepareUnit(area: PageArea, at: number): boolean {
    const { pageSize, unit } = this.#options
    const first = at / pageSize
    const last = first + unit / pageSize
    let data = false
    for (let page = first; page < last; page++) data ||= area.pages[page] === pageState.data
    if (!data) return false
    for (let page = first; page < last; page++) {
      if (area.pages[page] !== pageState.data) area.bytes.fill(0, page * pageSize, (page + 1) * pageSize)
    }
    return true
  }
}

/** Bytes of an area to be written. */
interface Run {
  readonly start: number
  end: number
  /** All of it is zero. */
  readonly zero: boolean
}
