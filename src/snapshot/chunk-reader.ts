/**
 * Reads a connection chunk by chunk. Unlike a Node stream's own iterator it leaves the connection alone when
 * the loop is left early: whoever sends may have to be read to the end all the same.
 */
import { Qcow2Error } from '../core/errors.ts'
import type { DuplexStream } from '../qmp/duplex.ts'

/** Bytes held before the sender is made to wait. */
const highWater = 1 << 20

/** Asks whether a sender that is silent still lives: rejects if not. */
export interface Silence {
  /** Milliseconds without a byte, each time. */
  readonly after: number
  readonly ask: () => Promise<unknown>
}

/** The incoming side of a connection. Make one for each connection, at once. */
export class ChunkReader implements AsyncIterable<Uint8Array> {
  readonly #stream: DuplexStream
  readonly #silence: Silence | undefined
  readonly #queue: Uint8Array[] = []
  #held = 0
  #ended = false
  #failure: Error | undefined
  #wake: (() => void) | undefined

  constructor(stream: DuplexStream, silence?: Silence) {
    this.#stream = stream
    this.#silence = silence
    stream.on('data', (chunk: Uint8Array) => {
      // Plain arrays: the slice() of a Buffer would share memory where a copy is meant.
      this.#queue.push(new Uint8Array(chunk.buffer, chunk.byteOffset, chunk.length))
      this.#held += chunk.length
      if (this.#held >= highWater) stream.pause()
      this.#wake?.()
    })
    stream.on('end', () => {
      this.#ended = true
      this.#wake?.()
    })
    stream.on('error', (error: Error) => this.#fail(error))
    stream.on('close', () => this.#fail(new Qcow2Error('ERR_STREAM', 'the connection was closed before its end')))
  }

  /** Goes on where the last iteration stopped, until the peer has ended its side. A broken connection rejects. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Uint8Array, void, undefined> {
    for (;;) {
      const chunk = this.#queue.shift()
      if (chunk !== undefined) {
        this.#held -= chunk.length
        if (this.#held < highWater) this.#stream.resume()
        yield chunk
      } else if (this.#ended) {
        return
      } else if (this.#failure !== undefined) {
        throw this.#failure
      } else {
        this.#stream.resume()
        await this.#more()
      }
    }
  }

  /** Reads to the end and forgets what comes. */
  async drain(): Promise<void> {
    for await (const _chunk of this) this.#held = 0
  }

  /** Something has come, or the end. */
  async #more(): Promise<void> {
    const silence = this.#silence
    const ask = (): void => void silence?.ask().catch((error: unknown) => this.#fail(error as Error))
    const timer = silence === undefined ? undefined : setInterval(ask, silence.after)
    await new Promise<void>((resolve) => (this.#wake = resolve))
    clearInterval(timer)
  }

  #fail(error: Error): void {
    this.#failure ??= error
    this.#wake?.()
  }
}
