import type { BlockDevice } from '../../block/device.ts'
import { MemoryDevice } from '../../block/memory.ts'
import { convertToQcow2 } from '../../qcow2/convert.ts'
import { copyDevice } from '../../qcow2/copy.ts'
import { Qcow2Image } from '../../qcow2/image.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { concatenated } from '../image/concatenated.ts'
import { asksForHelp, createHelp, layoutOf, preallocationOf } from '../image/create-options.ts'
import { warnOfRaw } from '../image/formats.ts'
import { beginImage, refuseSelf, refuseSelfAt } from '../image/new-image.ts'
import { resolveBacking } from '../image/names.ts'
import type { OpenedImage } from '../image/opened.ts'
import { isDirect, openerFor } from '../image/options.ts'
import { openSnapshot, snapshotParameter } from '../image/snapshot-parameter.ts'
import { salvaged } from '../image/salvage.ts'
import { parseImageOpts, parsePlace } from '../image/spec.ts'
import { contentOf, writeStream } from '../output.ts'
import { isPipe } from '../payload.ts'
import { copyFromPipe, readsPipe, sendImage } from './convert-pipe.ts'
import { aboutTarget, backingSize, checkRequest, convertOptions, intoTarget, needsEngine, shapeOf, targetFormat, type ConvertContext, type Request } from './convert-request.ts'

export const convertCommand = command({
  name: 'convert',
  summary: 'Copy a disk into a new image, in another format or layout',
  description: [
    'The chain of backing files is flattened unless -B is given. Internal snapshots and VM state are not copied. Several sources are put one behind the other.',
    "A target of '-' is stdout. A qcow2 image is sent there in two passes over the source: the first finds out what its header must say.",
    "A source of '-' is stdin: any image where it is a file, a raw disk (with -f raw) where it is a pipe.",
  ],
  options: convertOptions,
  arguments: [{ name: 'FILENAME', many: true, optional: true, help: 'the sources, then the target' }],
  payload: (args) => (args.length < 2 ? undefined : args.at(-1)),
  examples: [
    { line: 'qcow2 convert -p -O qcow2 disk.raw disk.qcow2', shows: 'raw to qcow2, with progress' },
    { line: 'qcow2 convert -c -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2', shows: 'as small as it gets' },
    { line: 'qcow2 convert -l before-update disk.qcow2 old.raw', shows: 'the disk of a snapshot' },
    { line: 'qcow2 convert disk.qcow2 - | gzip > disk.raw.gz', shows: 'the raw disk into a pipe' },
    { line: "qcow2 convert -O qcow2 -c disk.raw - | ssh host 'cat > disk.qcow2'", shows: 'an image into a pipe' },
    { line: 'gunzip -c disk.raw.gz | qcow2 convert -f raw -O qcow2 - disk.qcow2', shows: 'a raw disk out of a pipe' },
  ],
  async run(context) {
    const { options, args, print } = context
    const format = targetFormat(options)
    if (asksForHelp(options['target-options'])) {
      await print(createHelp(format, args.length === 0 ? 'create' : 'create file'))
      return 0
    }
    const request = checkRequest(context, format)
    if (options['target-format'] === undefined && !options['no-create']) warnOfRaw(context, request.target, '-O')
    if (readsPipe(context)) {
      await copyFromPipe(context, request)
      return 0
    }
    const sources: OpenedImage[] = []
    try {
      for (const name of args.slice(0, -1).map((name) => (name === '-' ? context.terminal.stdinFile! : name))) sources.push(await openSource(context, name))
      await refuseSelf(sources, request.target)
      if (options.bitmaps) await refuseBroken(context, sources[0]!)
      await copy(context, sources, request)
      return 0
    } finally {
      for (const source of sources.reverse()) await source.close()
    }
  },
})

async function openSource(context: ConvertContext, name: string): Promise<OpenedImage> {
  const { options } = context
  const how = { readOnly: true, direct: isDirect(options['source-cache']) }
  const opener = openerFor(context)
  const opened = await (options['source-image-opts'] ? opener.spec(parseImageOpts(name), how) : opener.name(name, how, options['source-format']))
  return openSnapshot(opened, snapshotParameter(options['source-snapshot']))
}

async function copy(context: ConvertContext, sources: readonly OpenedImage[], request: Request): Promise<void> {
  const { signal, options } = context
  const disk = concatenated(sources.map(({ device }) => device))
  const source = options.salvage ? salvaged(disk, context.warn, context.terminal.program === 'qemu-img') : disk
  const progress = context.progress()
  const { target } = request
  if (isPipe(target) && !options['no-create']) {
    if (request.format === 'raw') await writeStream(context, target, contentOf(source, signal), source.size, progress)
    else if (request.format === 'luks') throw new UsageError('a LUKS volume cannot be sent into a pipe')
    else await sendImage(context, source, request, progress)
    return
  }
  const { sparseSize } = request
  const onProgress = ({ done, total }: { done: number; total: number }): void => progress.update(done, total)
  if (options['no-create']) await copyInto(context, source, sources, target, { sparseSize, targetIsZero: options['target-is-zero'] ? true : undefined, signal, onProgress })
  else if (request.format === 'raw') await makeRawCopy(context, source, request, { sparseSize, signal, onProgress })
  // all of the disk is written, zeroes too: what is not would read as random bytes
  else if (request.format === 'luks') await copyIntoNew(context, source, sources[0]!, request, { sparseSize: 0, signal, onProgress })
  else await makeQcow2Copy(context, source, sources[0]!, request, onProgress)
  progress.finish()
}

