import { inspectImage, type Inspection } from '../../qcow2/inspect.ts'
import { command } from '../command.ts'
import { forceShareOption, objectOption, openerFor, outputOption } from '../image/options.ts'
import { couldNotOpen } from '../image/reasons.ts'
import { parseName } from '../image/spec.ts'
import { prettyJson, type Json } from '../print/shapes.ts'
import { nameFor } from '../terminal.ts'

export const inspectCommand = command({
  name: 'inspect',
  summary: 'Look at an untrusted image: format, sizes, what it names and why that is dangerous',
  description: [
    'Nothing but the image itself is opened, whatever it names, and only its metadata is read. A damaged image is reported, not an error.',
    'Paths are judged as they are written: symbolic links are not looked at.',
  ],
  options: { ...outputOption, ...forceShareOption, ...objectOption },
  arguments: [{ name: 'IMAGE', help: 'the image' }],
  exitCodes: { 0: 'the image names no other file', 2: 'it names other files, is damaged, or is in a format that is not read' },
  examples: [
    { line: 'qcow2 inspect upload.qcow2', shows: 'before anything else is done with an upload' },
    { line: 'qcow2 inspect --output=json upload.qcow2', shows: 'for programs' },
  ],
  async run(context) {
    const { options, args, print, terminal, signal } = context
    const name = args[0]!
    const opener = openerFor(context)
    const host = await opener.bytes(parseName(name, undefined).place, { readOnly: true }).catch((error: unknown) => {
      throw couldNotOpen(name, error)
    })
    try {
      const found = await inspectImage(host, { signal })
      if (options.output === 'json') await print(prettyJson(asJson(name, found)))
      else for (const line of lines(name, found, nameFor(terminal.stdout))) await print(line)
      return isHarmless(found) ? 0 : 2
    } finally {
      await host.close()
    }
  },
})

function isHarmless({ format, names, problem }: Inspection): boolean {
  return names.length === 0 && problem === undefined && ['qcow2', 'luks', 'raw'].includes(format)
}

function asJson(filename: string, { format, fileSize, info, problem, names, notes }: Inspection): Json {
  return {
    filename,
    format,
    'file-size': fileSize,
    ...(info === undefined ? {} : { 'virtual-size': info.virtualSize, version: info.version, encryption: info.encryption, snapshots: info.snapshots.length, bitmaps: info.bitmaps.length }),
    ...(problem === undefined ? {} : { problem }),
    names: names.map(({ kind, name, format: named, dangers }) => ({ kind, name, ...(named === undefined ? {} : { format: named }), dangers: [...dangers] })),
    notes: [...notes],
  }
}

function lines(filename: string, { format, fileSize, info, problem, names, notes }: Inspection, shown: (name: string) => string): string[] {
  const foreign = ['qcow2', 'luks', 'raw'].includes(format) ? '' : ': not read here, convert it with qemu-img first'
  return [
    `image: ${filename}`,
    `format: ${format === 'raw' ? 'none that is recognised (raw)' : format}${info === undefined ? '' : `, version ${info.version}`}${foreign}`,
    `file size: ${fileSize} bytes`,
    ...(info === undefined ? [] : [`virtual size: ${info.virtualSize} bytes`, `snapshots: ${info.snapshots.length}, bitmaps: ${info.bitmaps.length}, encryption: ${info.encryption}`]),
    ...(problem === undefined ? [] : [`damaged: ${problem}`]),
    ...(names.length === 0 ? ['other files: none'] : ['other files:']),
    ...names.flatMap(({ kind, name, format: named, dangers }) => [
      `  ${kind} '${shown(name)}'${named === undefined ? '' : `, format ${shown(named)}`}`,
      ...dangers.map((danger) => `    - ${danger}`),
    ]),
    ...notes.map((note) => `note: ${note}`),
  ]
}
