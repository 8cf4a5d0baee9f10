import { Qcow2Error } from '../../core/errors.ts'
import { luksHeaderBytes, measureConversion, measureQcow2, type Measurement, type MeasureOptions } from '../../qcow2/measure.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { asksForHelp, createHelp, layoutOf, parseCreateOptions, type CreateValues } from '../image/create-options.ts'
import { isImageFormat, type ImageFormat } from '../image/formats.ts'
import type { OpenedImage } from '../image/opened.ts'
import { forceShareOption, formatOption, imageOptsOption, objectOption, openArgument, outputOption } from '../image/options.ts'
import { openSnapshot, snapshotParameter } from '../image/snapshot-parameter.ts'
import { measureText } from '../print/measure.ts'
import { prettyJson } from '../print/shapes.ts'
import { imageSize } from '../size.ts'

export const measureCommand = command({
  name: 'measure',
  summary: 'Calculate how much space a new image will need',
  options: {
    'target-format': { short: 'O', value: 'FMT', help: 'format of the new image, qcow2, luks or raw (default)' },
    options: { short: 'o', value: 'OPTIONS', many: true, help: 'options of the new image, as for create' },
    size: { short: 's', value: 'SIZE', help: 'an empty disk of this size' },
    snapshot: { short: 'l', value: 'SNAPSHOT', help: 'the disk of this snapshot of FILENAME' },
    ...formatOption,
    ...imageOptsOption,
    ...outputOption,
    ...forceShareOption,
    ...objectOption,
  },
  arguments: [{ name: 'FILENAME', optional: true, help: 'the disk to be converted' }],
  examples: [
    { line: 'qcow2 measure --size 100G -O qcow2', shows: 'metadata of an empty disk' },
    { line: 'qcow2 measure -O qcow2 disk.raw', shows: 'what a conversion will take' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    const format = formatOf(options['target-format'] ?? 'raw')
    if (asksForHelp(options.options)) {
      await print(createHelp(format))
      return 0
    }
    if (options.size !== undefined && args.length > 0) throw new UsageError('--size N cannot be used together with a filename.')
    if (options.size === undefined && args.length === 0) throw new UsageError('Either --size N or one filename must be specified.')
    const values = parseCreateOptions(format, options.options)
    if (options.size !== undefined) values.set('size', String(imageSize(options.size)))
    const measure = async (): Promise<Result> => (args.length === 0 ? measureSize(format, values) : measureImage())
    const result = await measure().catch(asTooLarge)
    const entry = { ...(result.bitmaps === undefined ? {} : { bitmaps: result.bitmaps }), required: result.required, 'fully-allocated': result.fullyAllocated }
    if (options.output === 'json') await print(prettyJson(entry))
    else for (const line of measureText(entry)) await print(line)
    return 0

    async function measureImage(): Promise<Result> {
      const opened = await openSnapshot(await openArgument(context, { readOnly: true }), snapshotParameter(options.snapshot))
      try {
        return format === 'qcow2' ? await measureTo(opened, values, signal) : measureFlat(format, opened.device.size)
      } finally {
        await opened.close()
      }
    }
  },
})

function formatOf(name: string): ImageFormat {
  if (!isImageFormat(name)) throw new ExitError(1, `Unknown file format '${name}'`)
  return name
}

type Result = Omit<Measurement, 'bitmaps'> & { readonly bitmaps?: number | undefined }

function asTooLarge(error: unknown): never {
  throw Qcow2Error.is(error, 'ERR_RANGE') ? new ExitError(1, 'The image size is too large (try using a larger cluster size)', { cause: error }) : error
}

function measureSize(format: ImageFormat, values: CreateValues): Result {
  const size = Number(values.get('size'))
  if (format !== 'qcow2') return measureFlat(format, size)
  const { required, fullyAllocated } = measureQcow2(size, measureOptions(values))
  return { required, fullyAllocated }
}

/** Formats in which all of the disk takes space. */
function measureFlat(format: ImageFormat, size: number): Result {
  const bytes = size + (format === 'luks' ? luksHeaderBytes : 0)
  return { required: bytes, fullyAllocated: bytes }
}

async function measureTo({ device, image, snapshot }: OpenedImage, values: CreateValues, signal: AbortSignal): Promise<Result> {
  const bitmaps = snapshot === undefined ? await image?.bitmaps.list() : []
  const result = await measureConversion(device, { ...measureOptions(values), bitmaps, signal })
  const without = image === undefined || image.engine.header.version === 2 || layoutOf(values).version === 2
  return without ? { required: result.required, fullyAllocated: result.fullyAllocated } : result
}

function measureOptions(values: CreateValues): MeasureOptions {
  const { clusterSize, refcountBits, extendedL2, preallocation, backing } = layoutOf(values)
  return { clusterSize, refcountBits, extendedL2, preallocation, overlay: backing !== undefined, luks: values.get('encrypt.format') === 'luks' }
}
