import { command, type Context, type OptionDefinitions } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { asksForHelp, createHelp, formattingLine, parseCreateOptions, type CreateValues } from '../image/create-options.ts'
import { imageFormats, isImageFormat, warnOfRaw, type ImageFormat } from '../image/formats.ts'
import { refuseLoops } from '../image/loops.ts'
import { makeImage } from '../image/new-image.ts'
import { resolveBacking } from '../image/names.ts'
import { objectOption, openerFor, quietOption } from '../image/options.ts'
import { reasonOf } from '../image/reasons.ts'
import { parseSecrets } from '../image/secrets.ts'
import { parsePlace } from '../image/spec.ts'
import { didYouMean } from '../nearest.ts'
import { newImageSize } from '../size.ts'

export const createCommand = command({
  name: 'create',
  summary: 'Make a new image',
  description: [
    'An existing file is replaced when the new image is whole; one that is in use is not. SIZE takes the suffixes b, K, M, G, T, P and E; an overlay without SIZE is as large as its backing file.',
    "'-o help' lists what -o takes.",
  ],
  options: {
    format: { short: 'f', value: 'FMT', help: 'qcow2, luks or raw (default)' },
    options: { short: 'o', value: 'OPTIONS', many: true, help: "options of the format, for example cluster_size=4k,lazy_refcounts=on ('-o help' lists them)" },
    backing: { short: 'b', value: 'FILENAME', file: true, help: 'make an overlay on top of this image' },
    'backing-format': { short: 'F', value: 'FMT', help: 'format of the backing file; it is never guessed' },
    'backing-unsafe': { short: 'u', help: 'do not look at the backing file' },
    ...objectOption,
    ...quietOption,
  },
  arguments: [
    { name: 'FILENAME', optional: true, help: 'the image to make' },
    { name: 'SIZE', optional: true, word: true, help: 'size of the disk' },
  ],
  // the name - is that of a file here
  payload: ([name]) => (name === '-' ? undefined : name),
  signedLast: true,
  examples: [
    { line: 'qcow2 create -f qcow2 disk.qcow2 20G', shows: 'an empty disk of 20 GiB' },
    { line: 'qcow2 create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2', shows: 'an overlay: writes go to it, the base stays as it is' },
    { line: 'qcow2 create -f qcow2 -o cluster_size=2M,preallocation=metadata big.qcow2 1T', shows: 'large clusters, all of them mapped' },
  ],
  async run(context) {
    const { options, args, print, terminal } = context
    const format = options.format ?? 'raw'
    if (!isImageFormat(format)) throw new ExitError(1, `${args[0] ?? ''}: Unknown file format '${format}'${didYouMean(format, imageFormats)}`)
    if (asksForHelp(options.options)) {
      await print(createHelp(format, args.length === 0 ? 'create' : 'create file'))
      return 0
    }
    const [filename] = args
    if (filename === undefined) throw new UsageError('Expecting image file name')
    if (options.format === undefined) warnOfRaw(context, filename, '-f')
    const size = args[1] === undefined ? undefined : newImageSize(args[1])
    const values = await about(filename, async () => gatherValues(context, format, filename, size))
    if (!options.quiet) await print(formattingLine(filename, format, values))
    // before an error, as qemu-img does
    await terminal.stdout.flush?.()
    await about(filename, () => makeImage({ ...context, secrets: parseSecrets(options.object) }, filename, format, values))
    return 0
  },
})

/** Failures that name the image they are about. */
async function about<T>(filename: string, task: () => Promise<T>): Promise<T> {
  try {
    return await task()
  } catch (error) {
    if (error instanceof ExitError) throw new ExitError(error.exitCode, `${filename}: ${error.message}`, { cause: error })
    if (error instanceof UsageError) throw new UsageError(`${filename}: ${error.message}`)
    throw error
  }
}

interface CreateFlags {
  readonly options: readonly string[]
  readonly backing: string | undefined
  readonly 'backing-format': string | undefined
  readonly 'backing-unsafe': boolean
}

async function gatherValues<O extends OptionDefinitions>(
  context: Context<O>,
  format: ImageFormat,
  filename: string,
  size: string | undefined,
): Promise<CreateValues> {
  const options = context.options as unknown as CreateFlags
  const values = parseCreateOptions(format, options.options)
  if (format !== 'qcow2' && options.backing !== undefined) throw new ExitError(1, `Backing file not supported for file format '${format}'`)
  if (options.backing !== undefined) values.set('backing_file', options.backing)
  if (options['backing-format'] !== undefined) values.set('backing_fmt', options['backing-format'])
  if (size !== undefined && values.has('size')) throw new ExitError(1, 'The image size must be specified only once')
  if (size !== undefined) values.set('size', size)
  const backing = values.get('backing_file')
  await refuseLoops(filename, values)
  if (backing !== undefined && !options['backing-unsafe']) await lookAtBacking(context, filename, backing, values)
  if (!values.has('size')) throw new ExitError(1, 'Image creation needs a size parameter')
  return values
}

/** Opens the backing file, so that an overlay on nothing is refused, and takes its size. */
async function lookAtBacking<O extends OptionDefinitions>(context: Context<O>, filename: string, name: string, values: CreateValues): Promise<void> {
  const format = values.get('backing_fmt')
  const resolved = resolveBacking(parsePlace(filename), name)
  const backing = await openerFor(context)
    .below(resolved, format)
    .catch((error: unknown) => {
      const cause = error instanceof ExitError ? error.cause : error
      if (format !== undefined && !isImageFormat(format)) throw new ExitError(1, `Unknown driver '${format}'\nCould not open backing image.`)
      throw new ExitError(1, `Could not open '${resolved}': ${reasonOf(cause)}\nCould not open backing image.`, { cause })
    })
  if (format === undefined) throw new ExitError(1, `Backing file specified without backing format\nDetected format of ${backing.format}.`)
  if (!values.has('size')) values.set('size', String(backing.size))
}
