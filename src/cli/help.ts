/** `--help`: the list of commands, and the page of each. Owns the layout; every word is the definitions'. */
import type { CommandDefinition } from './command.ts'
import { spelling } from './parse.ts'

/** What the program says of itself without a command. */
export function programHelp(program: string, commands: readonly CommandDefinition[]): string {
  return [
    `Usage: ${program} COMMAND [options] ...`,
    '',
    'qcow2 disk images and the VM snapshots inside them.',
    '',
    'Commands:',
    ...columns(commands.map(({ name, summary }) => [name, summary])),
    '',
    'Everywhere:',
    ...columns([
      ['-h, --help', 'show help, of the program or of a command'],
      ['-V, --version', 'show the version'],
      ['IMAGE@SNAPSHOT', 'the disk of an internal snapshot, wherever an image is only read'],
    ]),
    '',
    `See '${program} COMMAND --help' for a command's options and examples.`,
  ].join('\n')
}

/** The page of one command; `path` is its name with those above it. */
export function commandHelp(program: string, path: string, definition: CommandDefinition): string {
  const lines = [`Usage: ${usage(program, path, definition)}`, '', `${definition.summary}.`]
  for (const paragraph of definition.description ?? []) lines.push('', ...wrap(paragraph, 78))
  if (definition.commands !== undefined) {
    lines.push('', 'Commands:', ...columns(definition.commands.map(({ name, summary }) => [name, summary])))
  }
  if (definition.arguments.length > 0) {
    lines.push('', 'Arguments:', ...columns(definition.arguments.map(({ name, help }) => [name, help])))
  }
  const options = Object.entries(definition.options).map(([name, option]): [string, string] => [spelling(name, option), option.help])
  lines.push('', 'Options:', ...columns([...options, ['-h, --help', 'show this help']]))
  if (definition.exitCodes !== undefined) {
    lines.push('', 'Exit codes:', ...columns(Object.entries({ 0: 'success', 1: 'failure', ...definition.exitCodes })))
  }
  if (definition.examples.length > 0) {
    lines.push('', 'Examples:', ...definition.examples.flatMap(({ line, shows }) => [`  # ${shows}`, `  ${line}`]))
  }
  return lines.join('\n')
}

/** `qcow2 info [options] FILENAME`. */
export function usage(program: string, path: string, definition: CommandDefinition): string {
  const args = definition.arguments.map(({ name, optional, many }) => {
    const shown = many === true ? `${name}...` : name
    return optional === true ? `[${shown}]` : shown
  })
  return [program, path, definition.commands === undefined ? '[options]' : 'COMMAND', ...args].join(' ')
}

function columns(rows: readonly (readonly [string, string])[]): string[] {
  const width = Math.min(30, Math.max(...rows.map(([left]) => left.length)))
  return rows.flatMap(([left, right]) => {
    const [first = '', ...more] = wrap(right, 78 - width - 4)
    const indent = ' '.repeat(width + 4)
    const rest = more.map((line) => indent + line)
    if (left.length > width) return [`  ${left}`, indent + first, ...rest]
    return [`  ${left.padEnd(width)}  ${first}`, ...rest]
  })
}

/** Lines of at most `width` characters, cut at spaces. */
export function wrap(text: string, width: number): string[] {
  const lines: string[] = []
  let line = ''
  for (const word of text.split(' ')) {
    if (line !== '' && line.length + 1 + word.length > width) {
      lines.push(line)
      line = word
    } else line = line === '' ? word : `${line} ${word}`
  }
  return [...lines, line]
}
