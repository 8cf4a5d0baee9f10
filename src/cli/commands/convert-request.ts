/** What a `convert` command line asks for, and the target it makes. Owns what is wrong with a request by itself. */
import type { BlockDevice } from '../../block/device.ts'
import type { ConvertToQcow2Options } from '../../qcow2/convert.ts'
import type { Context, OptionValues } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { layoutOf, parseCreateOptions, preallocationOf, switchOf, type CreateValues } from '../image/create-options.ts'
import { isImageFormat, type ImageFormat } from '../image/formats.ts'
import { refuseLoops } from '../image/loops.ts'
import { intoNewTarget, targetPlace } from '../image/new-target.ts'
import { resolveBacking } from '../image/names.ts'
import { forceShareOption, isDirect, objectOption, openerFor, progressOption, quietOption } from '../image/options.ts'
import { couldNotOpen, reasonOf } from '../image/reasons.ts'
import { parsePlace } from '../image/spec.ts'
import { parseSize } from '../size.ts'

/** The options of `convert`. */
export const convertOptions = {
  'source-format': { short: 'f', value: 'FMT', help: 'the format of the source, instead of finding it out' },
  'source-image-opts': { aliases: ['image-opts'], help: 'the sources are not names but options: driver=qcow2,file.filename=...' },
  'source-snapshot': { short: 'l', value: 'SNAPSHOT', help: 'the disk of this snapshot: its name or id, or snapshot.name=NAME, snapshot.id=ID' },
  'source-cache': { short: 'T', value: 'MODE', help: "'none' reads past the page cache" },
  'target-format': { short: 'O', value: 'FMT', help: 'the format to write, qcow2, luks or raw (default)' },
  'target-image-opts': { help: 'the target is not a name but options; with -n' },
  'target-options': { short: 'o', value: 'OPTIONS', many: true, help: "options of the new image, as for create ('-o help' lists them)" },
  'target-cache': { short: 't', value: 'MODE', help: "'none' writes past the page cache" },
  compress: { short: 'c', help: 'store clusters compressed' },
  backing: { short: 'B', value: 'FILENAME', file: true, help: 'make an overlay on this image: only what the source itself holds is copied' },
  'backing-format': { short: 'F', value: 'FMT', help: 'the format of the backing file' },
  'no-create': { short: 'n', help: 'write into a target that exists' },
  'target-is-zero': { help: 'with -n: the target reads as zeroes already' },
  'sparse-size': { short: 'S', value: 'SIZE', help: 'runs of zeroes of at least this size take no space; default 4k; 0 writes everything' },
  bitmaps: { help: 'copy the dirty bitmaps too' },
  'skip-broken-bitmaps': { help: 'with --bitmaps: leave out bitmaps that must not be trusted' },
  salvage: { help: 'what cannot be read is told and becomes zeroes, instead of ending the copy' },
  parallel: { short: 'm', value: 'COUNT', help: 'threads that compress, 1 to 16' },
  'oob-writes': { short: 'W', help: 'accepted for compatibility' },
  'copy-range-offloading': { short: 'C', help: 'accepted for compatibility' },
  rate: { short: 'r', value: 'RATE', help: 'accepted for compatibility; there is no limit' },
  ...forceShareOption,
  ...objectOption,
  ...progressOption,
  ...quietOption,
} as const

/** One run of `convert`. */
export type ConvertContext = Context<typeof convertOptions>

/** What the command line asks for. */
export interface Request {
  readonly target: string
  readonly format: ImageFormat
  readonly values: CreateValues
  readonly sparseSize: number | undefined
  readonly workers: number | undefined
}

/** The format to write. @throws ExitError */
export function targetFormat(given: OptionValues<typeof convertOptions>): ImageFormat {
  const format = given['target-format'] ?? 'raw'
  if (!isImageFormat(format)) throw new ExitError(1, `Unknown file format '${format}'`)
  return format
}

/** The largest `-S` that qemu-img takes, in bytes. */
const greatestSparseSize = 16 << 20

