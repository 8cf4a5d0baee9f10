import { Qcow2Error } from '../../core/errors.ts'
import type { Bitmaps } from '../../qcow2/bitmaps.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import type { OpenedImage } from '../image/opened.ts'
import { formatOption, imageOptsOption, objectOption, openArgument, openerFor } from '../image/options.ts'
import { parseSize } from '../size.ts'

const operations = ['add', 'remove', 'clear', 'enable', 'disable', 'merge'] as const
type Operation = (typeof operations)[number]

export const bitmapCommand = command({
  name: 'bitmap',
  summary: 'Change the dirty bitmaps inside an image',
  description: ['Bitmaps tell which ranges of a disk changed since some time, for incremental backups. Several operations are done in the order given. Do not change the bitmaps of an image that a VM is using.'],
  options: {
    add: { help: 'make BITMAP, empty and enabled' },
    remove: { help: 'remove BITMAP' },
    clear: { help: 'clear all its bits' },
    enable: { help: 'changes are recorded from now on' },
    disable: { help: 'changes are no longer recorded; together with --add it begins so' },
    merge: { value: 'SOURCE', many: true, help: 'set in BITMAP what is set in the bitmap SOURCE' },
    granularity: { short: 'g', value: 'SIZE', help: 'with --add: bytes that one bit stands for; default 64K' },
    'source-file': { short: 'b', value: 'FILENAME', file: true, help: 'with --merge: the image that has SOURCE' },
    'source-format': { short: 'F', value: 'FMT', help: 'the format of that image' },
    ...formatOption,
    ...imageOptsOption,
    ...objectOption,
  },
  arguments: [
    { name: 'FILENAME', help: 'the image' },
    { name: 'BITMAP', word: true, help: 'name of the bitmap' },
  ],
  examples: [
    { line: 'qcow2 bitmap --add disk.qcow2 daily', shows: 'record changes from now on' },
    { line: 'qcow2 bitmap --merge monday --merge tuesday disk.qcow2 week', shows: 'gather bitmaps' },
  ],
  async run(context) {
    const { options, order, args } = context
    const steps = order.flatMap(({ option, value }) => (isOperation(option) ? [{ operation: option, value }] : []))
    if (steps.length === 0) throw new UsageError('Need at least one of --add, --remove, --clear, --enable, --disable, or --merge')
    const adds = steps.some(({ operation }) => operation === 'add')
    if (options.granularity !== undefined && !adds) throw new UsageError('granularity only supported with --add')
    const granularity = options.granularity === undefined ? undefined : parseSize(options.granularity)
    if (options.granularity !== undefined && granularity === undefined) throw new UsageError(`Invalid granularity specified: '${options.granularity}'.`)
    const opened = await openArgument(context, { readOnly: false, withoutBacking: true })
    let source: OpenedImage | undefined
    try {
      const bitmaps = opened.image?.bitmaps
      if (bitmaps === undefined) throw new ExitError(1, `Format driver '${opened.format}' does not support bitmaps`)
      if (options['source-file'] !== undefined) {
        source = await openerFor(context).name(options['source-file'], { readOnly: true, withoutBacking: true }, options['source-format'])
      }
      for (const { operation, value } of steps) {
        const name = args[1]!
        try {
          if (operation === 'add') await add(bitmaps, name, granularity)
          else if (operation === 'merge') await merge(bitmaps, name, value!, source)
          else await bitmaps[operation](name)
        } catch (error) {
          throw new ExitError(1, `Operation ${operation} on bitmap ${name} failed: ${reason(error, operation === 'merge' ? value! : name)}`, { cause: error })
        }
      }
      return 0
    } finally {
      await source?.close()
      await opened.close()
    }
  },
})

function isOperation(option: string): option is Operation {
  return operations.some((operation) => operation === option)
}

async function add(bitmaps: Bitmaps, name: string, granularity: number | undefined): Promise<void> {
  if (granularity !== undefined && (granularity < 512 || !Number.isInteger(Math.log2(granularity)))) {
    throw new ExitError(1, 'Granularity must be power of 2 and at least 512')
  }
  await bitmaps.add({ name, granularity })
}

async function merge(bitmaps: Bitmaps, target: string, name: string, source: OpenedImage | undefined): Promise<void> {
  if (source === undefined) {
    await bitmaps.merge(target, name)
    return
  }
  if (source.image === undefined) throw new ExitError(1, `Format driver '${source.format}' does not support bitmaps`)
  await bitmaps.merge(target, source.image.bitmaps.read(name))
}

function reason(error: unknown, name: string): string {
  if (Qcow2Error.is(error, 'ERR_EXISTS')) return `Bitmap already exists: ${name}`
  if (Qcow2Error.is(error, 'ERR_NOT_FOUND')) return `Dirty bitmap '${name}' not found`
  return error instanceof Error ? error.message : String(error)
}
