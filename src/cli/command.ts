/**
 * What a command is: one definition from which its parsing, `--help`, the reference page and the
 * shell completions are all made. Owns the shape; each command lives in `commands/NAME.ts`.
 */
import type { BlockDevice } from '../block/device.ts'
import type { Terminal } from './terminal.ts'
import type { Progress } from './progress.ts'

/** One option. Its long name is its key in {@link CommandDefinition.options}. */
export interface OptionDefinition {
  /** The one-letter form. */
  readonly short?: string
  /** Other long names, accepted but not listed. */
  readonly aliases?: readonly string[]
  /** What stands for the value in help; an option without it is a flag. */
  readonly value?: string
  /** The value may be missing, and is given only as `--name=VALUE`. */
  readonly optional?: true
  /** May be given several times; the values are gathered. */
  readonly many?: true
  /** The only values allowed. */
  readonly choices?: readonly string[]
  /** For completions: the value names a file. */
  readonly file?: true
  readonly help: string
}

/** One positional argument. */
export interface ArgumentDefinition {
  /** As help shows it, in capitals. */
  readonly name: string
  readonly optional?: true
  /** Takes all that are left; at least one unless optional. */
  readonly many?: true
  /** For completions: it names no file. */
  readonly word?: true
  readonly help: string
}

/** A command line that shows a command at work. */
export interface Example {
  readonly line: string
  readonly shows: string
}

/** Options by long name. */
export type OptionDefinitions = Readonly<Record<string, OptionDefinition>>

/** The value each option has after parsing. */
export type OptionValues<O extends OptionDefinitions> = {
  readonly [K in keyof O]: O[K] extends { many: true }
    ? readonly string[]
    : O[K] extends { optional: true }
      ? string | true | undefined
      : O[K] extends { value: string }
        ? string | undefined
        : boolean
}

/** A parsed command line. */
export interface ParsedLine {
  readonly options: Record<string, string | boolean | readonly string[] | undefined>
  readonly args: readonly string[]
  readonly order: readonly { option: string; value: string | undefined }[]
  /** `-h` or `--help` was given. */
  readonly help: boolean
}

/** What a command works with. */
export interface Context<O extends OptionDefinitions = OptionDefinitions> {
  readonly options: OptionValues<O>
  /** The positional arguments, as many as the definition allows. */
  readonly args: readonly string[]
  /** The option keys in the order the user gave them, one for each time. */
  readonly order: readonly { readonly option: keyof O & string; readonly value: string | undefined }[]
  readonly terminal: Terminal
  /** Aborted by SIGINT, SIGTERM and SIGHUP. */
  readonly signal: AbortSignal
  /** Writes a line to stdout; to stderr while stdout takes the command's {@link CommandDefinition.payload}. */
  readonly print: (line: string) => Promise<void>
  /** Writes a warning to stderr, on one line. */
  readonly warn: (message: string) => void
  /** A progress display as the command's `progress` option asks for it. */
  readonly progress: () => Progress
  /** Put around the bytes of every image file: how `trace` sees what a command does. */
  readonly wrapDevice?: ((device: BlockDevice, name: string) => BlockDevice) | undefined
  /** The same run as another command sees it. */
  readonly as: (definition: CommandDefinition, line: ParsedLine) => Context
  /** Says what is left behind if the user interrupts now; the last one said is shown. */
  readonly leaves: (note: string | undefined) => void
}

/** One command of the program. */
export interface CommandDefinition<O extends OptionDefinitions = OptionDefinitions> {
  readonly name: string
  /** One line for the list of commands. */
  readonly summary: string
  /** Paragraphs for help, each on one line. */
  readonly description?: readonly string[]
  readonly options: O
  readonly arguments: readonly ArgumentDefinition[]
  /** Commands below this one, as in `vmstate ls`; a command has these or `run`. */
  readonly commands?: readonly CommandDefinition[]
  readonly examples: readonly Example[]
  /** Exit codes beside 0 and 1. */
  readonly exitCodes?: Readonly<Record<number, string>>
  /** The exit code of a failure other than wrong usage; default 1, or what an `ExitError` says. */
  readonly failure?: (error: unknown) => number | undefined
  /** Of the arguments, the name of what takes the bytes of an image; words go elsewhere where that is stdout. */
  readonly payload?: (args: readonly string[]) => string | undefined
  /** A last argument that begins with `-` and a digit is a value, not an option (as in `resize`). */
  readonly signedLast?: true
  /** Everything from the first argument on is taken as it is: the options of another command. */
  readonly passThrough?: true
  readonly run: (context: Context<O>) => Promise<number>
}

/** Keeps the types of the options for `run`, then forgets them. */
export function command<const O extends OptionDefinitions>(definition: CommandDefinition<O>): CommandDefinition {
  return definition as unknown as CommandDefinition
}

/** A command that only holds others. */
export function group(definition: Omit<CommandDefinition, 'run' | 'options' | 'arguments'>): CommandDefinition {
  return { ...definition, options: {}, arguments: [], run: () => Promise.resolve(1) }
}
