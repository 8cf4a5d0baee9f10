import { FormatError } from '../../core/errors.ts'
import { rebaseImage, setBackingFile } from '../../qcow2/rebase.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { resolveBacking } from '../image/names.ts'
import { forceShareOption, formatOption, imageOptsOption, isDirect, objectOption, openArgument, openerFor, progressOption, quietOption } from '../image/options.ts'
import { couldNotOpen } from '../image/reasons.ts'

export const rebaseCommand = command({
  name: 'rebase',
  summary: 'Give an overlay another backing file',
  description: [
    'What would read differently is copied into the overlay first, so that the disk stays the same. With -u only the name changes: for a backing file that was moved or renamed.',
    "An empty name ('-b \"\"') makes the image independent of any backing file.",
  ],
  options: {
    backing: { short: 'b', value: 'FILENAME', file: true, help: 'the new backing file; empty for none' },
    'backing-format': { short: 'F', value: 'FMT', help: 'format of the new backing file' },
    'backing-unsafe': { short: 'u', help: 'change only the name; nothing is read' },
    compress: { short: 'c', help: 'store what is copied compressed' },
    cache: { short: 't', value: 'MODE', help: "'none' goes past the page cache" },
    'backing-cache': { short: 'T', value: 'MODE', help: 'the same for the backing files' },
    ...formatOption,
    ...imageOptsOption,
    ...forceShareOption,
    ...objectOption,
    ...progressOption,
    ...quietOption,
  },
  arguments: [{ name: 'FILENAME', help: 'the overlay' }],
  examples: [
    { line: 'qcow2 rebase -b newbase.qcow2 -F qcow2 overlay.qcow2', shows: 'the same disk over another base' },
    { line: 'qcow2 rebase -u -b ../moved/base.qcow2 -F qcow2 overlay.qcow2', shows: 'the base was moved' },
    { line: "qcow2 rebase -b '' overlay.qcow2", shows: 'the disk without any base' },
  ],
  async run(context) {
    const { options, signal } = context
    const { 'backing-unsafe': unsafe, compress: compressed } = options
    if (options.backing === undefined && !unsafe) throw new UsageError('Must specify backing file (-b) or use unsafe mode (-u)')
    isDirect(options['backing-cache'])
    const opened = await openArgument(context, { readOnly: false, withoutBacking: unsafe, direct: isDirect(options.cache) })
    try {
      const { image } = opened
      if (image === undefined && compressed) throw new ExitError(1, 'Compression not supported for this file format')
      if (image === undefined) throw new ExitError(1, 'Image format driver does not support rebase')
      const name = options.backing ?? ''
      const progress = context.progress()
      const onProgress = ({ done, total }: { done: number; total: number }): void => progress.update(done, total)
      if (name === '') {
        await (unsafe ? setBackingFile(image, undefined) : rebaseImage(image, undefined, { compressed, signal, onProgress }))
        progress.finish()
        return 0
      }
      const format = options['backing-format']
      if (unsafe) {
        if (format === undefined) throw new ExitError(1, `Could not change the backing file to '${name}': backing format must be specified`)
        await setBackingFile(image, { file: name, format }).catch((error: unknown) => {
          throw error instanceof FormatError ? new ExitError(1, `Could not change the backing file to '${name}': ${error.message}`, { cause: error }) : error
        })
        progress.finish()
        return 0
      }
      const resolved = resolveBacking(opened.place, name)
      const backing = await openerFor(context)
        .name(resolved, { readOnly: true }, format)
        .catch((error: unknown) => {
          throw new ExitError(1, `Could not open new backing file '${name}': ${couldNotOpen(resolved, error instanceof ExitError ? error.cause : error).message}`, { cause: error })
        })
      try {
        context.leaves(`${opened.filename} keeps its old backing file and reads as before`)
        await rebaseImage(image, { file: name, format: backing.format, device: backing.device }, { compressed, signal, onProgress })
        progress.finish()
      } finally {
        await backing.close()
      }
      return 0
    } finally {
      await opened.close()
    }
  },
})
