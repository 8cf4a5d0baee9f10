/**
 * Writing a whole new image in one pass, guest offsets ascending: no read, no cache, no flush but at
 * the end. Owns the host layout, which is one growing sequence:
 *
 *   | header | data ... | L2 table | data ... | refcount block | data ... | L1 | last blocks | refcount table |
 *
 * An L2 table is written when the guest offset passes it, a refcount block when the host offset passes
 * what it counts; so memory does not grow with the image, but for the L1 table. The header comes last:
 * until then the file is not an image, and a crash leaves nothing that could be mistaken for one.
 */
import { encodeCompressed, copiedFlag, maxCompressedOffset, offsetHigh, offsetLow, zeroFlag } from './l2-entry.ts'
import { planLayout, type LayoutOptions } from './create.ts'
import type { Geometry } from './geometry.ts'
import { encodeHeaderCluster, type Header, type HeaderCluster } from './header.ts'
import type { HostFile } from './host-file.ts'
import { InFlight } from '../core/in-flight.ts'
import { refcountLayout, type RefcountLayout } from './refcount-layout.ts'
import { viewOf } from '../bytes/view.ts'
import { writeU64 } from '../bytes/u64.ts'

/** Neighbouring host clusters. */
export interface HostRun {
  /** Host offset in bytes. */
  readonly offset: number
  readonly clusters: number
}

/** Options of {@link ImageWriter}. */
export interface ImageWriterOptions extends LayoutOptions {
  /**
   * Whoever claims space may wait until everything before it is written: no write is kept back while
   * later places are handed out. It costs the rest of a cluster where compressed ones alternate with others.
   */
  readonly inOrder?: boolean | undefined
}

/** Compressed bytes are collected to this length before they are written. */
const packSize = 1 << 20

export class ImageWriter {
  readonly geometry: Geometry
  readonly #host: HostFile
  readonly #options: ImageWriterOptions
  #content: HeaderCluster
  readonly #layout: RefcountLayout
  /** Where the writer's own writes go: set by whoever claims space, who then waits for them. */
  writes: InFlight = new InFlight()
  #l1: Uint8Array
  /** The first host cluster not in use. */
  #next = 1
  #l2: Uint8Array
  #l2Index = -1
  #l2Used = false
  /** Counters of the clusters being handed out, and which block of counters that is. */
  #block: Uint8Array
  #blockIndex = 0
  /** Host offsets of the refcount blocks written. */
  readonly #blockOffsets: number[] = []
  readonly #pack: Pack

  /** @throws what creating an image throws for its options; preallocation, data file and encryption are not for this writer. */
  constructor(host: HostFile, options: ImageWriterOptions) {
    const { geometry, content } = planLayout({ ...options, preallocation: 'off' })
    this.#options = options
    this.geometry = geometry
    this.#host = host
    this.#content = content
    this.#layout = refcountLayout(geometry.refcountOrder)
    this.#l1 = new Uint8Array(content.header.l1Size * 8)
    this.#l2 = host.allocate(geometry.clusterSize)
    this.#block = host.allocate(geometry.clusterSize)
    this.#layout.set(this.#block, 0, 1)
    this.#pack = new Pack(host, geometry.clusterSize, (writing) => this.writes.add(writing))
  }

  get header(): Header {
    return this.#content.header
  }

