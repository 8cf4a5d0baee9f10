/** Text for a pipe that comes out at the end of the program, or when it is much: so C programs print, behind what they tell on stderr meanwhile. */
import type { WriteError } from './errors.ts'
import type { Sink, Terminal } from './terminal.ts'

/** What is kept before it goes out, in characters. */
const kept = 4096

/** A sink whose text waits for `flush`. Bytes do not wait. */
export class LateSink implements Sink {
  readonly isTty = false
  readonly columns: undefined
  readonly #sink: Sink
  #text = ''

  constructor(sink: Sink) {
    this.#sink = sink
  }

  get failure(): WriteError | undefined {
    return this.#sink.failure
  }

  async write(data: string | Uint8Array): Promise<void> {
    if (typeof data === 'string') this.#text += data
    if (typeof data !== 'string' || this.#text.length >= kept) await this.flush()
    if (typeof data !== 'string') await this.#sink.write(data)
  }

  async flush(): Promise<void> {
    const text = this.#text
    this.#text = ''
    if (text !== '') await this.#sink.write(text)
  }
}

/** The terminal with its stdout behind `late`. */
export function withStdout(terminal: Terminal, late: Sink): Terminal {
  // the streams that are not asked for stay untouched
  return Object.create(terminal, { stdout: { value: late } }) as Terminal
}
