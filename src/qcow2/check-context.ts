/**
 * What the parts of a check share: the header as it is on disk, the counters being built, and reads
 * that treat bytes past the end of the file as zeroes. Independent of the engine and its caches.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { AbortPoints } from '../core/abort-points.ts'
import { Budget } from '../core/budget.ts'
import { ClusterCounters } from './check-counters.ts'
import { offsetText, type CheckCollector } from './check-report.ts'
import { incompatible } from './features.ts'
import { geometryOf, type Geometry } from './geometry.ts'
import { decodeHeaderCluster, refuseRawWithoutDataFile, type Header, type HeaderCluster } from './header.ts'
import { refcountLayout, type RefcountLayout } from './refcount-layout.ts'

/** Bytes of the largest read; neighbouring tables are read together up to this. */
const readSize = 1 << 20
/** Reads in flight. */
const readDepth = 8

/** How references are counted. */
export interface CountOptions extends CallOptions {
  /** Bytes of memory that a check may keep; see `CheckOptions`. */
  readonly maxMemory?: number | undefined
  /** Counters hold what `1 << refcountOrder` bits do, and at least what those of the image do. */
  readonly refcountOrder?: number | undefined
}

/** The image under check. */
export class CheckContext {
  readonly host: BlockDevice
  readonly cluster0: HeaderCluster
  readonly header: Header
  readonly geometry: Geometry
  readonly layout: RefcountLayout
  /** What the check keeps in memory. */
  readonly budget: Budget
  /** References found so far. */
  readonly expected: ClusterCounters
  /** Offset and length of each region that is referred to and not counted, because it ends past the end of the file. */
  readonly pastEnd: number[] = []
  readonly report: CheckCollector
  readonly call: CallOptions
  /** Where a long computation lets the event loop turn, also without a signal. */
  readonly points: AbortPoints

  private constructor(host: BlockDevice, cluster0: HeaderCluster, report: CheckCollector, call: CountOptions) {
    this.host = host
    this.cluster0 = cluster0
    this.header = cluster0.header
    this.geometry = geometryOf({
      clusterBits: this.header.clusterBits,
      extendedL2: (this.header.incompatibleFeatures & incompatible.extendedL2) !== 0n,
      refcountOrder: this.header.refcountOrder,
    })
    this.layout = refcountLayout(Math.max(this.header.refcountOrder, call.refcountOrder ?? 0))
    this.report = report
    this.call = call
    this.points = new AbortPoints(call.signal ?? new AbortController().signal)
    this.budget = new Budget('the check of the image', call.maxMemory)
    this.expected = new ClusterCounters(this.budget)
  }

  /**
   * Reads the header of the image in `host`.
   * @throws FormatError, UnsupportedError if it cannot be understood.
   */
  static async open(host: BlockDevice, report: CheckCollector, call: CountOptions): Promise<CheckContext> {
    const start = new Uint8Array(Math.min(host.size, 1 << 21))
    await host.readInto(0, start.subarray(0, Math.min(start.length, 1 << 16)), call)
    if (start.length > 1 << 16) {
      const clusterBits = new DataView(start.buffer).getUint32(20)
      if (clusterBits > 16 && clusterBits <= 21) await host.readInto(0, start.subarray(0, Math.min(start.length, 2 ** clusterBits)), call)
    }
    const cluster0 = decodeHeaderCluster(start, { lenient: true })
    refuseRawWithoutDataFile(cluster0.header)
    return new CheckContext(host, cluster0, report, call)
  }

  /** Guest data is in another file; its clusters are not counted here. */
  get hasDataFile(): boolean {
    return (this.header.incompatibleFeatures & incompatible.dataFile) !== 0n
  }

  /** Host clusters the file has, a cut last one included. */
  get fileClusters(): number {
    return Math.ceil(this.host.size / this.geometry.clusterSize)
  }

  /**
   * Counts `times` references to every cluster that `[offset, offset + length)` touches. The last
   * cluster of a file may be cut short; a region that ends a whole cluster or more past the end of the
   * file is a corruption and not counted.
   */
  reference(offset: number, length: number, by: number, times = 1): void {
    if (length <= 0) return
    const { clusterSize } = this.geometry
    if (offset + length - this.host.size >= clusterSize) {
      this.report.corruption(() => {
        const message = `${length} bytes at ${offsetText(offset)} are in use, but the file ends at ${this.host.size}`
        return { structure: 'host cluster', offset, message, problem: 'past end of file', value: length }
      }, times)
      this.budget.take(16)
      this.pastEnd.push(offset, length)
      return
    }
    const last = Math.floor((offset + length - 1) / clusterSize)
    for (let cluster = Math.floor(offset / clusterSize); cluster <= last; cluster++) this.#add(cluster, by, times)
  }

  /** More references than a counter can hold are a corruption; the counter then stays at its maximum. */
  #add(cluster: number, by: number, times: number): void {
    const room = this.layout.max - this.expected.get(cluster)
    if (times > room) {
      this.report.corruption(() => {
        const message = `cluster ${cluster} has more references than refcounts of ${this.layout.bits} bits can count; amend the image to wider ones`
        return { structure: 'refcount', offset: cluster * this.geometry.clusterSize, message, problem: 'too many references' }
      }, times - room)
    }
    this.expected.add(cluster, Math.min(times, room), by)
  }

  /** Bytes of the file; those past its end are zero. */
  async read(offset: number, length: number): Promise<Uint8Array> {
    const bytes = new Uint8Array(length)
    await this.readInto(offset, bytes)
    return bytes
  }

  async readInto(offset: number, target: Uint8Array): Promise<void> {
    const available = Math.max(0, Math.min(target.length, this.host.size - offset))
    if (available > 0) await this.host.readInto(offset, target.subarray(0, available), this.call)
    target.fill(0, available)
  }

  /**
   * Reads whole clusters, given in ascending order of host cluster, and visits each. Neighbours are
   * read together; several reads are in flight, so the visits come in no particular order.
   */
  async readClusters(clusters: Iterable<number>, visit: (bytes: Uint8Array, cluster: number) => void): Promise<void> {
    const { clusterSize } = this.geometry
    const runs = runsOf(clusters, Math.max(1, Math.floor(readSize / clusterSize)))
    const lane = async (): Promise<void> => {
      let buffer = new Uint8Array(0)
      for (let next = runs.next(); next.done !== true; next = runs.next()) {
        const { first, count } = next.value
        if (buffer.length < count * clusterSize) buffer = new Uint8Array(count * clusterSize)
        await this.readInto(first * clusterSize, buffer.subarray(0, count * clusterSize))
        for (let i = 0; i < count; i++) {
          visit(buffer.subarray(i * clusterSize, (i + 1) * clusterSize), first + i)
          const turn = this.points.pass()
          if (turn !== undefined) await turn
        }
      }
    }
    await Promise.all(Array.from({ length: readDepth }, lane))
  }
}

interface Run {
  readonly first: number
  readonly count: number
}

function* runsOf(clusters: Iterable<number>, longest: number): Generator<Run, void, undefined> {
  let first = -1
  let count = 0
  for (const cluster of clusters) {
    if (count > 0 && cluster === first + count && count < longest) {
      count++
      continue
    }
    if (count > 0) yield { first, count }
    first = cluster
    count = 1
  }
  if (count > 0) yield { first, count }
}
