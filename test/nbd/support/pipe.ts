/** Two transports joined in memory; bytes arrive in pieces of the lengths given, over and over. */
import { IoError } from '../../../src/core/errors.ts'
import type { NbdTransport } from '../../../src/nbd/transport.ts'

const room = 65536

class Channel implements AsyncIterable<Uint8Array> {
  readonly #pieces: Uint8Array[] = []
  readonly #lengths: readonly number[]
  #turn = 0
  #waiting = 0
  #ended = false
  #wake: (() => void) | undefined
  #taken: (() => void)[] = []

  constructor(lengths: readonly number[]) {
    this.#lengths = lengths
  }

  /** Resolves when few bytes wait to be taken, as a socket would. */
  push(bytes: Uint8Array): Promise<void> {
    if (this.#ended) return Promise.reject(new IoError('write', 'the pipe is closed'))
    for (let at = 0; at < bytes.length; ) {
      const length = this.#lengths[this.#turn++ % this.#lengths.length]!
      this.#pieces.push(bytes.slice(at, at + length))
      this.#waiting += Math.min(length, bytes.length - at)
      at += length
    }
    this.#wake?.()
    if (this.#waiting <= room) return Promise.resolve()
    return new Promise((resolve) => this.#taken.push(resolve))
  }

  end(): void {
    this.#ended = true
    this.#wake?.()
    this.#release()
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Uint8Array, void, undefined> {
    for (;;) {
      const piece = this.#pieces.shift()
      if (piece !== undefined) {
        this.#waiting -= piece.length
        if (this.#waiting <= room) this.#release()
        yield piece
      } else if (this.#ended) return
      else await new Promise<void>((resolve) => (this.#wake = resolve))
    }
  }

  #release(): void {
    for (const resolve of this.#taken.splice(0)) resolve()
  }
}

/** A pair of transports: what one sends the other receives. */
export function pipe(lengths: readonly number[] = [65536]): [NbdTransport, NbdTransport] {
  const there = new Channel(lengths)
  const back = new Channel(lengths)
  const side = (incoming: Channel, outgoing: Channel): NbdTransport => ({
    incoming,
    async send(parts) {
      await Promise.all(parts.map((part) => outgoing.push(part)))
    },
    close() {
      incoming.end()
      outgoing.end()
    },
  })
  return [side(back, there), side(there, back)]
}
