/**
 * The world a command sees: streams, environment, signals. Owns the interface, so that tests run
 * commands in their own process; `process.ts` fills it from the real one.
 */
import type { WriteError } from './errors.ts'

/** Where text and bytes go. */
export interface Sink {
  /** Resolves when the system has taken it: bytes may be used again. @throws WriteError */
  write(data: string | Uint8Array): Promise<void>
  /** Sends on what was kept back. */
  flush?(): Promise<void>
  /** The first text or bytes that could not be written. */
  readonly failure?: WriteError | undefined
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
  /** Asks whoever sits there for a secret, which is not shown; undefined where nobody does. */
  readonly askSecret?: ((question: string) => Promise<Uint8Array>) | undefined
  readonly env: Readonly<Record<string, string | undefined>>
  /** Aborted when the user interrupts. */
  readonly signal: AbortSignal
  /** From now on `listener` is called whenever somebody asks how far the work is (SIGUSR1); it replaces the one before. */
  readonly onQuery?: (listener: () => void) => void
  /** True for the name of the file or pipe that stdout is, such as `/dev/stdout`. */
  readonly isStdout?: (path: string) => boolean
  /** What the program is called, in messages: `qcow2`, or `qemu-img` when started under that name. */
  readonly program: string
}

/** Words that nobody has to read: where they cannot be written nothing fails. */
export function tell(sink: Sink, text: string): void {
  void sink.write(text).catch(() => undefined)
}

/** A line for whoever looks at `sink`. @throws WriteError */
export function writeLine(sink: Sink, line: string): Promise<void> {
  return sink.write(`${sink.isTty ? visible(line) : line}\n`)
}

/** A line on stderr: there is nowhere to tell that it could not be written. */
export function say({ stderr }: Pick<Terminal, 'stderr'>, line: string): Promise<void> {
  return writeLine(stderr, line).catch(() => undefined)
}

/** True for a name that leads to stdout: `-`, or the name of what it is, such as `/dev/stdout`. */
export function isStdout(name: string, terminal: Terminal): boolean {
  return name === '-' || terminal.isStdout?.(name) === true
}

/** Text as a terminal may have it: control characters are shown and do nothing, whoever chose the names in it. JSON stays JSON. */
export function visible(text: string): string {
  // the last two ranges turn the direction of text
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`)
}

/** A name as `sink` may have it: on a terminal it stays on its line. Programs get it as it is. */
export function nameFor(sink: Sink): (name: string) => string {
  return sink.isTty ? (name) => visible(name).replaceAll('\n', '\\n') : (name) => name
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
