/**
 * A command line into options and arguments, with the habits of GNU getopt: clustered letters,
 * `-fqcow2`, `--output=json`, unique prefixes of long names, options after arguments, `--`. Owns the
 * grammar; knows nothing of what the options mean.
 */
import type { CommandDefinition, OptionDefinition, ParsedLine } from './command.ts'
import { UsageError } from './errors.ts'
import { didYouMean } from './nearest.ts'

/**
 * Parses what follows the command's name.
 * @throws UsageError in the user's words, with the nearest correct word
 */
export function parse(definition: CommandDefinition, argv: readonly string[]): ParsedLine {
  const line = new Line(definition)
  const words = [...argv]
  const last = definition.signedLast === true && /^-\d/.test(words.at(-1) ?? '') ? words.pop() : undefined
  while (words.length > 0) {
    const word = words.shift()!
    if (word === '--') line.args.push(...words.splice(0))
    else if (word.startsWith('--')) line.long(word.slice(2), words)
    else if (word.startsWith('-') && word !== '-') line.short(word.slice(1), words)
    else {
      line.args.push(word)
      if (definition.passThrough === true) line.args.push(...words.splice(0))
    }
  }
  if (last !== undefined) line.args.push(last)
  if (!line.help) checkCount(definition, line.args)
  return { options: line.values(), args: line.args, order: line.order, help: line.help }
}

class Line {
  readonly args: string[] = []
  readonly order: { option: string; value: string | undefined }[] = []
  help = false
  readonly #definition: CommandDefinition
  readonly #given = new Map<string, (string | true)[]>()

  constructor(definition: CommandDefinition) {
    this.#definition = definition
  }

  /** `name` or `name=value`, without the dashes. */
  long(word: string, rest: string[]): void {
    const equals = word.indexOf('=')
    const name = this.#longName(equals < 0 ? word : word.slice(0, equals))
    const inline = equals < 0 ? undefined : word.slice(equals + 1)
    if (name === 'help') {
      this.help = true
      return
    }
    const option = this.#definition.options[name]!
    if (option.value === undefined) {
      if (inline !== undefined) throw new UsageError(`option '--${name}' takes no value`)
      this.#add(name, true)
    } else if (option.optional === true) this.#add(name, inline ?? true)
    else this.#add(name, inline ?? this.#value(`--${name}`, rest))
  }

  /** A cluster of letters, the last of which may take a value. */
  short(letters: string, rest: string[]): void {
    for (let at = 0; at < letters.length; at++) {
      const letter = letters[at]!
      if (letter === 'h') {
        this.help = true
        continue
      }
      const found = Object.entries(this.#definition.options).find(([, option]) => option.short === letter)
      if (found === undefined) throw new UsageError(`unknown option '-${letter}'${this.#hint(letters)}`)
      const [name, option] = found
      if (option.value === undefined || option.optional === true) {
        this.#add(name, true)
        continue
      }
      const inline = letters.slice(at + 1)
      this.#add(name, inline === '' ? this.#value(`-${letter}`, rest) : inline)
      return
    }
  }

  values(): Record<string, string | boolean | readonly string[] | undefined> {
    const values: Record<string, string | boolean | readonly string[] | undefined> = {}
    for (const [name, option] of Object.entries(this.#definition.options)) {
      const given = this.#given.get(name)
      if (option.many === true) values[name] = (given ?? []) as string[]
      else if (option.value === undefined) values[name] = given !== undefined
      else values[name] = given?.at(-1)
    }
    return values
  }

  #add(name: string, value: string | true): void {
    const { choices } = this.#definition.options[name]!
    if (typeof value === 'string' && choices !== undefined && !choices.includes(value)) {
      const allowed = choices.map((choice) => `'${choice}'`).join(' or ')
      throw new UsageError(`--${name} expects ${allowed}, not '${value}'${didYouMean(value, choices)}`)
    }
    const values = this.#given.get(name)
    if (values === undefined) this.#given.set(name, [value])
    else values.push(value)
    this.order.push({ option: name, value: value === true ? undefined : value })
  }

  #value(option: string, rest: string[]): string {
    const value = rest.shift()
    if (value === undefined) throw new UsageError(`option '${option}' needs a value`)
    return value
  }

  /** The key of a long name, of an alias, or of a prefix that only one has. */
  #longName(given: string): string {
    const names = new Map<string, string>([['help', 'help']])
    for (const [name, option] of Object.entries(this.#definition.options)) {
      for (const word of [name, ...(option.aliases ?? [])]) names.set(word, name)
    }
    const exact = names.get(given)
    if (exact !== undefined) return exact
    const keys = new Set([...names].filter(([word]) => given !== '' && word.startsWith(given)).map(([, name]) => name))
    if (keys.size === 1) return [...keys][0]!
    if (keys.size > 1) throw new UsageError(`option '--${given}' could be ${[...keys].map((name) => `'--${name}'`).join(' or ')}`)
    throw new UsageError(`unknown option '--${given}'${didYouMean(given, [...names.keys()], '--')}`)
  }

  /** `-foo` was perhaps meant as `--foo`. */
  #hint(letters: string): string {
    return letters.length > 1 ? didYouMean(letters, Object.keys(this.#definition.options), '--') : ''
  }
}

function checkCount(definition: CommandDefinition, args: readonly string[]): void {
  const required = definition.arguments.filter((argument) => argument.optional !== true)
  if (args.length < required.length) throw new UsageError(`${required[args.length]!.name} is missing`)
  const open = definition.arguments.some((argument) => argument.many === true)
  if (!open && args.length > definition.arguments.length) {
    throw new UsageError(`unexpected argument '${args[definition.arguments.length]!}'`)
  }
}

/** How an option is written in usage lines and listings: `-f, --format FMT`. */
export function spelling(name: string, option: OptionDefinition): string {
  const value = option.value === undefined ? '' : option.optional === true ? `[=${option.value}]` : ` ${option.value}`
  return `${option.short === undefined ? '' : `-${option.short}, `}--${name}${value}`
}
