/**
 * Reading compressed clusters: a part of one, or many whole ones at a time. Their data lies packed, so that of
 * neighbours comes with one request to the file.
 */
import { decompressCluster } from '../codec/cluster-codec.ts'
import { InFlight } from '../core/in-flight.ts'
import type { Engine } from './engine.ts'
import { maxHostOffset } from './limits.ts'

/** A whole cluster that is wanted. */
export interface CompressedCluster {
  /** Where its data is in the file, and how long that is at most, in bytes. */
  readonly offset: number
  readonly length: number
  /** As long as a cluster. */
  readonly target: Uint8Array
}

/** Compressed data that is read with one request. */
interface Extent {
  readonly offset: number
  end: number
  readonly clusters: CompressedCluster[]
}

/** Bytes of the file read at once at most, unless one cluster takes more. */
const mergeLimit = 1 << 20
/** Bytes nobody asked for that are read rather than split a request. */
const mergeGap = 4096
/** Requests to the file in flight for one call. */
const maxReads = 16

/** Fills `target` with the bytes from `inCluster` on of a compressed cluster. */
export async function readCompressed(
  engine: Engine,
  offset: number,
  length: number,
  inCluster: number,
  target: Uint8Array,
): Promise<void> {
  const { clusterSize } = engine.geometry
  if (target.length === clusterSize) return readCompressedClusters(engine, [{ offset, length, target }])
  const cluster = await engine.decompressed.get(offset, async () => {
    const whole = new Uint8Array(clusterSize)
    await readCompressedClusters(engine, [{ offset, length, target: whole }])
    return whole
  })
  target.set(cluster.subarray(inCluster, inCluster + target.length))
}

/** Fills the targets of whole clusters. */
export async function readCompressedClusters(engine: Engine, clusters: readonly CompressedCluster[]): Promise<void> {
  const reads = new InFlight()
  for (const extent of extentsOf(engine, clusters)) {
    reads.add(readExtent(engine, extent))
    if (reads.count >= maxReads) await reads.settle(maxReads / 2)
  }
  await reads.settle()
}

/** Images written by several threads have neighbours out of order, but not far from each other. */
function extentsOf(engine: Engine, clusters: readonly CompressedCluster[]): Extent[] {
  const extents: Extent[] = []
  let last: Extent | undefined
  for (const cluster of clusters.length === 1 ? clusters : [...clusters].sort((a, b) => a.offset - b.offset)) {
    const { offset, length } = cluster
    const end = offset + length
    if (end > maxHostOffset) {
      throw engine.host.damaged(`a compressed cluster at ${offset} is past 2^53`, { structure: 'L2 table' })
    }
    if (last !== undefined && offset <= last.end + mergeGap && end - last.offset <= mergeLimit) {
      last.end = Math.max(last.end, end)
      last.clusters.push(cluster)
    } else {
      extents.push((last = { offset, end, clusters: [cluster] }))
    }
  }
  return extents
}

async function readExtent(engine: Engine, extent: Extent): Promise<void> {
  const bytes = engine.host.allocate(extent.end - extent.offset)
  await engine.host.readInto(extent.offset, bytes)
  for (const { offset, length, target } of extent.clusters) {
    const at = offset - extent.offset
    decompressCluster(engine.header.compressionType, bytes.subarray(at, at + length), target, offset)
  }
}
