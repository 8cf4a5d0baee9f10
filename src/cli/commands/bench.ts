import type { BlockDevice } from '../../block/device.ts'
import { allocateAligned } from '../../block/slab.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { forceShareOption, formatOption, imageOptsOption, isDirect, objectOption, openArgument, quietOption } from '../image/options.ts'
import { couldNotOpen } from '../image/reasons.ts'
import { parseSize } from '../size.ts'

export const benchCommand = command({
  name: 'bench',
  summary: 'Measure how fast an image is read or written',
  description: ['Requests of one size go through the image, each a step behind the one before, from the start again at the end of the disk.'],
  options: {
    count: { short: 'c', value: 'COUNT', help: 'requests; default 75000' },
    depth: { short: 'd', value: 'DEPTH', help: 'requests at a time; default 64' },
    'buffer-size': { short: 's', value: 'SIZE', help: 'bytes of a request; default 4k' },
    'step-size': { short: 'S', value: 'SIZE', help: 'bytes from one request to the next; default the size of a request' },
    offset: { short: 'o', value: 'OFFSET', help: 'where the first request begins; default 0' },
    write: { short: 'w', help: 'write instead of reading: the content of the image is lost' },
    pattern: { value: 'BYTE', help: 'what is written; default 0' },
    'flush-interval': { value: 'COUNT', help: 'flush after so many writes' },
    'no-drain': { help: 'with --flush-interval: go on while a flush runs' },
    cache: { short: 't', value: 'MODE', help: "'none' goes past the page cache" },
    aio: { short: 'i', value: 'AIO', choices: ['threads', 'native', 'io_uring'], help: 'accepted for compatibility' },
    native: { short: 'n', help: 'accepted for compatibility' },
    ...formatOption,
    ...imageOptsOption,
    ...forceShareOption,
    ...objectOption,
    ...quietOption,
  },
  arguments: [{ name: 'FILENAME', help: 'the image' }],
  examples: [
    { line: 'qcow2 bench disk.qcow2', shows: 'small reads from the start' },
    { line: 'qcow2 bench -w -c 1000 -s 1M -d 4 scratch.qcow2', shows: 'large writes' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    const write = options.write
    const count = numberOf('request count', options.count, 75000)
    const depth = numberOf('queue depth', options.depth, 64)
    const size = numberOf('buffer size', options['buffer-size'], 4096)
    const step = numberOf('step size', options['step-size'], 0, 0)
    const start = parseSize(options.offset ?? '0')
    const pattern = Number(options.pattern ?? 0)
    const interval = numberOf('flush interval', options['flush-interval'], 0, 0)
    if (start === undefined) throw new UsageError(`Invalid offset specified: '${options.offset}'.`)
    if (!(pattern >= 0 && pattern <= 255)) throw new UsageError('Invalid pattern byte specified. Must be between 0 and 255.')
    if (interval > 0 && !write) throw new UsageError('--flush-interval is only available in write tests')
    if (interval > 0 && interval < depth) throw new UsageError("Flush interval can't be smaller than depth")
    if (write && options['force-share']) throw couldNotOpen(args[0]!, new Error('force-share=on can only be used with read-only images'))
    const opened = await openArgument(context, { readOnly: !write, direct: isDirect(options.cache) })
    try {
      const run: Run = { count, depth, size, step: step === 0 ? size : step, start, write: write ? pattern : undefined, interval, drain: !options['no-drain'], signal }
      if (!options.quiet) for (const line of announcement(run)) await print(line)
      const began = performance.now()
      await send(opened.device, run).catch((error: unknown) => {
        signal.throwIfAborted()
        throw new ExitError(1, `Failed request: ${error instanceof Error ? error.message : String(error)}`, { cause: error })
      })
      const seconds = (performance.now() - began) / 1000
      if (!options.quiet) await print(`Run completed in ${seconds.toFixed(3)} seconds.`)
      return 0
    } finally {
      await opened.close()
    }
  },
})

function numberOf(what: string, text: string | undefined, usual: number, least = 1): number {
  if (text === undefined) return usual
  const value = parseSize(text)
  if (value === undefined) throw new UsageError(`Invalid ${what} specified: '${text}'.`)
  if (value < least || value > 0x7fff_ffff) throw new UsageError(`Invalid ${what} specified. Must be between ${least} and 2147483647.`)
  return value
}

interface Run {
  readonly count: number
  readonly depth: number
  /** Bytes of a request. */
  readonly size: number
  readonly step: number
  readonly start: number
  /** The byte to write; undefined reads. */
  readonly write: number | undefined
  /** Writes between flushes; 0 for none. */
  readonly interval: number
  /** A flush waits for all that was sent, and holds back what follows. */
  readonly drain: boolean
  readonly signal: AbortSignal
}

function announcement({ count, depth, size, step, start, write, interval }: Run): string[] {
  const kind = write === undefined ? 'read' : 'write'
  const flushes = interval === 0 ? [] : [`Sending flush every ${interval} requests`]
  return [`Sending ${count} ${kind} requests, ${size} bytes each, ${depth} in parallel (starting at offset ${start}, step size ${step})`, ...flushes]
}

/** Sends all requests, `depth` at a time. */
async function send(device: BlockDevice, run: Run): Promise<void> {
  const { count, interval, drain, signal } = run
  const flushes: Promise<void>[] = []
  const round = interval === 0 ? count : interval
  const offsets = offsetsOn(device, run)
  for (let sent = 0; sent < count; sent += round) {
    await sendRound(device, run, offsets, Math.min(round, count - sent))
    if (interval === 0) continue
    const flush = device.flush({ signal })
    if (drain) await flush
    else flushes.push(flush)
  }
  await Promise.all(flushes)
}

/** Where requests begin, from the start again before one would reach past the end. */
function* offsetsOn(device: BlockDevice, { size, step, start }: Run): Generator<number, never, undefined> {
  const span = device.size - size
  for (let offset = start; ; offset = span <= 0 ? 0 : (offset + step) % span) yield offset
}

async function sendRound(device: BlockDevice, { depth, size, write, signal }: Run, offsets: Generator<number, never, undefined>, count: number): Promise<void> {
  let left = count
  const lane = async (): Promise<void> => {
    const buffer = allocateAligned(size)
    if (write !== undefined) buffer.fill(write)
    while (left-- > 0) {
      const offset = offsets.next().value
      await (write === undefined ? device.readInto(offset, buffer, { signal }) : device.write(offset, buffer, { signal }))
    }
  }
  await Promise.all(Array.from({ length: Math.min(depth, count) }, lane))
}
