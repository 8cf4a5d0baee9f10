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
    '`IMAGE@SNAPSHOT` is the disk of an internal snapshot wherever an image is only read. A file whose whole name this is comes first, and so does what an address leads to as a whole:',
    'in `https://host/v@2/x.qcow2?sig=a@b` and `nbd://host/x@y` the `@` belongs to the address; only where nothing is found there, the part after the last `@` is a snapshot (of a web address: in the last part of its path, without a query).',
    '',
    'Images are files, and `nbd://HOST:PORT/NAME`, `nbd+unix:///NAME?socket=PATH`, `http://` and `https://` addresses, also with a user name and password (IPv6 addresses in brackets: `nbd://[::1]:10809/`).',
    'Messages show credentials and the values of a query as `***`. `NO_COLOR` turns colours off.',
    '',
    'Where an image goes to stdout (`-`, `/dev/stdout`), words and progress go to stderr. A target that is a named pipe takes what can be written from front to back;',
    'as a source, put `-` in its place. SIGUSR1 shows on stderr how far the work is. The first SIGINT or SIGTERM ends a command with exit code 130 or 143, the second at once.',
    'The disk of a raw file whose size is no multiple of 512 has zeroes up to the next one.',
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
  "Started under the name `qemu-img` (a link to `dist/cli.cjs`), messages have several lines where qemu-img's have, and no advice behind them; into a pipe, stdout comes at the end.",
  '',
  '| | here |',
  '| --- | --- |',
  '| `dd` | zeroes take no space in the new image; `count` with `skip` copies `count` blocks, as the manual of qemu-img says; qemu-img 10.0 copies `skip` fewer |',
  '| `convert --salvage` | called `qcow2`, one warning for each range that cannot be read, not for each sector |',
  '| `convert -n` | `-B` leaves things out only where the target has a backing file, and `-c` replaces clusters that are allocated; qemu-img writes wrong content, or fails |',
  '| `-C`, `-W`, `-r RATE` | accepted, without effect |',
  '| formats | qcow2, raw and luks; others are unknown drivers |',
  '| `luks`, `-o encrypt.format=luks` | made with aes-256, xts, plain64 and sha256, other values are refused; key slots of `luks` (outside qcow2) cannot be amended, headers not be detached; a disk that grows has zeroes, not random bytes |',
  '| protocols and filters | files, NBD, HTTP, `null-co`, `raw` with `offset` and `size`, and of `blkdebug` the errors injected for any request (`none`) and for guest data (`read_aio`, `write_aio`), without states; no `quorum`, `throttle`, `ssh`, `fuse` |',
  '| `-o extent_size_hint`, `nocow` | accepted, without effect |',
  '| `-o compression_type=zstd` | read everywhere; written with Node 22.15 and later |',
  '| `amend` | `compat=0.10` is refused for an image of AES whose zero clusters hide a backing file, and for one with snapshots that hold clusters compressed with zstd |',
  '| `-o help` | the same names and types, in other words |',
  '| sizes of 2^53 bytes and more | refused |',
  '| holes of host files | Node can neither ask for them nor make them in a file that has data there: `map` and `measure` take a preallocated or raw file as data, and what is discarded is free in the image but not on the host |',
  '| dirty bitmaps | not kept up to date: a write marks enabled ones as in use |',
  '| `check` | told in the words of qemu-img, structures by their place in the file; besides what qemu-img does not look for: clusters that two kinds of metadata, or metadata and data, claim (`ERROR overlap`, exit code 2). `-r leaks` frees nothing while the L1 table of a snapshot cannot be found |',
  '| `snapshot -a` | VM state stays in the snapshot it was saved with and does not appear in the active image |',
  '| damaged images | refused where qemu-img begins and fails later; the message says which field is wrong, in our words |',
  '| where clusters lie | an image has the same content, not the same offsets and file length |',
  '',
  "QEMU's own image test-suite, run with this program as its `qemu-img` for the format qcow2 in files, does not pass in these areas:",
  '',
  '| area | tests | why |',
  '| --- | --- | --- |',
  '| faults injected by `blkdebug`, `quorum` | 098 110 217 244 | no steps of QEMU\'s own code as events, no `quorum` |',
  '| order of lines | 251 | the map is read ahead of the data |',
  '| overlaps | 060 108 | told besides |',
  '| what damaged images are answered with | 080 112 | other words; what fails leaves no leaks; wider refcounts leave no damaged counters behind |',
  '| help of `-o` | 082 | other words |',
  '| sizes past 2^53 | 049 054 137 | refused |',
  '| holes of host files | 250 | Node cannot see or make them |',
  '| zeroes and places | 122 190 | `convert -n` does not mark as zeroes what reads so anyway; bitmaps lie elsewhere |',
  '| how full a file of fixed size gets | qemu-img-close-errors | less is written: a bitmap that did not change is not stored again |',
  '| zstd | 287 | passes with Node 22.15 and later |',
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
