/**
 * Whole files compressed with gzip or zstd, as a stream of chunks. Knows nothing of what they hold.
 */
import { Readable, type Duplex } from 'node:stream'
import * as zlib from 'node:zlib'
import { Decompress } from 'fzstd'

/** Compressions of files that every Node can read here. */
export type FileCompression = 'gzip' | 'zstd'

/** The decompressed chunks. A damaged file rejects with the codec's error. */
export async function* decompressStream(compression: FileCompression, source: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array, void, undefined> {
  const native = nativeDecoder(compression)
  if (native === undefined) {
    yield* bundledZstd(source)
    return
  }
  const input = Readable.from(source, { objectMode: false })
  input.on('error', (error) => native.destroy(error))
  yield* input.pipe(native) as AsyncIterable<Uint8Array>
}

function nativeDecoder(compression: FileCompression): Duplex | undefined {
  if (compression === 'gzip') return zlib.createGunzip()
  const { createZstdDecompress } = zlib as unknown as { createZstdDecompress?: () => Duplex }
  return createZstdDecompress?.()
}

async function* bundledZstd(source: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array, void, undefined> {
  const ready: Uint8Array[] = []
  const decoder = new Decompress((block) => ready.push(block.slice()))
  let last = new Uint8Array(0)
  for await (const chunk of source) {
    // The decoder is told the end together with the last bytes.
    if (last.length > 0) decoder.push(last)
    yield* ready.splice(0)
    last = new Uint8Array(chunk)
  }
  decoder.push(last, true)
  yield* ready
}
