/**
 * One cluster through raw deflate (compression type 0, "zlib"), as qcow2 stores it: no zlib or gzip
 * wrapper, a window of 4 KiB. Owns the parameters and the test that exactly one cluster came out;
 * knows nothing of descriptors, sectors or files.
 */
import { constants, deflateRawSync, inflateRawSync } from 'node:zlib'

/** Room beyond the cluster, so that zlib ends in its first chunk. */
const slack = 128

/**
 * Compresses one cluster. The window is 12 bits, so that a decoder with the 4 KiB window QEMU uses
 * can read it: QEMU itself would take more, but readers that get their output in pieces do not. Node's
 * zlib finds no matches of 3 bytes, so the result is 3 % larger than QEMU's. No level or `memLevel` makes it more than 0.2 % smaller; a
 * window of 13 bits would make up for most of it.
 * @returns `undefined` if the result would not be smaller than the cluster.
 */
export function deflateCluster(cluster: Uint8Array): Uint8Array | undefined {
  const options = { windowBits: 12, memLevel: 9, chunkSize: cluster.length + slack }
  const compressed = deflateRawSync(cluster, options)
  return compressed.length < cluster.length ? compressed : undefined
}

/**
 * Decompresses one cluster from a slice that may be longer than the stream (a descriptor counts
 * sectors, not bytes). What follows the stream, or the point where the cluster is full, is ignored.
 * The window is 15 bits: foreign images use more than QEMU's 12.
 * @returns Why the slice does not hold a whole cluster, or `undefined` if `target` is filled.
 */
export function inflateCluster(source: Uint8Array, target: Uint8Array): string | undefined {
  const whole = inflate(source, target.length)
  const bytes = whole instanceof Uint8Array ? whole : inflatePrefix(source, target.length)
  if (bytes !== undefined && bytes.length >= target.length) {
    target.set(bytes.subarray(0, target.length))
    return undefined
  }
  if (!(whole instanceof Uint8Array)) return `deflate: ${whole.message}`
  return `deflate: the stream holds ${whole.length} bytes, the cluster ${target.length}`
}

/**
 * For streams that run on after the cluster is full, or into bytes that are not deflate: QEMU
 * inflates them into exactly one cluster and looks no further. Finds, by bisection, a prefix of the
 * input that fills the cluster and does not overrun it by much.
 */
function inflatePrefix(source: Uint8Array, length: number): Uint8Array | undefined {
  let low = 0
  let high = source.length
  while (low < high) {
    const middle = (low + high) >>> 1
    const bytes = inflate(source.subarray(0, middle), length)
    if (bytes instanceof Uint8Array) {
      if (bytes.length >= length) return bytes
      low = middle + 1
    } else {
      high = middle
    }
  }
  return undefined
}

/** Everything the input yields, or the failure; more than a cluster and what one byte can add is a failure. */
function inflate(source: Uint8Array, length: number): Uint8Array | Error {
  try {
    return inflateRawSync(source, {
      windowBits: 15,
      chunkSize: length + slack,
      maxOutputLength: length + 4096,
      // a stream without a final block is complete when the cluster is full
      finishFlush: constants.Z_SYNC_FLUSH,
    })
  } catch (error) {
    return error as Error
  }
}
