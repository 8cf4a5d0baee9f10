/** Streams from others, who may say nothing for as long as they like: an interrupt does not wait for them. */
import { constants, createReadStream, openSync, readSync, statSync } from 'node:fs'
import { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

/** The chunks; an interrupt does not wait for the next one. */
export async function* untilAborted(chunks: AsyncIterable<Uint8Array>, signal: AbortSignal): AsyncGenerator<Uint8Array, void, undefined> {
  const iterator = chunks[Symbol.asyncIterator]()
  // a promise for each chunk: racing against one that lives on would keep every chunk alive
  let stop: (reason: Error) => void = () => undefined
  signal.addEventListener('abort', () => stop(signal.reason as Error), { once: true })
  for (;;) {
    signal.throwIfAborted()
    const next = await new Promise<IteratorResult<Uint8Array, unknown>>((resolve, reject) => {
      stop = reject
      iterator.next().then(resolve, reject)
    })
    if (next.done === true) return
    yield next.value
  }
}

/** How often a pipe is tried that nobody writes to yet, in milliseconds. */
const retryAfter = 50

/** What comes through a named pipe, or from a character device. */
export async function* pipeChunks(name: string, signal: AbortSignal): AsyncGenerator<Uint8Array, void, undefined> {
  if (!statSync(name).isFIFO()) {
    yield* createReadStream(name) as AsyncIterable<Uint8Array>
    return
  }
  // without O_NONBLOCK `open` waits for a writer where no signal reaches it; with it, a pipe without a writer is at its end
  const fd = openSync(name, constants.O_RDONLY | constants.O_NONBLOCK)
  const chunk = Buffer.alloc(1 << 16)
  let length = readNow(fd, chunk)
  while (length === 0) {
    await sleep(retryAfter, undefined, { signal })
    length = readNow(fd, chunk)
  }
  if (length !== undefined) yield chunk.subarray(0, length)
  yield* new Socket({ fd, readable: true, writable: false }) as AsyncIterable<Uint8Array>
}

/** How many bytes are there, 0 if nobody writes; undefined if somebody does, and has written nothing yet. */
function readNow(fd: number, chunk: Uint8Array): number | undefined {
  try {
    return readSync(fd, chunk)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return undefined
    throw error
  }
}
