/** The ways bytes can be handed to this layer, made one: an async iteration over chunks. */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { ReadAheadPrefetcher } from '../block/read-ahead.ts'

/**
 * Where a stream's bytes come from: a Node stream or socket, a web `ReadableStream`, any (async)
 * iterable of chunks, bytes in memory, or a `BlockDevice`.
 */
export type ByteSource =
  | AsyncIterable<Uint8Array>
  | Iterable<Uint8Array>
  | ReadableStream<Uint8Array>
  | Uint8Array
  | BlockDevice

/** The chunks of a source, in order. They belong to whoever gets them: those of a `BlockDevice` are made for them. */
export async function* chunksOf(source: ByteSource, options: CallOptions = {}): AsyncGenerator<Uint8Array, void, undefined> {
  const { signal } = options
  signal?.throwIfAborted()
  if (source instanceof Uint8Array) return yield source
  if ('readInto' in source) return yield* deviceChunks(source, 0, options)
  const iterable = 'getReader' in source && !(Symbol.asyncIterator in source) ? readerChunks(source) : (source as AsyncIterable<Uint8Array>)
  for await (const chunk of iterable) {
    signal?.throwIfAborted()
    if (!(chunk instanceof Uint8Array)) throw new TypeError(`a byte source gave ${typeof chunk}; it must give Uint8Array chunks`)
    yield chunk
  }
}

async function* readerChunks(stream: ReadableStream<Uint8Array>): AsyncGenerator<Uint8Array, void, undefined> {
  const reader = stream.getReader()
  try {
    for (;;) {
      const { done, value } = await reader.read()
      if (done) return
      yield value
    }
  } finally {
    await reader.cancel()
    reader.releaseLock()
  }
}

/** The bytes of a device from `from` on, by large sequential reads ahead of their consumer, who owns the chunks. */
export async function* deviceChunks(device: BlockDevice, from: number, options: CallOptions = {}): AsyncGenerator<Uint8Array, void, undefined> {
  await using ahead = new ReadAheadPrefetcher(device, { offset: from, signal: options.signal })
  yield* ahead
}

/**
 * As {@link chunksOf}, without the copy: a chunk of a `BlockDevice` is valid until the next is asked for. Not
 * for Node's streams, which ask for the next before they are done with the last.
 */
export function borrowedChunks(source: ByteSource, options: CallOptions = {}): AsyncGenerator<Uint8Array, void, undefined> {
  const isDevice = !(source instanceof Uint8Array) && 'readInto' in source
  return isDevice ? borrowedDeviceChunks(source, 0, options) : chunksOf(source, options)
}

/** As {@link deviceChunks}, without the copy: a chunk is valid until the next is asked for. */
export async function* borrowedDeviceChunks(device: BlockDevice, from: number, options: CallOptions = {}): AsyncGenerator<Uint8Array, void, undefined> {
  await using ahead = new ReadAheadPrefetcher(device, { offset: from, signal: options.signal })
  yield* ahead.borrowedChunks()
}
