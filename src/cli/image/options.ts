/** The options that many commands share, and what they come to. */
import type { Context, OptionDefinitions } from '../command.ts'
import { referenceRules } from '../../qcow2/references.ts'
import { UsageError } from '../errors.ts'
import { didYouMean } from '../nearest.ts'
import { say } from '../terminal.ts'
import { Opener } from './open.ts'
import type { NamedFile, OpenedImage } from './opened.ts'
import type { OpenHow } from './open-settings.ts'
import { parseSecrets } from './secrets.ts'
import { parseImageOpts, parseName, type ImageSpec } from './spec.ts'

/** `-f`. */
export const formatOption = { format: { short: 'f', value: 'FMT', help: 'the format of FILENAME, qcow2 or raw, instead of finding it out' } } as const
/** `--image-opts`. */
export const imageOptsOption = { 'image-opts': { help: 'FILENAME is not a name but options: driver=qcow2,file.filename=...' } } as const
/** `-U`. */
export const forceShareOption = { 'force-share': { short: 'U', help: 'read the image even while a running QEMU writes to it' } } as const
/** `--object` and `--references`: what every command takes that opens images. */
export const objectOption = {
  object: { value: 'OBJDEF', many: true, help: "a secret for an encrypted image: 'secret,id=ID,file=PATH' (or data=TEXT)" },
  references: {
    value: 'RULE',
    choices: ['none', 'tree', 'any'],
    help: "which other files an image may name: 'none'; 'tree' (default): files in its directory or below, none that is hidden, read-only, no protocols, formats never guessed; 'any'. Called qemu-img the default is 'any'",
  },
} as const
/** `--output`. */
export const outputOption = { output: { value: 'FORMAT', choices: ['human', 'json'], help: "'human' (default) or 'json'" } } as const
/** `-q`. */
export const quietOption = { quiet: { short: 'q', help: 'print nothing but errors' } } as const
/** `-p`. */
export const progressOption = {
  progress: { short: 'p', value: 'STYLE', optional: true, choices: ['human', 'json'], help: "show progress; --progress=json writes JSON lines to stderr" },
} as const

/** What `-t` and `-T` may be. Only whether the page cache is used matters here: results are flushed in any case. */
const cacheModes = ['none', 'writeback', 'writethrough', 'directsync', 'unsafe'] as const

/** True if a cache mode goes past the page cache. @throws UsageError for one that is not known */
export function isDirect(mode: string | undefined): boolean {
  if (mode !== undefined && !cacheModes.some((known) => known === mode)) {
    throw new UsageError(`Invalid cache option: ${mode}${didYouMean(mode, cacheModes)}`)
  }
  return mode === 'none' || mode === 'directsync'
}

interface CommonValues {
  readonly 'force-share'?: boolean
  readonly object?: readonly string[]
  readonly references?: string | undefined
  readonly 'image-opts'?: boolean
  readonly format?: string | undefined
}

/** The file of the image that FILENAME names, without its format opened, and the snapshot after it. */
export async function fileArgument<O extends OptionDefinitions>(context: Context<O>, how: OpenHow): Promise<NamedFile> {
  const options = context.options as CommonValues
  const opener = openerFor(context)
  if (options['image-opts'] !== true) return opener.fileAt(context.args[0]!, how, options.format)
  const spec = specOf(context)
  return { spec, file: await opener.file(spec, how), snapshot: undefined }
}

/** An opener as the options ask for it. */
export function openerFor<O extends OptionDefinitions>(context: Context<O>): Opener {
  const options = context.options as CommonValues
  const { signal, warn, terminal } = context
  return new Opener({
    signal,
    warn,
    secrets: parseSecrets(options.object ?? []),
    // scripts know that qemu-img fails where the key is not given
    askSecret: terminal.program === 'qemu-img' ? undefined : terminal.askSecret,
    references: referenceRules.find((rule) => rule === options.references) ?? (terminal.program === 'qemu-img' ? 'any' : 'tree'),
    forceShare: options['force-share'],
    told: (lines) => lines.forEach((line) => void say(terminal, line)),
    wrap: context.wrapDevice,
    nameTwice: terminal.program === 'qemu-img',
  })
}

/** What the first argument (or `name`) means, with `-f` and `--image-opts` applied. */
export function specOf<O extends OptionDefinitions>(context: Context<O>, name: string = context.args[0]!): ImageSpec {
  const options = context.options as CommonValues
  if (options['image-opts'] !== true) return parseName(name, options.format)
  if (options.format !== undefined) throw new UsageError('--image-opts and --format are mutually exclusive')
  return parseImageOpts(name)
}

/** The image that the first argument (or `name`) means, with `-f` and `--image-opts` applied. */
export function openArgument<O extends OptionDefinitions>(context: Context<O>, how: OpenHow, name: string = context.args[0]!): Promise<OpenedImage> {
  const opener = openerFor(context)
  const options = context.options as CommonValues
  if (options['image-opts'] === true) return opener.spec(specOf(context, name), how)
  return opener.name(name, how, options.format)
}
