/**
 * One cluster through zstd (compression type 1). Uses the codec of `node:zlib` where this Node has
 * it (22.15 and later), else the bundled decoder, which cannot compress. Knows nothing of
 * descriptors, sectors or files.
 */
import * as zlib from 'node:zlib'
import { Decompress } from 'fzstd'
import { UnsupportedError } from '../core/errors.ts'
import { parseZstdFrame, type ZstdFrame } from './zstd-frame.ts'

/** What newer Nodes have in `node:zlib`; the types of Node 20 do not know it. */
interface NativeZstd {
  zstdCompressSync(bytes: Uint8Array, options: { pledgedSrcSize: number }): Uint8Array
  zstdDecompressSync(bytes: Uint8Array, options: { maxOutputLength: number; chunkSize: number }): Uint8Array
}

const native = 'zstdDecompressSync' in zlib ? (zlib as unknown as NativeZstd) : undefined

/** This Node can write zstd clusters. Every Node can read them. */
export const canCompressZstd: boolean = native !== undefined

/**
 * Compresses one cluster into one frame with its content size, at the default level.
 * @returns `undefined` if the result would not be smaller than the cluster.
 * @throws UnsupportedError on a Node without zstd.
 */
export function zstdCompressCluster(cluster: Uint8Array): Uint8Array | undefined {
  if (native === undefined) throw noZstd()
  const compressed = native.zstdCompressSync(cluster, { pledgedSrcSize: cluster.length })
  return compressed.length < cluster.length ? compressed : undefined
}

/** The error for writing zstd on a Node that cannot. */
export function noZstd(): UnsupportedError {
  const message = `compression_type zstd: this Node (${process.version}) can read it but not write it; Node 22.15 or later can`
  return new UnsupportedError(message, ['zstd'])
}

/**
 * Decompresses one cluster from a slice that may be longer than its frames. Several frames may make
 * up the cluster; the one in which it becomes full must be whole; what follows is ignored.
 * @returns Why the slice does not hold a whole cluster, or `undefined` if `target` is filled.
 */
export function zstdDecompressCluster(source: Uint8Array, target: Uint8Array): string | undefined {
  let filled = 0
  for (let at = 0; filled < target.length; ) {
    const rest = source.subarray(at)
    const frame = parseZstdFrame(rest)
    if (typeof frame === 'string') return `zstd: ${frame} (byte ${at} of the compressed data)`
    if (!frame.skippable) {
      const produced = decompressFrame(rest.subarray(0, frame.length), frame, target.subarray(filled))
      if (typeof produced === 'string') return `zstd: ${produced} (byte ${at} of the compressed data)`
      filled += produced
    }
    at += frame.length
  }
  return undefined
}

/** Fills the start of `target` from one exact frame; the number of bytes, or what is wrong. */
function decompressFrame(bytes: Uint8Array, frame: ZstdFrame, target: Uint8Array): number | string {
  if ((frame.contentSize ?? 0) > target.length) return 'the frame holds more than the cluster'
  try {
    const produced = native === undefined ? decompressBundled(bytes, frame, target) : decompressNative(native, bytes, target)
    if (frame.contentSize !== undefined && produced !== frame.contentSize) return 'the frame holds less than its header says'
    return produced
  } catch (error) {
    return error instanceof Error ? error.message : String(error)
  }
}

function decompressNative(codec: NativeZstd, bytes: Uint8Array, target: Uint8Array): number {
  const options = { maxOutputLength: target.length, chunkSize: Math.max(64, target.length + 128) }
  const content = codec.zstdDecompressSync(bytes, options)
  target.set(content)
  return content.length
}

function decompressBundled(bytes: Uint8Array, frame: ZstdFrame, target: Uint8Array): number {
  let filled = 0
  const decoder = new Decompress((block) => {
    if (filled + block.length > target.length) throw new Error('the frame holds more than the cluster')
    target.set(block, filled)
    filled += block.length
  })
  decoder.push(boundWindow(bytes, frame, target.length), true)
  return filled
}

/**
 * The decoder allocates the window a frame declares, up to 2 GiB. No match can reach further back
 * than the cluster, so a larger window is declared down to that before decoding.
 */
function boundWindow(bytes: Uint8Array, frame: ZstdFrame, length: number): Uint8Array {
  if (frame.windowAt === undefined || frame.windowSize <= 2 * length) return bytes
  const exponent = Math.max(0, Math.ceil(Math.log2(length)) - 10)
  const patched = bytes.slice()
  patched[frame.windowAt] = exponent << 3
  return patched
}
