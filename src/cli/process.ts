/** The real terminal: this process's streams and signals. */
import { fstatSync } from 'node:fs'
import { basename } from 'node:path'
import process from 'node:process'
import type { Sink, Terminal } from './terminal.ts'

/** A reader of our output that has gone is no error: the shell's own code for it. */
const brokenPipe = 141

/** `timeout` and some shells send a signal to the process and to its group: two, at once, are one. */
const sameSignal = 200

/** The terminal of this process. SIGINT and SIGTERM abort its signal once; a later one ends the process. */
export function processTerminal(): Terminal {
  const interrupt = new AbortController()
  let first = 0
  for (const name of ['SIGINT', 'SIGTERM'] as const) {
    process.on(name, () => {
      if (!interrupt.signal.aborted) {
        first = performance.now()
        interrupt.abort(new Interrupted(name))
      } else if (performance.now() - first > sameSignal) process.exit(name === 'SIGINT' ? 130 : 143)
    })
  }
  const called = basename(process.argv[1] ?? '')
  return {
    get stdin() {
      return process.stdin
    },
    get stdinFile() {
      return stdinIsFile() ? '/dev/stdin' : undefined
    },
    stdout: sinkOf(process.stdout),
    stderr: sinkOf(process.stderr),
    env: process.env,
    signal: interrupt.signal,
    program: called === 'qemu-img' ? called : 'qcow2',
  }
}

/** The reason of an interrupt. */
export class Interrupted extends Error {
  /** As a shell gives it: 128 and the signal's number. */
  readonly exitCode: number

  constructor(name: 'SIGINT' | 'SIGTERM') {
    super('interrupted')
    this.exitCode = name === 'SIGINT' ? 130 : 143
  }
}

function stdinIsFile(): boolean {
  try {
    return fstatSync(0).isFile()
  } catch {
    return false
  }
}

function sinkOf(stream: NodeJS.WriteStream): Sink {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(brokenPipe)
    throw error
  })
  return {
    write: (data) =>
      new Promise((resolve) => {
        if (typeof data !== 'string') stream.write(data, () => resolve())
        else if (stream.write(data)) resolve()
        else stream.once('drain', resolve)
      }),
    get isTty() {
      return stream.isTTY
    },
    get columns() {
      return stream.isTTY ? stream.columns : undefined
    },
  }
}