type CopyOptions = Parameters<typeof copyDevice>[2]

async function copyInto(context: ConvertContext, source: BlockDevice, sources: readonly OpenedImage[], target: string, copying: CopyOptions): Promise<void> {
  const { options } = context
  const how = { readOnly: false, direct: isDirect(options['target-cache']) }
  const opener = openerFor(context)
  const opened = await (options['target-image-opts'] ? opener.spec(parseImageOpts(target), how) : opener.name(target, how, options['target-format']))
  try {
    for (const { identity } of [opened.host, ...(opened.image === undefined ? [] : [opened.image.engine.data.device])]) refuseSelfAt(sources, target, identity)
    context.leaves(`${target} is partly overwritten`)
    if (opened.device.size < source.size) throw new ExitError(1, 'output file is smaller than input file')
    if (options.compress && opened.image === undefined) throw new ExitError(1, 'Compression not supported for this file format')
    const skipBacking = options.backing !== undefined && opened.backing !== undefined
    await copyDevice(source, opened.device, { ...copying, skipBacking, compressed: options.compress })
    if (options.bitmaps && opened.image !== undefined) await copyBitmaps(context, sources[0]!, opened.image)
  } finally {
    await opened.close()
  }
}

async function makeRawCopy(context: ConvertContext, source: BlockDevice, { target, values }: Request, copying: CopyOptions): Promise<void> {
  const how = preallocationOf(values) === 'off' ? copying : { ...copying, sparseSize: 0 }
  await intoTarget(context, target, (file) => copyDevice(source, file, how))
}

/** Makes an image and copies into it. */
async function copyIntoNew(context: ConvertContext, source: BlockDevice, from: OpenedImage, { target, format, values }: Request, copying: CopyOptions): Promise<void> {
  const opener = openerFor(context)
  const { secrets } = opener.settings
  values.set('size', String(source.size))
  const backing = values.get('backing_file')
  const below = async (): Promise<BlockDevice> =>
    (await opener.name(resolveBacking(parsePlace(target), backing!), { readOnly: true }, values.get('backing_fmt'))).device
  const made = await aboutTarget(target, () => beginImage({ ...context, secrets }, target, format, values, below), format)
  try {
    await copyDevice(source, made.disk, copying)
    if (context.options.bitmaps && made.image !== undefined) await copyBitmaps(context, from, made.image)
    await made.keep()
  } finally {
    await made.discard()
  }
}

async function makeQcow2Copy(context: ConvertContext, source: BlockDevice, from: OpenedImage, request: Request, onProgress: (progress: { done: number; total: number }) => void): Promise<void> {
  const { options, signal } = context
  const { target, values, sparseSize, workers } = request
  const below = await backingSize(context, target, values)
  if (needsEngine(values)) {
    const skipBacking = values.has('backing_file')
    return copyIntoNew(context, source, from, request, { sparseSize, skipBacking, targetIsZero: !skipBacking, signal, onProgress })
  }
  const layout = await aboutTarget(target, () => Promise.resolve(layoutOf(values)))
  await intoTarget(context, target, async (file) => {
    await convertToQcow2(source, file, { ...shapeOf(layout), backingSize: below, compressed: options.compress, workers, sparseSize, signal, onProgress })
    if (!options.bitmaps) return
    await using image = await Qcow2Image.open(file, { references: () => new MemoryDevice(0) })
    await copyBitmaps(context, from, image)
  })
}

/** Bitmaps that cannot be copied are found before the target is made. */
async function refuseBroken({ options, terminal }: ConvertContext, { image, format }: OpenedImage): Promise<void> {
  if (image === undefined) throw new ExitError(1, `Format driver '${format}' does not support bitmaps`)
  const broken = (await image.bitmaps.list()).reverse().find(({ inUse }) => inUse)
  if (broken === undefined || options['skip-broken-bitmaps']) return
  throw new ExitError(1, `Cannot copy inconsistent bitmap '${broken.name}'\nTry --skip-broken-bitmaps, or use '${terminal.program} bitmap --remove' to delete it`)
}

async function copyBitmaps(context: ConvertContext, source: OpenedImage, image: Qcow2Image): Promise<void> {
  if (source.image === undefined) return
  const bitmaps = await source.image.bitmaps.list()
  // the last one first, as QEMU looks at them
  for (const { name } of bitmaps.filter(({ inUse }) => inUse).reverse()) context.warn(`Skipping inconsistent bitmap '${name}'`)
  for (const { name, granularity, inUse, auto } of bitmaps) {
    if (inUse) continue
    await image.bitmaps.add({ name, granularity, disabled: true })
    await image.bitmaps.merge(name, source.image.bitmaps.read(name))
    if (auto) await image.bitmaps.enable(name)
  }
}
