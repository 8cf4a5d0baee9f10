/**
 * What a conversation runs over: bytes in, bytes out, close. Owns the reading of exact lengths from
 * a stream of arbitrary pieces; knows nothing of sockets or of the protocol.
 */
import { FormatError } from '../core/errors.ts'

/** A byte stream in both directions, for example a socket. */
export interface NbdTransport {
  /** The peer's bytes, in pieces of any length; ends when the peer ends. Read once. */
  readonly incoming: AsyncIterable<Uint8Array>
  /** Sends the parts one after the other, undivided by other sends; resolves when there is room for more. */
  send(parts: readonly Uint8Array[]): Promise<void>
  /** Ends both directions. Bytes already sent still arrive. */
  close(): void
}

/** Reads exact lengths. Holds at most one piece beyond what was asked for. */
export class ByteReader {
  readonly #pieces: AsyncIterator<Uint8Array>
  #piece: Uint8Array = new Uint8Array(0)
  /** Called with their number whenever bytes arrive. */
  onPiece: ((length: number) => void) | undefined

  constructor(incoming: AsyncIterable<Uint8Array>) {
    this.#pieces = incoming[Symbol.asyncIterator]()
  }

  /**
   * The next `length` bytes, in memory of their own; `undefined` if the stream ended before the first.
   * @throws FormatError (`ERR_FORMAT`) if it ends in their midst.
   */
  async tryRead(length: number): Promise<Uint8Array | undefined> {
    if (length > 0 && this.#piece.length === 0 && !(await this.#more())) return undefined
    const target = new Uint8Array(length)
    let filled = 0
    while (filled < length) {
      if (this.#piece.length === 0 && !(await this.#more())) {
        throw new FormatError(`ended after ${filled} of ${length} bytes`, { structure: 'NBD message' })
      }
      const taken = this.#piece.subarray(0, length - filled)
      target.set(taken, filled)
      filled += taken.length
      this.#piece = this.#piece.subarray(taken.length)
    }
    return target
  }

  /** As {@link tryRead}; an end before the first byte is an error too. */
  async read(length: number): Promise<Uint8Array> {
    const bytes = await this.tryRead(length)
    if (bytes === undefined) throw new FormatError('the peer ended the connection', { structure: 'NBD message' })
    return bytes
  }

  /** Reads `length` bytes and forgets them. */
  async skip(length: number): Promise<void> {
    for (let left = length; left > 0; ) {
      if (this.#piece.length === 0 && !(await this.#more())) {
        throw new FormatError(`ended ${left} bytes early`, { structure: 'NBD message' })
      }
      const taken = Math.min(left, this.#piece.length)
      this.#piece = this.#piece.subarray(taken)
      left -= taken
    }
  }

  /** The next non-empty piece; false at the end. */
  async #more(): Promise<boolean> {
    while (this.#piece.length === 0) {
      const next = await this.#pieces.next()
      if (next.done === true) return false
      this.#piece = next.value
      this.onPiece?.(next.value.length)
    }
    return true
  }
}
