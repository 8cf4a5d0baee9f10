/**
 * The two compression types of qcow2 behind one pair of functions. Everything above compresses and
 * decompresses whole clusters through here.
 */
import { FormatError } from '../core/errors.ts'
import { deflateCluster, inflateCluster } from './deflate.ts'
import { zstdCompressCluster, zstdDecompressCluster } from './zstd.ts'

/** compression_type of the header: 0 is `zlib` (raw deflate), 1 is `zstd`. */
export type CompressionType = 'zlib' | 'zstd'

/**
 * Compresses one cluster.
 * @returns `undefined` if the result would not be smaller: such a cluster is stored as it is.
 * @throws UnsupportedError for zstd on a Node without it.
 */
export function compressCluster(type: CompressionType, cluster: Uint8Array): Uint8Array | undefined {
  return type === 'zlib' ? deflateCluster(cluster) : zstdCompressCluster(cluster)
}

/**
 * Fills `target`, one whole cluster, from `source`, which starts at the compressed data and may be
 * longer. `hostOffset` is where `source` was read, for the error.
 * @throws FormatError `ERR_CORRUPT` if `source` does not yield exactly one cluster; `target` is then undefined.
 */
export function decompressCluster(type: CompressionType, source: Uint8Array, target: Uint8Array, hostOffset?: number): void {
  const problem = type === 'zlib' ? inflateCluster(source, target) : zstdDecompressCluster(source, target)
  if (problem === undefined) return
  throw new FormatError(
    problem,
    { structure: 'compressed cluster', ...(hostOffset === undefined ? {} : { offset: hostOffset }) },
    'ERR_CORRUPT',
  )
}
