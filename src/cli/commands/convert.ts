import { resolve } from 'node:path'
import type { BlockDevice } from '../../block/device.ts'
import { openFile } from '../../block/file.ts'
import { convertToQcow2, copyDevice } from '../../qcow2/convert.ts'
import { Qcow2Image } from '../../qcow2/image.ts'
import { command, type Context, type OptionValues } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { concatenated } from '../image/concatenated.ts'
import { asksForHelp, createHelp, isCreatable, layoutOf, parseCreateOptions, type CreateValues } from '../image/create-options.ts'
import { makeImage } from '../image/new-image.ts'
import { reasonOf, resolveBacking, type OpenedImage } from '../image/open.ts'
import { forceShareOption, isDirect, objectOption, openerFor, progressOption, quietOption } from '../image/options.ts'
import { openSnapshot, snapshotParameter } from '../image/snapshot-parameter.ts'
import { parseImageOpts, parseName, parsePlace } from '../image/spec.ts'
import { contentOf, writeStream } from '../output.ts'
import { parseSize } from '../size.ts'

const options = {
  'source-format': { short: 'f', value: 'FMT', help: 'the format of the source, instead of finding it out' },
  'source-image-opts': { aliases: ['image-opts'], help: 'the sources are not names but options: driver=qcow2,file.filename=...' },
  'source-snapshot': { short: 'l', value: 'SNAPSHOT', help: 'the disk of this snapshot: its name or id, or snapshot.name=NAME, snapshot.id=ID' },
  'source-cache': { short: 'T', value: 'MODE', help: "'none' reads past the page cache" },
  'target-format': { short: 'O', value: 'FMT', help: 'the format to write, qcow2 or raw (default)' },
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
  parallel: { short: 'm', value: 'COUNT', help: 'threads that compress, 1 to 16' },
  'oob-writes': { short: 'W', help: 'accepted for compatibility' },
  'copy-range-offloading': { short: 'C', help: 'accepted for compatibility' },
  rate: { short: 'r', value: 'RATE', help: 'accepted for compatibility; there is no limit' },
  ...forceShareOption,
  ...objectOption,
  ...progressOption,
  ...quietOption,
} as const

export const convertCommand = command({
  name: 'convert',
  summary: 'Copy a disk into a new image, in another format or layout',
  description: [
    'The chain of backing files is flattened unless -B is given. Internal snapshots and VM state are not copied. Several sources are put one behind the other.',
    "A target of '-' writes a raw disk to stdout.",
  ],
  options,
  arguments: [{ name: 'FILENAME', many: true, help: 'the sources, then the target' }],
  examples: [
    { line: 'qcow2 convert -p -O qcow2 disk.raw disk.qcow2', shows: 'raw to qcow2, with progress' },
    { line: 'qcow2 convert -c -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2', shows: 'as small as it gets' },
    { line: 'qcow2 convert -l before-update disk.qcow2 old.raw', shows: 'the disk of a snapshot' },
    { line: 'qcow2 convert disk.qcow2 - | gzip > disk.raw.gz', shows: 'into a pipe' },
  ],
  async run(context) {
    const { options, args, print } = context
    const format = targetFormat(options)
    if (asksForHelp(options['target-options'])) {
      await print(createHelp(format))
      return 0
    }
    const request = checkRequest(context, format)
    const sources: OpenedImage[] = []
    try {
      for (const name of args.slice(0, -1)) sources.push(await openSource(context, name))
      refuseSelf(sources, request.target)
      await copy(context, sources, request)
      return 0
    } finally {
      for (const source of sources.reverse()) await source.close()
    }
  },
})

type ConvertContext = Context<typeof options>

interface Request {
  readonly target: string
  readonly format: 'qcow2' | 'raw'
  readonly values: CreateValues
  readonly sparseSize: number | undefined
  readonly workers: number | undefined
}

function targetFormat(given: OptionValues<typeof options>): 'qcow2' | 'raw' {
  const format = given['target-format'] ?? 'raw'
  if (!isCreatable(format)) throw new ExitError(1, `Unknown file format '${format}'`)
  return format
}

