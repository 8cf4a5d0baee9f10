import { amendImage } from '../../qcow2/amend.ts'
import { readImageInfo } from '../../qcow2/info.ts'
import { setBackingFile } from '../../qcow2/rebase.ts'
import { command, type Context, type OptionDefinitions } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { asksForHelp, createHelp, isAmendable, parseCreateOptions, switchOf, versionOf, type CreateValues } from '../image/create-options.ts'
import type { ImageFile, Opener, OpenHow } from '../image/open.ts'
import { formatOption, imageOptsOption, isDirect, objectOption, openArgument, openerFor, progressOption, quietOption, specOf } from '../image/options.ts'
import { reasonOf } from '../image/reasons.ts'
import type { ImageSpec } from '../image/spec.ts'

export const amendCommand = command({
  name: 'amend',
  summary: 'Change properties of an existing image',
  description: ["compat, refcount_bits, lazy_refcounts, data_file, data_file_raw (only off), size, backing_file and backing_fmt can change. '-o help' lists them."],
  options: {
    options: { short: 'o', value: 'OPTIONS', many: true, help: 'what is to change, for example compat=0.10,refcount_bits=16' },
    cache: { short: 't', value: 'MODE', help: "'none' goes past the page cache" },
    force: { help: 'accepted for compatibility' },
    ...formatOption,
    ...imageOptsOption,
    ...objectOption,
    ...progressOption,
    ...quietOption,
  },
  arguments: [{ name: 'FILENAME', optional: true, help: 'the image' }],
  examples: [
    { line: 'qcow2 amend -o compat=0.10 disk.qcow2', shows: 'for very old readers' },
    { line: 'qcow2 amend -o refcount_bits=64 disk.qcow2', shows: 'room for many snapshots' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    if (options.options.length === 0) throw new UsageError('Must specify options (-o)')
    if (asksForHelp(options.options)) {
      await print(createHelp('qcow2', 'amend'))
      return 0
    }
    if (args.length === 0) throw new UsageError('Expecting one image file name')
    const opener = openerFor(context)
    const how = { readOnly: false, direct: isDirect(options.cache) }
    const file = await openSettled(opener, specOf(context), how)
    const progress = context.progress()
    try {
      if (file.format !== 'qcow2') throw new ExitError(1, "Format driver 'raw' does not support option amendment")
      const values = parseCreateOptions('qcow2', options.options)
      for (const name of values.keys()) {
        if (!isAmendable(name)) throw new ExitError(1, `Invalid parameter '${name}'\nThis option is only supported for image creation`)
      }
      const bits = Number(values.get('refcount_bits') ?? 16)
      if (![1, 2, 4, 8, 16, 32, 64].includes(bits)) throw new ExitError(1, 'Refcount width must be a power of two and may not exceed 64 bits')
      context.leaves(`${file.filename} is as before, or as asked but for some leaked clusters: check -r leaks frees them`)
      await amendImage(file.host, { ...changes(values), signal })
    } catch (error) {
      if (error instanceof ExitError || error instanceof UsageError || signal.aborted) throw error
      throw new ExitError(1, reasonOf(error), { cause: error })
    } finally {
      await file.host.close()
    }
    await amendThroughEngine(context)
    progress.finish()
    return 0
  },
})

/** The file, after the refcounts that its last writer postponed were set right: opening the image for writing does. */
async function openSettled(opener: Opener, spec: ImageSpec, how: OpenHow): Promise<ImageFile> {
  const file = await opener.file(spec, how)
  const dirty = await (file.format === 'qcow2' ? readImageInfo(file.host).then((info) => info.dirty, () => false) : false)
  if (!dirty) return file
  await file.host.close()
  await (await opener.spec(spec, { ...how, withoutBacking: true })).close()
  return opener.file(spec, how)
}

/** What needs the image open: its size and its backing file. */
async function amendThroughEngine<O extends OptionDefinitions>(context: Context<O>): Promise<void> {
  const values = parseCreateOptions('qcow2', (context.options as { readonly options?: readonly string[] }).options ?? [])
  const [size, file, format] = ['size', 'backing_file', 'backing_fmt'].map((name) => values.get(name))
  if (size === undefined && file === undefined) return
  const opened = await openArgument(context, { readOnly: false, withoutBacking: size === undefined })
  try {
    if (size !== undefined && Number(size) < opened.device.size) throw new ExitError(1, 'Use qcow2 resize --shrink to make a disk smaller')
    if (size !== undefined) await opened.device.resize(Math.ceil(Number(size) / 512) * 512)
    if (file === undefined || opened.image === undefined) return
    if (format === undefined) throw new ExitError(1, 'backing format must be specified')
    await setBackingFile(opened.image, file === '' ? undefined : { file, format })
  } finally {
    await opened.close()
  }
}

function changes(values: CreateValues): Parameters<typeof amendImage>[1] {
  const compat = values.get('compat')
  const refcountBits = values.get('refcount_bits')
  const raw = switchOf(values, 'data_file_raw')
  if (raw === true) throw new ExitError(1, 'data-file-raw cannot be set on existing images')
  return {
    version: compat === undefined ? undefined : versionOf(compat),
    refcountBits: refcountBits === undefined ? undefined : Number(refcountBits),
    lazyRefcounts: switchOf(values, 'lazy_refcounts'),
    dataFile: values.get('data_file'),
    dataFileRaw: raw === undefined ? undefined : false,
  }
}

