import type { BlockDevice } from '../../block/device.ts'
import { trace, type TracedRequest } from '../../block/trace.ts'
import { group, type CommandDefinition, type Context } from '../command.ts'
import { UsageError } from '../errors.ts'
import { didYouMean } from '../nearest.ts'
import { parse } from '../parse.ts'
import { drawTrace, summariseTrace } from '../print/trace.ts'
import { paletteFor } from '../terminal.ts'

/** The commands that there are, each loaded by its name. */
export interface Commands {
  readonly names: readonly string[]
  readonly load: (name: string) => Promise<CommandDefinition | undefined>
}

/** `trace`, for these commands. */
export function traceCommand(commands: Commands): CommandDefinition {
  return {
    ...group({
      name: 'trace',
      summary: "Run another command and draw its I/O: each request's place over time",
      description: [
        'The output of the command is as ever; the drawing goes to stderr. Time runs to the right, the offset in the file upwards.',
        'With --output=json before the command the requests are written as JSON lines instead.',
      ],
      examples: [
        { line: 'qcow2 trace convert -O qcow2 disk.raw disk.qcow2', shows: 'how a conversion reads and writes' },
        { line: 'qcow2 trace check disk.qcow2', shows: 'how a check walks through an image' },
      ],
    }),
    passThrough: true,
    options: { output: { value: 'FORMAT', choices: ['human', 'json'], help: "'human' (default) or 'json'" } },
    arguments: [{ name: 'COMMAND', many: true, word: true, help: 'a command with its options' }],
    run: (context) => runTraced(context, commands),
  }
}

async function runTraced(context: Context, { names, load }: Commands): Promise<number> {
  const [name, ...words] = context.args as [string, ...string[]]
  const definition = await load(name)
  if (definition === undefined || name === 'trace' || definition.commands !== undefined) {
    throw new UsageError(`Command not found: ${name}${didYouMean(name, names)}`)
  }
  const line = parse(definition, words)
  if (line.help) throw new UsageError(`see 'help ${name}'`)
  const files = new Map<string, TracedRequest[]>()
  const wrapDevice = (device: BlockDevice, file: string): BlockDevice => {
    const log = files.get(file) ?? []
    files.set(file, log)
    return trace(device, log)
  }
  const code = await definition.run({ ...context.as(definition, line), wrapDevice })
  await show(context, files)
  return code
}

async function show({ terminal, options }: Context, files: ReadonlyMap<string, readonly TracedRequest[]>): Promise<void> {
  const { stderr } = terminal
  for (const [file, requests] of files) {
    if ((options as { readonly output?: string })['output'] === 'json') {
      for (const { operation, offset, length, submitted, completed } of requests) {
        await stderr.write(`${JSON.stringify({ file, operation, offset, length, submitted, completed })}\n`)
      }
      continue
    }
    await stderr.write(`\n${file}: ${summariseTrace(requests)}\n`)
    for (const line of drawTrace(requests, { columns: stderr.columns ?? 80, palette: paletteFor(terminal, stderr) })) await stderr.write(`${line}\n`)
  }
}
