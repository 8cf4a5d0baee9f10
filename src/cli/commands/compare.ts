import type { CallOptions, Extent, MapOptions } from '../../block/device.ts'
import { FilterDevice } from '../../block/filter.ts'
import { compareDevices, type Comparison } from '../../qcow2/compare.ts'
import { command } from '../command.ts'
import { ExitError, UsageError, WriteError } from '../errors.ts'
import type { OpenedImage } from '../image/opened.ts'
import { forceShareOption, imageOptsOption, isDirect, objectOption, openerFor, progressOption, quietOption } from '../image/options.ts'
import { reasonOf } from '../image/reasons.ts'
import { parseImageOpts } from '../image/spec.ts'

export const compareCommand = command({
  name: 'compare',
  summary: 'Compare the content of two disks',
  description: ['Where one disk is longer, what it has more must be zeroes. Images of different formats, sizes and layouts may be equal.'],
  options: {
    'a-format': { short: 'f', value: 'FMT', help: 'the format of FILENAME1' },
    'b-format': { short: 'F', value: 'FMT', help: 'the format of FILENAME2' },
    ...imageOptsOption,
    strict: { short: 's', help: 'the sizes must be equal too, and what is allocated' },
    cache: { short: 'T', value: 'MODE', help: "'none' goes past the page cache" },
    ...forceShareOption,
    ...objectOption,
    ...progressOption,
    ...quietOption,
  },
  arguments: [
    { name: 'FILENAME1', help: 'an image' },
    { name: 'FILENAME2', help: 'the other' },
  ],
  exitCodes: { 0: 'the disks are equal', 1: 'they differ', 2: 'an image could not be opened', 3: 'the map of an image could not be read', 4: 'an image could not be read' },
  failure: (error) => (error instanceof ExitError && !(error instanceof WriteError) ? error.exitCode : 4),
  examples: [
    { line: 'qcow2 compare disk.qcow2 disk.raw', shows: 'whether a conversion was right' },
    { line: 'qcow2 compare disk.qcow2 disk.qcow2@yesterday', shows: 'whether a disk has changed since a snapshot' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    const how = { readOnly: true, direct: isDirect(options.cache) }
    const opener = openerFor(context)
    const open = async (name: string, format: string | undefined): Promise<OpenedImage> => {
      if (options['image-opts'] && format !== undefined) throw new UsageError('--image-opts and --a-format or --b-format are mutually exclusive')
      try {
        return await (options['image-opts'] ? opener.spec(parseImageOpts(name), how) : opener.name(name, how, format))
      } catch (error) {
        if (error instanceof ExitError) throw new ExitError(2, error.message, { cause: error })
        throw error
      }
    }
    const a = await open(args[0]!, options['a-format'])
    try {
      const b = await open(args[1]!, options['b-format'])
      try {
        const progress = context.progress()
        const shorter = Math.min(a.device.size, b.device.size)
        // told where the common part is equal
        const warn = async (offset: number): Promise<void> => {
          if (!options.quiet && !options.strict && a.device.size !== b.device.size && offset >= shorter) await print(sizeWarning)
        }
        const result = await compareDevices(new NamedDevice(a), new NamedDevice(b), { strict: options.strict, signal, onProgress: ({ done, total }) => progress.update(done, total) }).catch(async (error: unknown) => {
          if (error instanceof PlaceError) await warn(error.offset)
          throw error
        })
        progress.finish()
        await warn(result.equal ? shorter : result.offset)
        if (!options.quiet) for (const line of resultLines(result)) await print(line)
        return result.equal ? 0 : 1
      } finally {
        await b.close()
      }
    } finally {
      await a.close()
    }
  },
})

/** A failure somewhere on a disk. */
class PlaceError extends ExitError {
  readonly offset: number

  constructor(exitCode: number, offset: number, message: string, options: ErrorOptions) {
    super(exitCode, message, options)
    this.offset = offset
  }
}

/** The disk of an image, whose failures say in qemu-img's words what failed where. */
class NamedDevice extends FilterDevice {
  readonly #name: string

  constructor({ device, filename }: OpenedImage) {
    super(device)
    this.#name = filename
  }

  protected override async onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    try {
      await super.onRead(offset, target, options)
    } catch (error) {
      options?.signal?.throwIfAborted()
      throw new PlaceError(4, offset, `Error while reading offset ${offset} of ${this.#name}: ${reasonOf(error)}`, { cause: error })
    }
  }

  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    try {
      yield* super.onMap(offset, length, options)
    } catch (error) {
      options?.signal?.throwIfAborted()
      throw new PlaceError(3, offset, `Sector allocation test failed for ${this.#name}: ${reasonOf(error)}`, { cause: error })
    }
  }
}

const sizeWarning = 'Warning: Image size mismatch!'

function resultLines(result: Comparison): string[] {
  if (result.equal) return ['Images are identical.']
  if (result.reason === 'size') return ['Strict mode: Image size mismatch!']
  if (result.reason === 'allocation') return [`Strict mode: Offset ${result.offset} block status mismatch!`]
  return [`Content mismatch at offset ${result.offset}!`]
}
