/**
 * The world a command sees: streams, environment, signals. Owns the interface, so that tests run
 * commands in their own process; `process.ts` fills it from the real one.
 */

/** Where text and bytes go. */
export interface Sink {
  /** Resolves when there is room for more text; of bytes, when they may be used again. */
  write(data: string | Uint8Array): Promise<void>
  readonly isTty: boolean
  /** Columns of a terminal; `undefined` elsewhere. */
  readonly columns: number | undefined
}

/** The streams and settings a command runs with. */
export interface Terminal {
  readonly stdin: AsyncIterable<Uint8Array>
  /** A path of the file that stdin is, where it is one (`< disk.raw`) and not a pipe. */
  readonly stdinFile?: string | undefined
  readonly stdout: Sink
  readonly stderr: Sink
  readonly env: Readonly<Record<string, string | undefined>>
  /** Aborted when the user interrupts. */
  readonly signal: AbortSignal
  /** What the program is called, in messages: `qcow2`, or `qemu-img` when started under that name. */
  readonly program: string
}

/** Colours for a sink, or none where `NO_COLOR` is set or nobody looks. */
export interface Palette {
  readonly bold: (text: string) => string
  readonly dim: (text: string) => string
  readonly red: (text: string) => string
  readonly green: (text: string) => string
  readonly yellow: (text: string) => string
  readonly blue: (text: string) => string
}

/** The palette that suits `sink`. */
export function paletteFor(terminal: Terminal, sink: Sink): Palette {
  const set = terminal.env['NO_COLOR']
  const on = sink.isTty && (set === undefined || set === '') && terminal.env['TERM'] !== 'dumb'
  const paint = (code: number) => (text: string): string => (on ? `\u001b[${code}m${text}\u001b[0m` : text)
  return { bold: paint(1), dim: paint(2), red: paint(31), green: paint(32), yellow: paint(33), blue: paint(34) }
}
