/**
 * From a command line to an exit code. Owns the choice of the command and how failures are told: one
 * line on stderr, never a stack unless `QCOW2_DEBUG` is set.
 */
import { commandNames, loadCommand, loadCommands } from './commands.ts'
import type { CommandDefinition, Context, ParsedLine } from './command.ts'
import { ExitError, UsageError, WriteError } from './errors.ts'
import { commandHelp, programHelp } from './help.ts'
import { LateSink, withStdout } from './late-sink.ts'
import { didYouMean } from './nearest.ts'
import { parse } from './parse.ts'
import { Interrupted } from './process.ts'
import { progressFor, type Progress, type ProgressStyle } from './progress.ts'
import { asQemuImg, isQemuImgCommand } from './qemu-img.ts'
import { isStdout, say, writeLine, type Terminal } from './terminal.ts'
import { version } from './version.ts'

/** Runs one command line (without the program's name). Resolves with the exit code; never rejects. */
export async function main(argv: readonly string[], terminal: Terminal): Promise<number> {
  const isLate = terminal.program === 'qemu-img' && !terminal.stdout.isTty && isQemuImgCommand(argv[0])
  const late = isLate ? new LateSink(terminal.stdout) : undefined
  const code = await runLine(argv, late === undefined ? terminal : withStdout(terminal, late))
  await late?.flush().catch(() => undefined)
  return code === 0 ? unwritten(terminal) : code
}

/** What was lost on its way to stdout while nobody waited for it. */
async function unwritten(terminal: Terminal): Promise<number> {
  const { failure } = terminal.stdout
  if (failure === undefined) return 0
  await report(failure, terminal, '')
  return failure.exitCode
}

async function runLine(argv: readonly string[], terminal: Terminal): Promise<number> {
  try {
    const [first, ...rest] = argv
    if (first === undefined) return await nothingAsked(terminal)
    if (first === '-h' || first === '--help' || first === 'help') return await help(rest, terminal)
    if (first === '-V' || first === '--version') {
      await terminal.stdout.write(`${terminal.program} version ${version}\n`)
      return 0
    }
    return await runCommand(await command(first), first, rest, terminal)
  } catch (error) {
    await report(error, terminal, '')
    return error instanceof WriteError ? error.exitCode : 1
  }
}

async function nothingAsked(terminal: Terminal): Promise<number> {
  const text = terminal.program === 'qemu-img' ? "qemu-img: Not enough arguments\nTry 'qemu-img --help' for more info" : programHelp(terminal.program, await loadCommands())
  await terminal.stderr.write(`${text}\n`)
  return 1
}

async function runCommand(definition: CommandDefinition, path: string, argv: readonly string[], terminal: Terminal): Promise<number> {
  const [word, ...rest] = argv
  const session = new Session(terminal)
  try {
    if (definition.commands !== undefined && word !== undefined && !word.startsWith('-')) {
      return await runCommand(below(definition, word, `${path} `), `${path} ${word}`, rest, terminal)
    }
    const line = parse(definition, argv)
    if (line.help) {
      await terminal.stdout.write(`${commandHelp(terminal.program, path, definition)}\n`)
      return 0
    }
    if (definition.commands !== undefined) throw new UsageError('a command is missing')
    return await session.untilDeaf(definition.run(session.context(definition, line)))
  } catch (error) {
    session.abandon()
    return await failure(error, definition, path, session)
  }
}

async function failure(error: unknown, definition: CommandDefinition, path: string, session: Session): Promise<number> {
  const { terminal } = session
  if (terminal.signal.aborted) {
    const reason: unknown = terminal.signal.reason
    const note = session.left === undefined ? '' : `; ${session.left}`
    if (!(reason instanceof Interrupted && reason.isSilent)) await say(terminal, `${terminal.program}: interrupted${note}`)
    return reason instanceof Interrupted ? reason.exitCode : 130
  }
  await report(error, terminal, path)
  if (error instanceof UsageError) return 1
  return definition.failure?.(error) ?? (error instanceof ExitError ? error.exitCode : 1)
}

/** What a command that has begun nothing gets to end by itself, once it is told to; in milliseconds. */
const grace = 1000

