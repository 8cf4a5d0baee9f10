/** The real terminal: this process's streams and signals. */
import { fstatSync, readFileSync, statSync } from 'node:fs'
import { basename } from 'node:path'
import process from 'node:process'
import { isatty } from 'node:tty'
import { decodeName, encodeName, hasEscapedBytes } from '../bytes/file-name.ts'
import { askSecret } from './ask-secret.ts'
import { WriteError } from './errors.ts'
import { onQuery } from './query.ts'
import type { Sink, Terminal } from './terminal.ts'

/** Signals that ask for an end, and the exit codes of shells for them: 128 and the signal's number. */
const endings = { SIGHUP: 129, SIGINT: 130, SIGTERM: 143 } as const
const endingNames = Object.keys(endings) as (keyof typeof endings)[]

/** `timeout` and some shells send a signal to the process and to its group: two, at once, are one. */
const sameSignal = 200

/** The terminal of this process. SIGINT, SIGTERM and SIGHUP abort its signal once; a later one ends the process. */
export function processTerminal(): Terminal {
  const interrupt = new AbortController()
  let first = 0
  for (const name of endingNames) {
    process.on(name, () => {
      if (!interrupt.signal.aborted) {
        first = performance.now()
        interrupt.abort(new Interrupted(name))
      } else if (performance.now() - first > sameSignal) leave(endings[name])
    })
  }
  const called = basename(process.argv[1] ?? '')
  const program = called === 'qemu-img' ? called : 'qcow2'
  // qemu-img does not look whether its words arrive
  const mayLoseText = program === 'qemu-img'
  const onBroken = (): void => interrupt.abort(new Interrupted('SIGPIPE'))
  const stderr = sinkOf(process.stderr, { mayLoseText, onBroken })
  const { signal } = interrupt
  return {
    get stdin() {
      return process.stdin
    },
    get stdinFile() {
      return stdinIsFile() ? '/dev/stdin' : undefined
    },
    stdout: sinkOf(process.stdout, { mayLoseText, onBroken }),
    stderr,
    get askSecret() {
      if (!isatty(0) || !stderr.isTty) return undefined
      const interruptSelf = (): void => void process.kill(process.pid, 'SIGINT')
      return (question: string) => askSecret(question, { input: process.stdin, output: stderr, signal, interrupt: interruptSelf })
    },
    env: process.env,
    signal,
    onQuery,
    isStdout,
    program,
  }
}

/** Ends the process. What still waits has no part in it, and if that keeps the process from ending, the next signal does not. */
export function leave(code: number): never {
  for (const name of endingNames) process.removeAllListeners(name)
  process.exit(code)
}

/** The reason of an interrupt. */
export class Interrupted extends Error {
  /** As a shell gives it: 128 and the signal's number. */
  readonly exitCode: number
  /** A reader that has gone knows why. */
  readonly isSilent: boolean

  constructor(name: keyof typeof endings | 'SIGPIPE') {
    super('interrupted')
    this.exitCode = { ...endings, SIGPIPE: 141 }[name]
    this.isSilent = name === 'SIGPIPE'
  }
}

function stdinIsFile(): boolean {
  try {
    return fstatSync(0).isFile()
  } catch {
    return false
  }
}

/** Device and inode say it: the name may be any that leads there. */
function isStdout(path: string): boolean {
  try {
    const [stdout, named] = [fstatSync(1, { bigint: true }), statSync(path, { bigint: true })]
    return !stdout.isCharacterDevice() && stdout.dev === named.dev && stdout.ino === named.ino
  } catch {
    return false
  }
}

interface SinkOptions {
  /** Text that cannot be written is no failure. */
  readonly mayLoseText: boolean
  /** Called when the reader has gone. */
  readonly onBroken: () => void
}

function sinkOf(stream: NodeJS.WriteStream, { mayLoseText, onBroken }: SinkOptions): Sink {
  let failure: WriteError | undefined
  // each write is told of its own failure
  stream.on('error', () => undefined)
  return {
    write: (data) =>
      new Promise((resolve, reject) => {
        stream.write(typeof data === 'string' && hasEscapedBytes(data) ? encodeName(data) : data, (error?: NodeJS.ErrnoException | null) => {
          if (error === undefined || error === null || (mayLoseText && typeof data === 'string')) {
            resolve()
            return
          }
          failure ??= new WriteError(error)
          if (failure.code === 'EPIPE') onBroken()
          reject(failure)
        })
      }),
    get failure() {
      return failure
    },
    get isTty() {
      return stream.isTTY
    },
    get columns() {
      return stream.isTTY ? stream.columns : undefined
    },
  }
}

/** The words of the command line. Node shows bytes that are no UTF-8 as U+FFFD; Linux tells what they were. */
export function commandLine(): string[] {
  const words = process.argv.slice(2)
  if (!words.some((word) => word.includes('\ufffd'))) return words
  try {
    const all = decodeEach(readFileSync('/proc/self/cmdline'))
    return words.length === 0 ? [] : all.slice(-words.length)
  } catch {
    return words
  }
}

function decodeEach(list: Buffer): string[] {
  const words: string[] = []
  for (let at = 0; at < list.length; ) {
    const end = list.indexOf(0, at)
    words.push(decodeName(list.subarray(at, end < 0 ? list.length : end)))
    at = end < 0 ? list.length : end + 1
  }
  return words
}
