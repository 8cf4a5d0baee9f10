import { compareDevices, type Comparison } from '../../qcow2/compare.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import type { OpenedImage } from '../image/open.ts'
import { forceShareOption, imageOptsOption, isDirect, objectOption, openerFor, progressOption, quietOption } from '../image/options.ts'
import { parseImageOpts } from '../image/spec.ts'

export const compareCommand = command({
  name: 'compare',
  summary: 'Compare the content of two disks',
  description: ['Where one disk is longer, what it has more must be zeroes. Images of different formats, sizes and layouts may be equal.'],
  options: {
    'a-format': { short: 'f', value: 'FMT', help: 'the format of FILENAME1' },
    'b-format': { short: 'F', value: 'FMT', help: 'the format of FILENAME2' },
    ...imageOptsOption,
    strict: { short: 's', help: 'the sizes must be equal too, and what is allocated' },
    cache: { short: 'T', value: 'MODE', help: "'none' goes past the page cache" },
    ...forceShareOption,
    ...objectOption,
    ...progressOption,
    ...quietOption,
  },
  arguments: [
    { name: 'FILENAME1', help: 'an image' },
    { name: 'FILENAME2', help: 'the other' },
  ],
  exitCodes: { 0: 'the disks are equal', 1: 'they differ', 2: 'an image could not be opened', 4: 'an image could not be read' },
  failure: (error) => (error instanceof ExitError ? error.exitCode : 4),
  examples: [
    { line: 'qcow2 compare disk.qcow2 disk.raw', shows: 'whether a conversion was right' },
    { line: 'qcow2 compare disk.qcow2 disk.qcow2@yesterday', shows: 'whether a disk has changed since a snapshot' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    const how = { readOnly: true, direct: isDirect(options.cache) }
    const opener = openerFor(context)
    const open = async (name: string, format: string | undefined): Promise<OpenedImage> => {
      if (options['image-opts'] && format !== undefined) throw new UsageError('--image-opts and --a-format or --b-format are mutually exclusive')
      try {
        return await (options['image-opts'] ? opener.spec(parseImageOpts(name), how) : opener.name(name, how, format))
      } catch (error) {
        if (error instanceof ExitError) throw new ExitError(2, error.message, { cause: error })
        throw error
      }
    }
    const a = await open(args[0]!, options['a-format'])
    try {
      const b = await open(args[1]!, options['b-format'])
      try {
        const progress = context.progress()
        const result = await compareDevices(a.device, b.device, { strict: options.strict, signal, onProgress: ({ done, total }) => progress.update(done, total) })
        progress.finish()
        if (!options.quiet) for (const line of resultLines(result)) await print(line)
        return result.equal ? 0 : 1
      } finally {
        await b.close()
      }
    } finally {
      await a.close()
    }
  },
})

function resultLines(result: Comparison): string[] {
  if (result.equal) return [...(result.sizesDiffer ? ['Warning: Image size mismatch!'] : []), 'Images are identical.']
  if (result.reason === 'size') return ['Strict mode: Image size mismatch!']
  if (result.reason === 'allocation') return [`Strict mode: Offset ${result.offset} block status mismatch!`]
  return [`Content mismatch at offset ${result.offset}!`]
}
