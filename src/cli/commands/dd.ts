import { pad } from '../../block/pad.ts'
import { slice } from '../../block/slice.ts'
import type { BlockDevice } from '../../block/device.ts'
import { convertToQcow2 } from '../../qcow2/convert.ts'
import { convertToQcow2Stream } from '../../qcow2/convert-stream.ts'
import { copyDevice } from '../../qcow2/copy.ts'
import { command, type Context } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { warnOfRaw } from '../image/formats.ts'
import { refuseSelf } from '../image/new-image.ts'
import { intoNewTarget, targetPlace } from '../image/new-target.ts'
import { openerFor, forceShareOption, imageOptsOption, objectOption } from '../image/options.ts'
import { rawImage } from '../image/raw.ts'
import { parseImageOpts, parsePlace } from '../image/spec.ts'
import { didYouMean } from '../nearest.ts'
import { contentOf, writeStream } from '../output.ts'
import { isPipe, withPayload } from '../payload.ts'
import type { Progress } from '../progress.ts'
import { parseSize } from '../size.ts'

const operandNames = ['if', 'of', 'bs', 'count', 'skip'] as const
type OperandName = (typeof operandNames)[number]

export const ddCommand = command({
  name: 'dd',
  summary: 'Copy a part of a disk into a new image',
  description: ['The new disk has the size of what is copied, in whole sectors of 512 bytes. Blocks of zeroes take no space in it.'],
  options: {
    format: { short: 'f', value: 'FMT', help: 'the format of the source, instead of finding it out' },
    'target-format': { short: 'O', value: 'FMT', help: 'the format to write, qcow2 or raw (default)' },
    ...imageOptsOption,
    ...forceShareOption,
    ...objectOption,
  },
  arguments: [{ name: 'OPERAND', many: true, optional: true, help: "if=FILENAME, of=FILENAME ('-' for stdout); bs=SIZE (default 512), and count=BLOCKS, skip=BLOCKS in blocks of this size" }],
  payload: (args) => [...args].reverse().find((word) => word.startsWith('of='))?.slice('of='.length),
  examples: [{ line: 'qcow2 dd -f qcow2 -O raw if=disk.qcow2 of=boot.raw bs=1M count=16', shows: 'the first 16 MiB of a disk' }],
  async run(context) {
    const { options, args } = context
    const format = options['target-format'] ?? 'raw'
    if (format !== 'qcow2' && format !== 'raw') throw new ExitError(1, `Unknown file format '${format}'`)
    const operands = operandsOf(args)
    const [input, output] = [operands.get('if'), operands.get('of')]
    const blockSize = blockSizeOf(operands.get('bs'))
    const [count, skip] = [blocksOf(operands, 'count') ?? Infinity, blocksOf(operands, 'skip') ?? 0]
    if (input === undefined || output === undefined) throw new UsageError('Must specify both input and output files')
    if (options['target-format'] === undefined) warnOfRaw(context, output, '-O')
    const opener = openerFor(context)
    const source = await (options['image-opts'] ? opener.spec(parseImageOpts(input), { readOnly: true }) : opener.name(input, { readOnly: true }, options.format))
    try {
      await refuseSelf([source], output)
      const start = Math.min(skip * blockSize, source.device.size)
      if (skip * blockSize > source.device.size) context.warn(`${input}: cannot skip to specified offset`)
      const part = rawImage(slice(pad(source.device), start, Math.min(count * blockSize, source.device.size - start), { readOnly: true, keepOpen: true }))
      await copy(context, part, { format, output }, context.progress())
      return 0
    } finally {
      await source.close()
    }
  },
})

async function copy(context: Context, part: BlockDevice, { format, output }: { readonly format: 'raw' | 'qcow2'; readonly output: string }, progress: Progress): Promise<void> {
  const { signal, terminal } = context
  const onProgress = ({ done, total }: { done: number; total: number }): void => progress.update(done, total)
  if (isPipe(output)) {
    if (format === 'raw') await writeStream(context, output, contentOf(part, signal), part.size, progress)
    else await withPayload(output, terminal, (send) => convertToQcow2Stream(part, send, { signal, onProgress }))
    return
  }
  const place = targetPlace(parsePlace(output))
  const failed = `${output}: error while creating output image`
  if (place === undefined) throw new ExitError(1, `${failed}: images are made in files and on NBD exports only`)
  await intoNewTarget(context, place, { failed }, (file) =>
    format === 'raw' ? copyDevice(part, file, { signal, onProgress }) : convertToQcow2(part, file, { signal, onProgress }),
  )
}

/** `name=value` words by name; the last one of a name counts. */
function operandsOf(words: readonly string[]): Map<OperandName, string> {
  const operands = new Map<OperandName, string>()
  for (const word of words) {
    const equals = word.indexOf('=')
    const name = equals < 0 ? word : word.slice(0, equals)
    const known = operandNames.find((each) => each === name)
    if (known === undefined || equals < 0) throw new UsageError(`unrecognized operand ${name}${didYouMean(name, operandNames)}`)
    operands.set(known, word.slice(equals + 1))
  }
  return operands
}

function blockSizeOf(text: string | undefined): number {
  if (text === undefined) return 512
  const size = parseSize(text)
  if (size === undefined) throw new UsageError(`Invalid bs specified: '${text}'.`)
  if (size < 1 || size > 0x7fff_ffff) throw new UsageError('Invalid bs specified. Must be between 1 and 2147483647.')
  return size
}

function blocksOf(operands: ReadonlyMap<OperandName, string>, name: 'count' | 'skip'): number | undefined {
  const text = operands.get(name)
  if (text === undefined) return undefined
  if (/^-\d+$/.test(text)) throw new UsageError(`Invalid ${name} specified. Must be between 0 and 9223372036854775807.`)
  if (!/^\d+$/.test(text)) throw new UsageError(`Invalid ${name} specified: '${text}'.`)
  return Number(text)
}
