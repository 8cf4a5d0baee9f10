/**
 * Whole files compressed with gzip or zstd, as a stream of chunks. Owns how much is decoded before it is asked for; knows
 * nothing of what the files hold.
 */
import { pipeline, type Duplex } from 'node:stream'
import * as zlib from 'node:zlib'
import { Decompress } from 'fzstd'
import { ZstdPieces } from './zstd-pieces.ts'

/** Compressions of files that every Node can read here. */
export type FileCompression = 'gzip' | 'zstd'

/** Content that is decoded at once. */
const chunkSize = 256 << 10

/**
 * The decompressed chunks. The chunks of `source` must belong to whoever gets them: Node's streams read ahead. A damaged
 * file rejects with the codec's error, as does a zstd frame with a larger window than the decoder takes (the bundled one 8 MiB,
 * Node's 128 MiB).
 */
export async function* decompressStream(compression: FileCompression, source: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array, void, undefined> {
  const native = nativeDecoder(compression)
  if (native === undefined) {
    yield* bundledZstd(source)
    return
  }
  // an error of either reaches the iteration below; leaving it early ends the source
  yield* pipeline(source, native, () => undefined) as AsyncIterable<Uint8Array>
}

function nativeDecoder(compression: FileCompression): Duplex | undefined {
  if (compression === 'gzip') return zlib.createGunzip({ chunkSize })
  const { createZstdDecompress } = zlib as unknown as { createZstdDecompress?: (options: { chunkSize: number }) => Duplex }
  return createZstdDecompress?.({ chunkSize })
}

async function* bundledZstd(source: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array, void, undefined> {
  const ready: Uint8Array[] = []
  const decoder = new Decompress((block) => {
    if (block.length > 0) ready.push(block.slice())
  })
  const pieces = new ZstdPieces()
  for await (const chunk of source) {
    for (const piece of pieces.push(chunk)) {
      decoder.push(piece)
      yield* ready.splice(0)
    }
  }
  decoder.push(new Uint8Array(0), true)
  yield* ready
}
