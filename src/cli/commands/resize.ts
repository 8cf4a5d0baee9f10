import type { BlockDevice } from '../../block/device.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import type { OpenedImage } from '../image/opened.ts'
import { formatOption, imageOptsOption, objectOption, openArgument, quietOption } from '../image/options.ts'
import { reasonOf } from '../image/reasons.ts'
import { parseSize } from '../size.ts'

const preallocations = ['off', 'metadata', 'falloc', 'full']

export const resizeCommand = command({
  name: 'resize',
  summary: 'Change the size of a disk',
  description: ['SIZE is the new size, or a difference with + or -. The guest does not know of the change by itself: shrink its filesystems first, grow them afterwards.'],
  options: {
    shrink: { help: 'allow the disk to become smaller: what lies behind the new end is lost' },
    preallocation: { value: 'MODE', help: 'of the new part: off (default); metadata gives it its place in the file; falloc and full write zeroes' },
    ...formatOption,
    ...imageOptsOption,
    ...objectOption,
    ...quietOption,
  },
  arguments: [
    { name: 'FILENAME', help: 'the image' },
    { name: 'SIZE', word: true, help: 'for example 20G, +1G, -512M' },
  ],
  signedLast: true,
  examples: [
    { line: 'qcow2 resize disk.qcow2 +10G', shows: 'make the disk 10 GiB larger' },
    { line: 'qcow2 resize --shrink disk.qcow2 20G', shows: 'cut the disk to 20 GiB' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    const [, sign = '', amount = ''] = /^([+-]?)(.*)$/.exec(args[1]!) ?? []
    const bytes = parseSize(amount)
    if (bytes === undefined || /^[+-]/.test(amount)) {
      throw new UsageError(`Parameter 'size' expects a non-negative number below 2^53, not '${args[1]!}'; suffixes k, M, G, T, P or E are powers of 1024`)
    }
    const preallocation = options.preallocation ?? 'off'
    if (!preallocations.includes(preallocation)) throw new UsageError(`Invalid preallocation mode '${preallocation}'`)
    const opened = await openArgument(context, { readOnly: false })
    try {
      const old = opened.device.size
      const size = sign === '+' ? old + bytes : sign === '-' ? old - bytes : bytes
      if (size <= 0) throw new ExitError(1, 'New image size must be positive')
      if (size <= old && preallocation !== 'off') throw new ExitError(1, 'Preallocation can only be used for growing images')
      if (size < old && !options.shrink) {
        throw new ExitError(1, 'Use the --shrink option to perform a shrink operation. All data beyond the new end would be lost.')
      }
      await changeSize(opened, size, old, preallocation, signal)
    } finally {
      await opened.close()
    }
    if (!options.quiet) await print('Image resized.')
    return 0
  },
})

async function changeSize(opened: OpenedImage, size: number, old: number, preallocation: string, signal: AbortSignal): Promise<void> {
  if (opened.image !== undefined && size % 512 !== 0) throw new ExitError(1, 'The new size must be a multiple of 512')
  if (opened.image?.engine.header.version === 2 && opened.image.snapshots.count > 0) {
    throw new ExitError(1, "Can't resize a v2 image which has snapshots")
  }
  if (opened.image === undefined && preallocation === 'metadata') throw new ExitError(1, 'Unsupported preallocation mode: metadata')
  try {
    if (opened.image !== undefined && preallocation === 'metadata') await opened.image.resize(size, { signal, preallocation })
    else await opened.device.resize(size, { signal })
    if (preallocation === 'falloc' || preallocation === 'full') await preallocate(opened, old, size, signal)
    await opened.device.flush()
  } catch (error) {
    signal.throwIfAborted()
    throw new ExitError(1, reasonOf(error), { cause: error })
  }
}

/** The new part, and the rest of its last cluster, which the disk takes when it grows again. */
async function preallocate({ device, image, host }: OpenedImage, old: number, size: number, signal: AbortSignal): Promise<void> {
  await writeZeroBytes(device, old, size, signal)
  if (image === undefined || image.engine.hasDataFile) return
  await device.flush()
  const { clusterSize } = image.engine.geometry
  const rest = (clusterSize - (host.size % clusterSize)) % clusterSize
  if (rest > 0) await host.write(host.size, new Uint8Array(rest), { signal })
}

/** Zeroes as data: Node cannot reserve space without writing it. */
async function writeZeroBytes(device: BlockDevice, from: number, to: number, signal: AbortSignal): Promise<void> {
  const zeroes = new Uint8Array(1 << 20)
  for (let at = from; at < to; at += zeroes.length) {
    await device.write(at, zeroes.subarray(0, Math.min(zeroes.length, to - at)), { signal })
  }
}
