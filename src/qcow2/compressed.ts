/**
 * Compressed clusters: reading one, and packing new ones. Compressed data is never overwritten:
 * changing such a cluster gives it a new place.
 */
import { decompressCluster } from '../codec/cluster-codec.ts'
import { FormatError } from '../core/errors.ts'
import type { Engine } from './engine.ts'
import { maxHostOffset } from './limits.ts'

/** Fills `target` with the bytes from `inCluster` on of a compressed cluster. */
export async function readCompressed(
  engine: Engine,
  offset: number,
  length: number,
  inCluster: number,
  target: Uint8Array,
): Promise<void> {
  if (offset + length > maxHostOffset) {
    throw new FormatError(`a compressed cluster at ${offset} is past 2^53`, { structure: 'L2 table' }, 'ERR_CORRUPT')
  }
  const { clusterSize } = engine.geometry
  const source = engine.host.allocate(length)
  await engine.host.readInto(offset, source)
  if (target.length === clusterSize) {
    decompressCluster(engine.header.compressionType, source, target, offset)
    return
  }
  const cluster = new Uint8Array(clusterSize)
  decompressCluster(engine.header.compressionType, source, cluster, offset)
  target.set(cluster.subarray(inCluster, inCluster + target.length))
}