/** Everything that is wrong with a request by itself is found before a file is touched. */
function checkRequest({ options, args }: ConvertContext, format: 'qcow2' | 'raw'): Request {
  const noCreate = options['no-create']
  if (args.length < 2) throw new UsageError('Must specify image file name')
  if (options['target-image-opts'] && !noCreate) throw new UsageError('--target-image-opts requires use of -n flag')
  if (options['target-is-zero'] && !noCreate) throw new UsageError('--target-is-zero requires use of -n flag')
  if (options['skip-broken-bitmaps'] && !options.bitmaps) throw new UsageError('Use of --skip-broken-bitmaps requires --bitmaps')
  if (options.bitmaps && args.length > 2) throw new UsageError('Copying bitmaps only possible with single source')
  if (options.bitmaps && format !== 'qcow2' && !noCreate) throw new ExitError(1, `Format driver '${format}' does not support bitmaps`)
  if (options['source-snapshot'] !== undefined && args.length > 2) throw new UsageError('No support for concatenating multiple snapshot')
  if (options.backing !== undefined && args.length > 2) throw new UsageError('Having a backing file for the target makes no sense when concatenating multiple input images')
  isDirect(options['source-cache'])
  isDirect(options['target-cache'])
  if (options.compress && format !== 'qcow2') throw new ExitError(1, 'Compression not supported for this file format')
  const sparse = options['sparse-size']
  const sparseSize = sparse === undefined ? undefined : parseSize(sparse)
  if (sparse !== undefined && sparseSize === undefined) throw new UsageError(`Invalid buffer size for sparse output specified: '${sparse}'.`)
  const workers = options.parallel === undefined ? undefined : Number(options.parallel)
  if (workers !== undefined && (!Number.isInteger(workers) || workers < 1 || workers > 16)) {
    throw new UsageError('Invalid number of coroutines specified. Must be between 1 and 16.')
  }
  const values = parseCreateOptions(format, options['target-options'])
  if (options.backing !== undefined) values.set('backing_file', options.backing)
  if (options['backing-format'] !== undefined) values.set('backing_fmt', options['backing-format'])
  if (values.has('backing_file') && !values.has('backing_fmt')) throw new ExitError(1, 'backing format must be specified')
  return { target: args.at(-1)!, format, values, sparseSize, workers }
}

async function openSource(context: ConvertContext, name: string): Promise<OpenedImage> {
  const { options } = context
  const how = { readOnly: true, direct: isDirect(options['source-cache']) }
  const opener = openerFor(context)
  const opened = await (options['source-image-opts'] ? opener.spec(parseImageOpts(name), how) : opener.name(name, how, options['source-format']))
  return openSnapshot(opened, snapshotParameter(options['source-snapshot']))
}

function refuseSelf(sources: readonly OpenedImage[], target: string): void {
  const place = target === '-' ? undefined : parseName(target, undefined).place
  if (place?.kind !== 'file') return
  for (let source of sources as readonly (OpenedImage | undefined)[]) {
    for (; source !== undefined; source = source.backing) {
      if (source.place.kind === 'file' && resolve(source.place.path) === resolve(place.path)) {
        throw new ExitError(1, `Could not open '${target}': it is what is to be copied`)
      }
    }
  }
}

async function copy(context: ConvertContext, sources: readonly OpenedImage[], request: Request): Promise<void> {
  const { signal, options } = context
  const source = concatenated(sources.map(({ device }) => device))
  const progress = context.progress()
  const { target } = request
  if (target === '-') {
    await writeStream(context, '-', contentOf(source, signal), source.size, progress)
    return
  }
  const { sparseSize } = request
  const onProgress = ({ done, total }: { done: number; total: number }): void => progress.update(done, total)
  context.leaves(options['no-create'] ? `${target} is partly overwritten` : `${target} is incomplete: delete it`)
  if (options['no-create']) await copyInto(context, source, target, { sparseSize, targetIsZero: options['target-is-zero'] ? true : undefined, signal, onProgress })
  else if (request.format === 'raw') await makeRawCopy(context, source, request, { sparseSize, signal, onProgress })
  else await makeQcow2Copy(context, source, request, onProgress)
  if (options.bitmaps) await copyBitmaps(context, sources[0]!, target)
  progress.finish()
}

type CopyOptions = Parameters<typeof copyDevice>[2]