/** Everything that is wrong with a request by itself is found before a file is touched. */
export function checkRequest({ options, args }: ConvertContext, format: ImageFormat): Request {
  const noCreate = options['no-create']
  if (args.length < 2) throw new UsageError('Must specify image file name')
  if (options['target-image-opts'] && !noCreate) throw new UsageError('--target-image-opts requires use of -n flag')
  if (options['target-is-zero'] && !noCreate) throw new UsageError('--target-is-zero requires use of -n flag')
  if (options['skip-broken-bitmaps'] && !options.bitmaps) throw new UsageError('Use of --skip-broken-bitmaps requires --bitmaps')
  if (options.bitmaps && args.length > 2) throw new UsageError('Copying bitmaps only possible with single source')
  if (options.bitmaps && format !== 'qcow2' && !noCreate) throw new ExitError(1, `Format driver '${format}' does not support bitmaps`)
  if (options['source-snapshot'] !== undefined && args.length > 2) throw new UsageError('No support for concatenating multiple snapshot')
  if (options.backing !== undefined && args.length > 2) throw new UsageError('Having a backing file for the target makes no sense when concatenating multiple input images')
  if (options.salvage && options['copy-range-offloading']) throw new UsageError('Cannot use copy offloading in salvaging mode')
  isDirect(options['source-cache'])
  isDirect(options['target-cache'])
  if (options.compress && format !== 'qcow2') throw new ExitError(1, 'Compression not supported for this file format')
  const sparse = options['sparse-size']
  const sparseSize = sparse === undefined ? undefined : parseSize(sparse)
  if (sparse !== undefined && sparseSize === undefined) throw new UsageError(`Invalid buffer size for sparse output specified: '${sparse}'.`)
  if (sparseSize !== undefined && (sparseSize % 512 !== 0 || sparseSize > greatestSparseSize)) {
    throw new UsageError(`Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to ${greatestSparseSize}. Select 0 to disable sparse detection (fully allocates output).`)
  }
  const workers = options.parallel === undefined ? undefined : Number(options.parallel)
  if (workers !== undefined && (!Number.isInteger(workers) || workers < 1 || workers > 16)) {
    throw new UsageError('Invalid number of coroutines specified. Must be between 1 and 16.')
  }
  if (noCreate && options['target-options'].length > 0) throw new ExitError(1, '-o has no effect when skipping image creation')
  return { target: args.at(-1)!, format, values: noCreate ? new Map<string, string>() : newImageValues(options, format), sparseSize, workers }
}

/** What the options say of the image to be made. */
function newImageValues(options: OptionValues<typeof convertOptions>, format: ImageFormat): CreateValues {
  if (options.backing !== undefined && format !== 'qcow2') throw new ExitError(1, `Backing file not supported for file format '${format}'`)
  if (options['backing-format'] !== undefined && format !== 'qcow2') throw new ExitError(1, `Backing format not supported for file format '${format}'`)
  const values = parseCreateOptions(format, options['target-options'])
  if (options.backing !== undefined) values.set('backing_file', options.backing)
  if (options['backing-format'] !== undefined) values.set('backing_fmt', options['backing-format'])
  if (values.has('backing_file') && !values.has('backing_fmt')) throw new ExitError(1, 'Use of backing file requires explicit backing format')
  if (options.compress) refuseCompression(values)
  if (format !== 'qcow2' && preallocationOf(values) === 'metadata') throw new ExitError(1, 'Unsupported preallocation mode: metadata')
  return values
}

function refuseCompression(values: CreateValues): void {
  if (values.has('data_file')) throw new ExitError(1, 'An external data file cannot hold compressed clusters; leave out -c')
  if (values.has('encrypt.format') || switchOf(values, 'encryption') === true) throw new ExitError(1, 'Compression and encryption not supported at the same time')
  if (preallocationOf(values) !== 'off') throw new ExitError(1, 'Compression and preallocation not supported at the same time')
}

/** True if the new image has what only the engine can make. */
export function needsEngine(values: CreateValues): boolean {
  return ['preallocation', 'data_file', 'encrypt.format', 'encryption'].some((name) => values.has(name))
}

/** The options of a new image that conversions take. */
export function shapeOf(layout: ReturnType<typeof layoutOf>): Pick<ConvertToQcow2Options, 'clusterSize' | 'version' | 'refcountBits' | 'extendedL2' | 'lazyRefcounts' | 'compressionType' | 'backing'> {
  const { preallocation: _, dataFile: __, dataFileRaw: ___, size: ____, ...shape } = layout
  return shape
}

/** Bytes of the disk in the backing file, if there is one; one that cannot be opened is found before anything is written. */
export async function backingSize(context: ConvertContext, target: string, values: CreateValues): Promise<number | undefined> {
  const name = values.get('backing_file')
  if (name !== undefined || values.has('data_file')) await refuseLoops(target, values)
  if (name === undefined) return undefined
  const resolved = resolveBacking(parsePlace(target), name)
  try {
    return (await openerFor(context).below(resolved, values.get('backing_fmt'))).size
  } catch (error) {
    const reason = error instanceof ExitError ? couldNotOpen(resolved, error.cause).message : reasonOf(error)
    throw new ExitError(1, `Could not open '${target}': Could not open backing file: ${reason}`, { cause: error })
  }
}

/** Failures that name the target they are about. */
export async function aboutTarget<T>(target: string, task: () => Promise<T>, format: ImageFormat = 'qcow2'): Promise<T> {
  try {
    return await task()
  } catch (error) {
    if (error instanceof ExitError) throw new ExitError(1, `${target}: error while converting ${format}: ${error.message}`, { cause: error })
    throw error
  }
}

/** Makes the file of the target by a task; if that fails, what had the name stays. */
export async function intoTarget<T>(context: ConvertContext, target: string, task: (file: BlockDevice) => Promise<T>): Promise<T> {
  const place = targetPlace(parsePlace(target))
  if (place === undefined) throw new ExitError(1, `${target}: images are made in files and on NBD exports only; -n writes to what exists`)
  const failed = `${target}: error while converting ${context.options['target-format'] ?? 'raw'}`
  return intoNewTarget(context, place, { direct: isDirect(context.options['target-cache']), failed }, task)
}
