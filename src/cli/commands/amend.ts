import type { BlockDevice } from '../../block/device.ts'
import { UnsupportedError } from '../../core/errors.ts'
import { amendImage } from '../../qcow2/amend.ts'
import { readImageInfo } from '../../qcow2/info.ts'
import { command, type Context, type OptionDefinitions } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { amendedVersion, refuseAmendment } from '../image/amend-rules.ts'
import { asksForHelp, createHelp, parseCreateOptions, switchOf, type CreateValues } from '../image/create-options.ts'
import { keySlotChange } from '../image/key-slots.ts'
import type { ImageFile } from '../image/opened.ts'
import type { Opener } from '../image/open.ts'
import type { OpenHow } from '../image/open-settings.ts'
import { formatOption, imageOptsOption, isDirect, objectOption, openArgument, openerFor, progressOption, quietOption, specOf } from '../image/options.ts'
import { reasonOf } from '../image/reasons.ts'
import type { ImageSpec } from '../image/spec.ts'

export const amendCommand = command({
  name: 'amend',
  summary: 'Change properties of an existing image',
  description: ["compat, refcount_bits, lazy_refcounts, data_file, data_file_raw (only off), size and the passphrases of LUKS (encrypt.*) can change; rebase changes the backing file. '-o help' lists them."],
  options: {
    options: { short: 'o', value: 'OPTIONS', many: true, help: 'what is to change, for example compat=0.10,refcount_bits=16' },
    cache: { short: 't', value: 'MODE', help: "'none' goes past the page cache" },
    force: { help: 'overwrite a key slot in use, or erase the last one: then nothing opens the image any more' },
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
    {
      line: 'qcow2 amend --object secret,id=old,file=old.txt --object secret,id=new,file=new.txt --image-opts driver=qcow2,encrypt.key-secret=old,file.filename=disk.qcow2 -o encrypt.state=active,encrypt.new-secret=new',
      shows: 'let another passphrase open an encrypted image',
    },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    if (options.options.length === 0) throw new UsageError('Must specify options (-o)')
    if (asksForHelp(options.options)) {
      await print(createHelp('qcow2', 'amend'))
      return 0
    }
    if (args.length === 0) throw new UsageError('Expecting one image file name')
    const values = parseCreateOptions('qcow2', options.options, true)
    const progress = context.progress()
    const size = values.get('size')
    const { secrets } = openerFor(context).settings
    const { isDowngrade, changeKeys } = await inFile(context, async (file) => {
      const image = await readImageInfo(file)
      refuseAmendment(values, image)
      const keys = { secrets, keySecret: specOf(context).keySecret, force: options.force, signal }
      return { isDowngrade: image.version === 3 && amendedVersion(values) === 2, changeKeys: keySlotChange(values, image, keys) }
    })
    context.leaves(`${args[0]} is as before, or as asked but for some leaked clusters: check -r leaks frees them`)
    if (changeKeys !== undefined) await inFile(context, changeKeys)
    // version 2 neither changes its size when it has snapshots nor holds those of other sizes
    if (size !== undefined && isDowngrade) await resize(context, Number(size))
    await inFile(context, (file) => amendImage(file, { ...changes(values), onProgress: ({ done, total }) => progress.update(done, total), signal }))
    if (size !== undefined && !isDowngrade) await resize(context, Number(size))
    progress.finish()
    return 0
  },
})

/** Does something with the file of the image, closes it, and says in qemu-img's words why it failed. */
async function inFile<O extends OptionDefinitions, T>(context: Context<O>, work: (file: BlockDevice) => Promise<T>): Promise<T> {
  const { cache } = context.options as { readonly cache?: string | undefined }
  const file = await openSettled(openerFor(context), specOf(context), { readOnly: false, direct: isDirect(cache) })
  try {
    if (file.format !== 'qcow2') throw new ExitError(1, `Format driver '${file.format}' does not support option amendment`)
    return await work(file.host)
  } catch (error) {
    if (error instanceof ExitError || error instanceof UsageError || context.signal.aborted) throw error
    throw new ExitError(1, downgradeReason(error) ?? reasonOf(error), { cause: error })
  } finally {
    await file.host.close()
  }
}

function downgradeReason(error: unknown): string | undefined {
  if (!(error instanceof UnsupportedError)) return undefined
  const isAbout = (words: string) => error.features.some((feature) => feature.includes(words))
  if (isAbout('compressed clusters')) return 'Cannot downgrade an image with zstd compression type and existing compressed clusters'
  return isAbout('of snapshot') ? 'Internal snapshots prevent downgrade of image' : undefined
}

/** The file, after the refcounts that its last writer postponed were set right: opening the image for writing does. */
async function openSettled(opener: Opener, spec: ImageSpec, how: OpenHow): Promise<ImageFile> {
  const file = await opener.file(spec, how)
  const dirty = await (file.format === 'qcow2' ? readImageInfo(file.host).then((info) => info.dirty, () => false) : false)
  if (!dirty) return file
  await file.host.close()
  await (await opener.spec(spec, { ...how, withoutBacking: true })).close()
  return opener.file(spec, how)
}

/** Changes the size of the disk, rounded up to sectors. */
async function resize<O extends OptionDefinitions>(context: Context<O>, size: number): Promise<void> {
  const opened = await openArgument(context, { readOnly: false })
  try {
    await opened.device.resize(Math.ceil(size / 512) * 512)
  } finally {
    await opened.close()
  }
}

function changes(values: CreateValues): Parameters<typeof amendImage>[1] {
  const refcountBits = values.get('refcount_bits')
  return {
    version: amendedVersion(values),
    refcountBits: refcountBits === undefined ? undefined : Number(refcountBits),
    lazyRefcounts: switchOf(values, 'lazy_refcounts'),
    dataFile: values.get('data_file'),
    dataFileRaw: switchOf(values, 'data_file_raw') === false ? false : undefined,
  }
}