async function copyInto(context: ConvertContext, source: BlockDevice, target: string, copying: CopyOptions): Promise<void> {
  const { options } = context
  const how = { readOnly: false, direct: isDirect(options['target-cache']) }
  const opener = openerFor(context)
  const opened = await (options['target-image-opts'] ? opener.spec(parseImageOpts(target), how) : opener.name(target, how, options['target-format']))
  try {
    if (opened.device.size < source.size) throw new ExitError(1, 'output file is smaller than input file')
    await copyDevice(source, opened.device, copying)
  } finally {
    await opened.close()
  }
}

async function makeRawCopy(context: ConvertContext, source: BlockDevice, { target }: Request, copying: CopyOptions): Promise<void> {
  await using file = await createFile(context, target)
  await copyDevice(source, file, copying)
}

async function makeQcow2Copy(context: ConvertContext, source: BlockDevice, request: Request, onProgress: (progress: { done: number; total: number }) => void): Promise<void> {
  const { options, signal } = context
  const { target, values, sparseSize, workers } = request
  await checkBacking(context, target, values)
  const needsEngine = ['preallocation', 'data_file', 'encrypt.format', 'encryption'].some((name) => values.has(name))
  if (needsEngine) {
    values.set('size', String(source.size))
    await aboutTarget(target, () => makeImage(target, 'qcow2', values, signal, openerFor(context).settings.secrets))
    const opened = await openerFor(context).name(target, { readOnly: false }, 'qcow2')
    try {
      await copyDevice(source, opened.device, { sparseSize, targetIsZero: true, signal, onProgress })
    } finally {
      await opened.close()
    }
    return
  }
  const layout = await aboutTarget(target, () => Promise.resolve(layoutOf(values)))
  await using file = await createFile(context, target)
  const { preallocation: _, dataFile: __, dataFileRaw: ___, size: ____, ...shape } = layout
  await convertToQcow2(source, file, { ...shape, compressed: options.compress, workers, sparseSize, signal, onProgress })
}

/** A backing file that cannot be opened is found before anything is written. */
async function checkBacking(context: ConvertContext, target: string, values: CreateValues): Promise<void> {
  const name = values.get('backing_file')
  if (name === undefined) return
  const resolved = resolveBacking(parsePlace(target), name)
  try {
    await (await openerFor(context).name(resolved, { readOnly: true }, values.get('backing_fmt'))).close()
  } catch (error) {
    throw new ExitError(1, `Could not open '${target}': Could not open backing file: ${error instanceof Error ? error.message : String(error)}`, { cause: error })
  }
}

async function aboutTarget<T>(target: string, task: () => Promise<T>): Promise<T> {
  try {
    return await task()
  } catch (error) {
    if (error instanceof ExitError) throw new ExitError(1, `${target}: error while converting qcow2: ${error.message}`, { cause: error })
    throw error
  }
}

async function createFile(context: ConvertContext, target: string): Promise<BlockDevice> {
  const place = parsePlace(target)
  if (place.kind !== 'file') throw new ExitError(1, `${target}: images are made in files only; -n writes to what exists`)
  try {
    const file = await openFile(place.path, { create: 'w', direct: isDirect(context.options['target-cache']) })
    return context.wrapDevice?.(file, place.path) ?? file
  } catch (error) {
    throw new ExitError(1, `${target}: error while converting ${context.options['target-format'] ?? 'raw'}: Could not create '${target}': ${reasonOf(error)}`, { cause: error })
  }
}

async function copyBitmaps(context: ConvertContext, source: OpenedImage, target: string): Promise<void> {
  if (source.image === undefined) throw new ExitError(1, `Format driver '${source.format}' does not support bitmaps`)
  const bitmaps = await source.image.bitmaps.list()
  const broken = bitmaps.filter(({ inUse }) => inUse)
  if (broken.length > 0 && !context.options['skip-broken-bitmaps']) {
    throw new ExitError(1, `Cannot copy inconsistent bitmap '${broken[0]!.name}': try --skip-broken-bitmaps, or remove it`)
  }
  await using image = await Qcow2Image.open(parsePlace(target).kind === 'file' ? resolve(target) : target, { references: 'any' })
  for (const { name, granularity, inUse, auto } of bitmaps) {
    if (inUse) {
      context.warn(`Skipping inconsistent bitmap '${name}'`)
      continue
    }
    await image.bitmaps.add({ name, granularity, disabled: true })
    await image.bitmaps.merge(name, source.image.bitmaps.read(name))
    if (auto) await image.bitmaps.enable(name)
  }
}

