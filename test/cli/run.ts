/** Runs a command line in this process and gathers what it prints. */
import { main } from '../../src/cli/main.ts'
import type { Sink, Terminal } from '../../src/cli/terminal.ts'

export interface RunResult {
  code: number
  stdout: string
  stderr: string
  /** stdout as it came. */
  bytes: Uint8Array
}

export interface RunOptions {
  tty?: boolean
  env?: Record<string, string>
  stdin?: AsyncIterable<Uint8Array>
  signal?: AbortSignal
  program?: string
}

class Gathered implements Sink {
  readonly parts: Uint8Array[] = []
  readonly isTty: boolean
  readonly columns: number | undefined

  constructor(tty: boolean) {
    this.isTty = tty
    this.columns = tty ? 80 : undefined
  }

  write(data: string | Uint8Array): Promise<void> {
    this.parts.push(typeof data === 'string' ? Buffer.from(data) : data.slice())
    return Promise.resolve()
  }

  get bytes(): Buffer {
    return Buffer.concat(this.parts)
  }
}

async function* nothing(): AsyncGenerator<Uint8Array, void, undefined> {
  // an empty stdin
}

export function terminal(options: RunOptions = {}): Terminal & { stdout: Gathered; stderr: Gathered } {
  return {
    stdin: options.stdin ?? nothing(),
    stdout: new Gathered(options.tty ?? false),
    stderr: new Gathered(options.tty ?? false),
    env: options.env ?? {},
    signal: options.signal ?? new AbortController().signal,
    program: options.program ?? 'qcow2',
  }
}

/** Runs `argv` (or a line without quotes, cut at spaces). */
export async function run(argv: readonly string[] | string, options: RunOptions = {}): Promise<RunResult> {
  const ours = terminal(options)
  const code = await main(typeof argv === 'string' ? argv.split(' ').filter((word) => word !== '') : argv, ours)
  return { code, stdout: ours.stdout.bytes.toString(), stderr: ours.stderr.bytes.toString(), bytes: ours.stdout.bytes }
}
