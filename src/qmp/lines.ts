/**
 * Splits a byte stream into lines of JSON. Owns the framing only: QEMU ends each message with CR LF
 * and never puts a line feed inside one.
 */
import { concat } from '../bytes/concat.ts'
import { QmpError } from './error.ts'

const lineFeed = 10

/** The longest message accepted, in bytes; QEMU's schema, the largest known answer, has well under 1 MiB. */
export const maxMessage: number = 64 << 20

/** Collects chunks of any size and hands out whole lines. */
export class LineSplitter {
  #parts: Uint8Array[] = []
  #length = 0

  /**
   * The lines completed by `chunk`, without their line ends; empty lines are left out.
   * @throws QmpError for a line longer than {@link maxMessage}.
   */
  push(chunk: Uint8Array): string[] {
    const lines: string[] = []
    let start = 0
    for (let end = chunk.indexOf(lineFeed); end >= 0; end = chunk.indexOf(lineFeed, start)) {
      this.#keep(chunk.subarray(start, end))
      const line = this.#take().trim()
      if (line !== '') lines.push(line)
      start = end + 1
    }
    if (start < chunk.length) this.#keep(new Uint8Array(chunk.subarray(start)))
    return lines
  }

  #keep(bytes: Uint8Array): void {
    this.#length += bytes.length
    if (this.#length > maxMessage) {
      throw new QmpError(`QMP: a message exceeds ${maxMessage} bytes without a line end; is this a QMP monitor?`)
    }
    this.#parts.push(bytes)
  }

  #take(): string {
    const whole = this.#parts.length === 1 ? this.#parts[0]! : concat(this.#parts)
    this.#parts = []
    this.#length = 0
    return new TextDecoder().decode(whole)
  }
}