/** One run of a command: what it told about itself. */
class Session {
  readonly terminal: Terminal
  /** What an interrupt leaves behind. */
  left: string | undefined
  /** The command has begun what it has to end by itself. */
  #begun = false
  #progress: Progress | undefined

  constructor(terminal: Terminal) {
    this.terminal = terminal
  }

  context(definition: CommandDefinition, line: ParsedLine): Context {
    const { terminal } = this
    const { stdout, stderr, program } = terminal
    const target = definition.payload?.(line.args)
    const words = target !== undefined && isStdout(target, terminal) ? stderr : stdout
    return {
      options: line.options as Context['options'],
      args: line.args,
      order: line.order,
      terminal,
      signal: terminal.signal,
      print: (text) => writeLine(words, text),
      warn: (message) => void say(terminal, `${program}: warning: ${oneLine(message)}`),
      progress: () => (this.#progress = progressFor(terminal, progressStyle(line.options), { words })),
      as: (other, otherLine) => this.context(other, otherLine),
      leaves: (note) => {
        this.#begun = true
        this.left = note
      },
    }
  }

  abandon(): void {
    this.#progress?.abandon()
  }

  /** The outcome of a run. One that has nothing to end by itself, and waits for something that does not hear the signal, is left. */
  untilDeaf(run: Promise<number>): Promise<number> {
    const { signal } = this.terminal
    return new Promise((resolve, reject) => {
      let timer: NodeJS.Timeout | undefined
      const onAbort = (): void => {
        timer = setTimeout(() => {
          if (!this.#begun) reject(signal.reason as Error)
        }, grace)
      }
      const end = (): void => {
        clearTimeout(timer)
        signal.removeEventListener('abort', onAbort)
      }
      if (signal.aborted) onAbort()
      else signal.addEventListener('abort', onAbort, { once: true })
      run.then(resolve, reject).finally(end)
    })
  }
}

function progressStyle(options: ParsedLine['options']): ProgressStyle {
  const asked = options['progress']
  if (options['quiet'] === true || asked === undefined || asked === false) return 'none'
  return asked === 'json' ? 'json' : 'human'
}

async function help(words: readonly string[], terminal: Terminal): Promise<number> {
  const [first, ...rest] = words
  let definition = first === undefined ? undefined : await command(first)
  for (const word of rest) definition = below(definition!, word, '')
  const text = definition === undefined ? programHelp(terminal.program, await loadCommands()) : commandHelp(terminal.program, words.join(' '), definition)
  await terminal.stdout.write(`${text}\n`)
  return 0
}

async function command(word: string): Promise<CommandDefinition> {
  return (await loadCommand(word)) ?? notFound(word, commandNames, '')
}

function below(definition: CommandDefinition, word: string, above: string): CommandDefinition {
  const among = definition.commands ?? []
  return among.find(({ name }) => name === word) ?? notFound(word, among.map(({ name }) => name), above)
}

function notFound(word: string, names: readonly string[], above: string): never {
  if (word.startsWith('-')) throw new UsageError(`unknown option '${word}' before the command`)
  throw new UsageError(`Command not found: ${above}${word}${didYouMean(word, names)}`)
}

async function report(error: unknown, terminal: Terminal, path: string): Promise<void> {
  const { program, env } = terminal
  const message = error instanceof Error ? error.message : String(error)
  if (message === '' && error instanceof ExitError) return
  // whoever has left needs no word
  if (error instanceof WriteError && error.code === 'EPIPE') return
  const advice = error instanceof UsageError ? ` (see '${[program, path, '--help'].filter((word) => word !== '').join(' ')}')` : ''
  await say(terminal, program === 'qemu-img' ? asQemuImg(path, message) : `${program}: ${oneLine(message)}${advice}`)
  const debug = env['QCOW2_DEBUG']
  if (debug !== undefined && debug !== '' && error instanceof Error) await say(terminal, error.stack ?? '')
}

function oneLine(message: string): string {
  return message.replace(/:?\s*\n\s*/g, (lineEnd) => (lineEnd.startsWith(':') ? ': ' : '; '))
}