  /**
   * Maps up to `clusters` guest clusters from `guest` on to new host clusters, fewer where the host
   * run or the L2 table ends. The caller writes their data.
   */
  data(guest: number, clusters: number): HostRun {
    const index = this.#enter(guest)
    if (this.#options.inOrder === true) this.#pack.close()
    this.#finishBlock()
    const { clusterSize, l2Entries, refcountsPerBlock } = this.geometry
    const count = Math.min(clusters, l2Entries - index, (this.#blockIndex + 1) * refcountsPerBlock - this.#next)
    const offset = this.#take(count) * clusterSize
    for (let i = 0; i < count; i++) {
      const host = offset + i * clusterSize
      this.#entry(index + i, offsetHigh(host) + copiedFlag, offsetLow(host), 0, 0xffff_ffff)
    }
    return { offset, clusters: count }
  }

  /** Makes a guest cluster read as zeroes whatever the backing file holds. Version 3 only. */
  zero(guest: number): void {
    const index = this.#enter(guest)
    if (this.geometry.extendedL2) this.#entry(index, 0, 0, 0xffff_ffff, 0)
    else this.#entry(index, 0, zeroFlag, 0, 0)
  }

  /** Stores a guest cluster compressed: `bytes` are copied. */
  compressed(guest: number, bytes: Uint8Array): void {
    const index = this.#enter(guest)
    const offset = this.#place(bytes.length)
    this.#pack.append(offset, bytes)
    const { high, low } = encodeCompressed(offset, bytes.length, this.geometry.clusterBits)
    this.#entry(index, high, low, 0, 0)
  }

  /**
   * Writes what is left, then the header. The callers' data must be written before.
   * @param size of the disk in bytes, where it was not known when the writer was made
   * @throws Qcow2Error `ERR_RANGE` for a size the cluster size does not allow
   */
  async finish(size: number = this.#options.size): Promise<void> {
    this.#content = planLayout({ ...this.#options, size, preallocation: 'off' }).content
    this.#growL1(this.header.l1Size)
    this.writes = new InFlight()
    this.#finishTable()
    this.#pack.close()
    await this.writes.settle()
    const { l1, table, end } = await this.#writeTables()
    await this.#host.ensureSize(end)
    await this.#host.flush()
    const { clusterSize } = this.geometry
    const header: Header = {
      ...this.header,
      l1TableOffset: this.header.l1Size === 0 ? 0 : l1,
      refcountTableOffset: table.offset,
      refcountTableClusters: table.clusters,
    }
    const bytes = this.#host.allocate(clusterSize).fill(0)
    bytes.set(encodeHeaderCluster({ ...this.#content, header }))
    await this.#host.write(0, bytes)
    await this.#host.flush()
  }

  /** The index of the entry for a guest offset, in the current L2 table; an earlier table is finished. */
  #enter(guest: number): number {
    const { clusterSize, bytesPerL1Entry } = this.geometry
    const l1Index = Math.floor(guest / bytesPerL1Entry)
    if (l1Index !== this.#l2Index) {
      this.#finishTable()
      this.#l2Index = l1Index
    }
    return Math.floor((guest - l1Index * bytesPerL1Entry) / clusterSize)
  }

  #entry(index: number, high: number, low: number, zero: number, alloc: number): void {
    const view = viewOf(this.#l2)
    const at = index * this.geometry.l2EntrySize
    view.setUint32(at, high)
    view.setUint32(at + 4, low)
    if (this.geometry.extendedL2) {
      view.setUint32(at + 8, zero)
      view.setUint32(at + 12, alloc)
    }
    this.#l2Used = true
  }

  #finishTable(): void {
    if (!this.#l2Used) return
    if (this.#options.inOrder === true) this.#pack.close()
    this.#finishBlock()
    this.#growL1(this.#l2Index + 1)
    const offset = this.#take(1) * this.geometry.clusterSize
    this.writes.add(this.#host.write(offset, this.#l2))
    const view = viewOf(this.#l1)
    view.setUint32(this.#l2Index * 8, offsetHigh(offset) + copiedFlag)
    view.setUint32(this.#l2Index * 8 + 4, offsetLow(offset))
    this.#l2 = this.#host.allocate(this.geometry.clusterSize)
    this.#l2Used = false
  }

  /** Makes room for so many L1 entries. */
  #growL1(entries: number): void {
    if (this.#l1.length >= entries * 8) return
    const grown = new Uint8Array(Math.max(entries * 8, this.#l1.length * 2))
    grown.set(this.#l1)
    this.#l1 = grown
  }

  /** Takes clusters within the current refcount block. */
  #take(clusters: number): number {
    const first = this.#next
    for (let i = 0; i < clusters; i++) this.#layout.set(this.#block, (first + i) % this.geometry.refcountsPerBlock, 1)
    this.#next += clusters
    return first
  }

  /** When all clusters of a refcount block are taken, it gets the first cluster that the next one counts. */
  #finishBlock(): void {
    const { refcountsPerBlock, clusterSize } = this.geometry
    if (this.#next < (this.#blockIndex + 1) * refcountsPerBlock) return
    this.#pack.close()
    const full = this.#block
    this.#block = this.#host.allocate(clusterSize)
    this.#blockIndex++
    const offset = this.#take(1) * clusterSize
    this.#blockOffsets.push(offset)
    this.writes.add(this.#host.write(offset, full))
  }

  /**
   * A byte offset for compressed data: directly behind the last, where the cluster has room or the
   * next one is its neighbour, and its counter can count one more.
   */
  #place(length: number): number {
    const { clusterSize, refcountsPerBlock } = this.geometry
    const open = this.#pack.end
    if (open !== undefined) {
      const cluster = Math.floor(open / clusterSize)
      const room = (cluster + 1) * clusterSize - open
      const fits = length <= room
      const neighbour = this.#next === cluster + 1 && this.#next < (this.#blockIndex + 1) * refcountsPerBlock
      const slot = cluster % refcountsPerBlock
      const count = this.#layout.get(this.#block, slot)
      if (count < this.#layout.max && (fits || neighbour)) {
        this.#layout.set(this.#block, slot, count + 1)
        if (!fits) this.#take(1)
        return open
      }
    }
    this.#finishBlock()
    this.#pack.close()
    const offset = this.#take(1) * clusterSize
    if (offset >= maxCompressedOffset(this.geometry.clusterBits)) throw new RangeError('the image is too large for compressed clusters')
    return offset
  }

  /** L1 table, last refcount blocks and refcount table, which count themselves: sizes are a fixed point. */
  async #writeTables(): Promise<{ l1: number; table: HostRun; end: number }> {
    const { clusterSize, refcountsPerBlock } = this.geometry
    const first = this.#next
    const l1Bytes = this.header.l1Size * 8
    const l1Clusters = Math.ceil(l1Bytes / clusterSize)
    let blocks = 1
    let tableClusters = 1
    for (;;) {
      const end = first + l1Clusters + blocks + tableClusters
      const neededBlocks = Math.floor((end - 1) / refcountsPerBlock) + 1 - this.#blockIndex
      const neededTable = Math.ceil(((this.#blockIndex + neededBlocks) * 8) / clusterSize)
      if (neededBlocks <= blocks && neededTable <= tableClusters) break
      blocks = Math.max(blocks, neededBlocks)
      tableClusters = Math.max(tableClusters, neededTable)
    }
    const end = first + l1Clusters + blocks + tableClusters
    const blocksAt = first + l1Clusters
    const l1 = this.#host.allocate(l1Clusters * clusterSize)
    l1.set(this.#l1.subarray(0, l1Bytes))
    if (l1Clusters > 0) await this.#host.write(first * clusterSize, l1)
    for (let i = 0; i < blocks; i++) {
      const index = this.#blockIndex + i
      const bytes = i === 0 ? this.#block : this.#host.allocate(clusterSize)
      const from = Math.max(first, index * refcountsPerBlock)
      for (let cluster = from; cluster < Math.min(end, (index + 1) * refcountsPerBlock); cluster++) {
        this.#layout.set(bytes, cluster % refcountsPerBlock, 1)
      }
      this.#blockOffsets.push((blocksAt + i) * clusterSize)
      await this.#host.write((blocksAt + i) * clusterSize, bytes)
    }
    const table = this.#host.allocate(tableClusters * clusterSize)
    this.#blockOffsets.forEach((offset, index) => writeU64(viewOf(table), index * 8, offset))
    await this.#host.write((blocksAt + blocks) * clusterSize, table)
    return { l1: first * clusterSize, table: { offset: (blocksAt + blocks) * clusterSize, clusters: tableClusters }, end: end * clusterSize }
  }
}

/** Compressed bytes on their way to neighbouring host clusters. */
class Pack {
  /** Behind the last byte; undefined if nothing may be added. Never at the start of a cluster. */
  end: number | undefined
  readonly #host: HostFile
  readonly #clusterSize: number
  readonly #onWrite: (writing: Promise<unknown>) => void
  /** Memory that is written out and can be used again. */
  readonly #idle: Uint8Array[] = []
  #buffer: Uint8Array
  /** Host offset of the buffer's first byte, the start of a cluster. */
  #start = 0

  constructor(host: HostFile, clusterSize: number, onWrite: (writing: Promise<unknown>) => void) {
    this.#host = host
    this.#clusterSize = clusterSize
    this.#onWrite = onWrite
    this.#buffer = new Uint8Array(0)
  }

  append(offset: number, bytes: Uint8Array): void {
    if (this.#buffer.length === 0) this.#buffer = this.#memory()
    if (this.end === undefined) this.#start = offset
    this.#buffer.set(bytes, offset - this.#start)
    this.end = offset + bytes.length
    if (this.end % this.#clusterSize === 0) this.close()
    else if (this.end - this.#start >= packSize) this.#flush(Math.floor(this.end / this.#clusterSize) * this.#clusterSize)
  }

  /** Writes everything, the last cluster filled up with zeroes. */
  close(): void {
    if (this.end === undefined) return
    const to = Math.ceil(this.end / this.#clusterSize) * this.#clusterSize
    this.#buffer.fill(0, this.end - this.#start, to - this.#start)
    this.#flush(to)
    this.end = undefined
  }

  /** Writes up to a host offset; what lies behind it moves to other memory. */
  #flush(to: number): void {
    const full = this.#buffer
    this.#buffer = this.#memory()
    this.#buffer.set(full.subarray(to - this.#start, Math.max(to, this.end!) - this.#start))
    const writing = this.#host.write(this.#start, full.subarray(0, to - this.#start))
    this.#onWrite(writing.finally(() => this.#idle.push(full)))
    this.#start = to
  }

  #memory(): Uint8Array {
    return this.#idle.pop() ?? this.#host.allocate(packSize + 2 * this.#clusterSize)
  }
}
