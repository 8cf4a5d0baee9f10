/** `docs/cli.md`: the same definitions as `--help`, as one page. */
import type { CommandDefinition } from './command.ts'
import { usage } from './help.ts'
import { spelling } from './parse.ts'

/** The whole page. */
export function reference(commands: readonly CommandDefinition[]): string {
  const all = commands.flatMap((definition) => withNested(definition))
  const lines = [
    '---\ntitle: Command line\n---\n',
    '# Command line',
    '',
    '<!-- Made from the definitions in src/cli/commands by `npx tsx src/cli/write-reference.ts`; do not edit. -->',
    '',
    '`qcow2` has the words, flags, output and exit codes of `qemu-img` 10.0, so that a script can put it in its place, and new words for what is new.',
    'Sizes take the suffixes `b K M G T P E` (powers of 1024). Errors are one line on stderr; set `QCOW2_DEBUG=1` to see where they come from.',
    '`IMAGE@SNAPSHOT` is the disk of an internal snapshot wherever an image is only read. `NO_COLOR` turns colours off.',
    '',
    ...all.map(({ path, definition }) => `- [${path}](#${path.replaceAll(' ', '-')}): ${definition.summary.charAt(0).toLowerCase()}${definition.summary.slice(1)}`),
    ...all.flatMap(({ path, definition }) => section(path, definition)),
    ...differences,
  ]
  return `${lines.join('\n')}\n`
}

/** What a script written for qemu-img meets here otherwise. */
const differences = [
  '',
  '## Differs from qemu-img',
  '',
  "Started under the name `qemu-img` (a link to `dist/cli.js`), messages have several lines where qemu-img's have, and no advice behind them.",
  '',
  '| | here |',
  '| --- | --- |',
  '| `bench` | not there |',
  '| `dd` | zeroes take no space in the new image; `count` with `skip` copies `count` blocks, as the manual of qemu-img says; qemu-img 10.0 copies `skip` fewer |',
  '| `convert --salvage` | one warning for each range that cannot be read, not for each sector |',
  '| formats | qcow2 and raw; others are unknown drivers |',
  '| protocols and filters | files, NBD, HTTP, `null-co`, and `raw` with `offset` and `size`; no `blkdebug`, `quorum`, `throttle`, `ssh`, `fuse` |',
  '| `-o extent_size_hint`, `nocow` | accepted, without effect |',
  '| `encrypt.*` with `amend` | unknown options |',
  '| `-o help` | the same names and types, in other words |',
  '| sizes of 2^53 bytes and more | refused |',
  '| `check` | lost and leaked counters and COPIED flags are told in the words of qemu-img, other findings in our own; a repair tells what it set right, not how: there is no `Rebuilding refcount structure` |',
  '| `snapshot -a`, `snapshot -c` | VM state stays in the snapshot it was saved with: it neither appears in the active image nor passes into a new snapshot |',
  '| `-C`, `-W`, `-r RATE` | accepted, without effect |',
]

interface Named {
  readonly path: string
  readonly definition: CommandDefinition
}

/** A command and those below it. */
export function withNested(definition: CommandDefinition, above = ''): Named[] {
  const path = above === '' ? definition.name : `${above} ${definition.name}`
  return [{ path, definition }, ...(definition.commands ?? []).flatMap((nested) => withNested(nested, path))]
}

function section(path: string, definition: CommandDefinition): string[] {
  const lines = ['', `## ${path}`, '', '```', usage('qcow2', path, definition), '```', '', `${definition.summary}.`]
  for (const paragraph of definition.description ?? []) lines.push('', paragraph)
  if (definition.arguments.length > 0) {
    lines.push('', '| argument | |', '| --- | --- |', ...definition.arguments.map(({ name, help }) => row(`\`${name}\``, help)))
  }
  const options = Object.entries(definition.options)
  if (options.length > 0) {
    lines.push('', '| option | |', '| --- | --- |', ...options.map(([name, option]) => row(`\`${spelling(name, option)}\``, option.help)))
  }
  if (definition.exitCodes !== undefined) {
    const codes = Object.entries({ 0: 'success', 1: 'failure', ...definition.exitCodes })
    lines.push('', '| exit code | |', '| --- | --- |', ...codes.map(([code, help]) => row(code, help)))
  }
  if (definition.examples.length > 0) {
    lines.push('', '```sh', ...definition.examples.flatMap(({ line, shows }) => [`# ${shows}`, line]), '```')
  }
  return lines
}

function row(left: string, right: string): string {
  return `| ${left.replaceAll('|', '\\|')} | ${right.replaceAll('|', '\\|')} |`
}
