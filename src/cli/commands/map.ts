import type { Extent } from '../../block/device.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { chainOf, type OpenedImage } from '../image/opened.ts'
import { forceShareOption, formatOption, imageOptsOption, objectOption, openArgument, outputOption } from '../image/options.ts'
import { mapHeading, mapJson, mapRow } from '../print/map.ts'
import { parseSize } from '../size.ts'
import { nameFor } from '../terminal.ts'

export const mapCommand = command({
  name: 'map',
  summary: 'Show where the bytes of a disk are',
  description: ['For people, the ranges that hold data and the file they are in; as JSON every range, with its depth in the backing chain.'],
  options: {
    ...formatOption,
    ...imageOptsOption,
    'start-offset': { short: 's', value: 'OFFSET', help: 'begin here; default 0' },
    'max-length': { short: 'l', value: 'LENGTH', help: 'end after so many bytes' },
    ...outputOption,
    ...forceShareOption,
    ...objectOption,
  },
  arguments: [{ name: 'FILENAME', help: 'the image' }],
  examples: [
    { line: 'qcow2 map disk.qcow2', shows: 'the ranges with data' },
    { line: 'qcow2 map --output=json overlay.qcow2', shows: 'every range, through the backing chain' },
    { line: 'qcow2 map disk.qcow2@before-update', shows: 'the disk of a snapshot' },
  ],
  async run(context) {
    const { options, print, signal } = context
    const start = sizeOf('start offset', options['start-offset']) ?? 0
    const limit = sizeOf('max length', options['max-length'])
    const opened = await openArgument(context, { readOnly: true })
    try {
      const length = Math.max(0, Math.min(limit ?? Infinity, opened.device.size - start))
      const extents = length === 0 ? [] : opened.device.map({ offset: start, length, signal })
      if (options.output === 'json') await printJson(extents, (text) => context.terminal.stdout.write(text))
      else await printRows(extents, opened, print, nameFor(context.terminal.stdout))
      return 0
    } finally {
      await opened.close()
    }
  },
})

type Extents = AsyncIterable<Extent> | Iterable<Extent>

/** Characters written at once: a line alone costs more to write than to make. */
const batch = 64 << 10

async function printJson(extents: Extents, write: (text: string) => Promise<void>): Promise<void> {
  let text = '['
  let before = ''
  try {
    for await (const extent of extents) {
      text += before + mapJson(extent)
      before = ',\n'
      if (text.length < batch) continue
      await write(text)
      text = ''
    }
    text += ']\n'
  } finally {
    // what was found before a failure is told too
    await write(text)
  }
}

async function printRows(extents: Extents, opened: OpenedImage, print: (line: string) => Promise<void>, shown: (name: string) => string): Promise<void> {
  const files = chainOf(opened).map(({ filename, dataFilename }) => shown(dataFilename ?? filename))
  await print(mapHeading)
  for await (const extent of extents) {
    if (!extent.data || extent.zero) continue
    if (extent.offset === undefined) throw new ExitError(1, 'File contains external, encrypted or compressed clusters.')
    await print(mapRow(extent, files[extent.depth] ?? '?'))
  }
}

function sizeOf(what: string, text: string | undefined): number | undefined {
  if (text === undefined) return undefined
  const bytes = parseSize(text)
  if (bytes === undefined) throw new UsageError(`Invalid ${what} specified: '${text}'.`)
  return bytes
}
