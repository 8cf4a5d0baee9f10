/**
 * From a command line to an exit code. Owns the choice of the command and how failures are told: one
 * line on stderr, never a stack unless `QCOW2_DEBUG` is set.
 */
import { commandNames, loadCommand, loadCommands } from './commands.ts'
import type { CommandDefinition, Context } from './command.ts'
import { ExitError, UsageError } from './errors.ts'
import { commandHelp, programHelp } from './help.ts'
import { LateSink, withStdout } from './late-sink.ts'
import { didYouMean } from './nearest.ts'
import { parse, type ParsedLine } from './parse.ts'
import { Interrupted } from './process.ts'
import { progressFor, type Progress, type ProgressStyle } from './progress.ts'
import { asQemuImg, isQemuImgCommand } from './qemu-img.ts'
import type { Terminal } from './terminal.ts'
import { version } from './version.ts'

/** Runs one command line (without the program's name). Resolves with the exit code; never rejects. */
export async function main(argv: readonly string[], terminal: Terminal): Promise<number> {
  if (terminal.program !== 'qemu-img' || terminal.stdout.isTty || !isQemuImgCommand(argv[0])) return runLine(argv, terminal)
  const late = new LateSink(terminal.stdout)
  const code = await runLine(argv, withStdout(terminal, late))
  await late.flush()
  return code
}

async function runLine(argv: readonly string[], terminal: Terminal): Promise<number> {
  try {
    const [first, ...rest] = argv
    if (first === undefined) throw new UsageError('a command is missing')
    if (first === '-h' || first === '--help' || first === 'help') return await help(rest, terminal)
    if (first === '-V' || first === '--version') {
      await terminal.stdout.write(`${terminal.program} version ${version}\n`)
      return 0
    }
    return await runCommand(await command(first), first, rest, terminal)
  } catch (error) {
    await report(error, terminal, '')
    return 1
  }
}

async function runCommand(definition: CommandDefinition, path: string, argv: readonly string[], terminal: Terminal): Promise<number> {
  const [word, ...rest] = argv
  if (definition.commands !== undefined && word !== undefined && !word.startsWith('-')) {
    return runCommand(below(definition, word, `${path} `), `${path} ${word}`, rest, terminal)
  }
  const session = new Session(terminal)
  try {
    const line = parse(definition, argv)
    if (line.help) {
      await terminal.stdout.write(`${commandHelp(terminal.program, path, definition)}\n`)
      return 0
    }
    if (definition.commands !== undefined) throw new UsageError('a command is missing')
    return await definition.run(session.context(line))
  } catch (error) {
    session.abandon()
    return await failure(error, definition, path, session)
  }
}

async function failure(error: unknown, definition: CommandDefinition, path: string, session: Session): Promise<number> {
  const { terminal } = session
  if (terminal.signal.aborted) {
    const note = session.left === undefined ? '' : `; ${session.left}`
    await terminal.stderr.write(`${terminal.program}: interrupted${note}\n`)
    return terminal.signal.reason instanceof Interrupted ? terminal.signal.reason.exitCode : 130
  }
  await report(error, terminal, path)
  if (error instanceof UsageError) return 1
  return definition.failure?.(error) ?? (error instanceof ExitError ? error.exitCode : 1)
}

/** One run of a command: what it told about itself. */
class Session {
  readonly terminal: Terminal
  /** What an interrupt leaves behind. */
  left: string | undefined
  #progress: Progress | undefined

  constructor(terminal: Terminal) {
    this.terminal = terminal
  }

  context(line: ParsedLine): Context {
    const { terminal } = this
    return {
      options: line.options as Context['options'],
      args: line.args,
      order: line.order,
      terminal,
      signal: terminal.signal,
      print: (text) => terminal.stdout.write(`${text}\n`),
      warn: (message) => void terminal.stderr.write(`${terminal.program}: warning: ${oneLine(message)}\n`),
      progress: () => (this.#progress = progressFor(terminal, progressStyle(line.options))),
      leaves: (note) => (this.left = note),
    }
  }

  abandon(): void {
    this.#progress?.abandon()
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
  const { program, stderr, env } = terminal
  const message = error instanceof Error ? error.message : String(error)
  if (message === '' && error instanceof ExitError) return
  const advice = error instanceof UsageError ? ` (see '${[program, path, '--help'].filter((word) => word !== '').join(' ')}')` : ''
  await stderr.write(`${program === 'qemu-img' ? asQemuImg(path, message) : `${program}: ${oneLine(message)}${advice}`}\n`)
  const debug = env['QCOW2_DEBUG']
  if (debug !== undefined && debug !== '' && error instanceof Error) await stderr.write(`${error.stack ?? ''}\n`)
}

function oneLine(message: string): string {
  return message.replace(/\s*\n\s*/g, '; ')
}
