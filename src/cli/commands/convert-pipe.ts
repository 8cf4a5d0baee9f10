/** `convert` with a pipe on one side: stdin as a raw disk, stdout as a qcow2 image. */
import type { BlockDevice } from '../../block/device.ts'
import { convertStreamToQcow2, convertToQcow2Stream } from '../../qcow2/convert-stream.ts'
import { defaultSparseSize } from '../../qcow2/convert-plan.ts'
import { UsageError } from '../errors.ts'
import { layoutOf } from '../image/create-options.ts'
import { writeSparse, writeStream } from '../output.ts'
import type { Progress } from '../progress.ts'
import { aboutTarget, backingSize, createFile, needsEngine, shapeOf, type ConvertContext, type Request } from './convert-request.ts'

/** True if the source is a pipe: it can be read once, forwards. */
export function readsPipe({ args, options, terminal }: ConvertContext): boolean {
  const names = args.slice(0, -1)
  if (!names.includes('-') || options['source-image-opts'] || terminal.stdinFile !== undefined) return false
  if (names.length > 1) throw new UsageError('stdin cannot be one of several sources')
  if (options['source-format'] !== 'raw') throw new UsageError('a pipe can only be read as a raw disk: give -f raw, or store the image in a file first')
  return true
}

/** Stores what comes through stdin. */
export async function copyFromPipe(context: ConvertContext, request: Request): Promise<void> {
  const { options, signal } = context
  const { target, values, sparseSize, workers } = request
  if (options.backing !== undefined || options['source-snapshot'] !== undefined || options.bitmaps) {
    throw new UsageError('what comes through a pipe has no backing file, snapshots or bitmaps')
  }
  const progress = context.progress()
  const onProgress = ({ done, total }: { done: number; total: number }): void => progress.update(done, total)
  const chunks = untilAborted(context.terminal.stdin, signal)
  if (request.format === 'raw' && !options['no-create']) {
    if (target === '-') await writeStream(context, target, chunks, 0, progress)
    else {
      await writeSparse(context, target, chunks, sparseSize ?? defaultSparseSize)
      progress.finish()
    }
    return
  }
  if (request.format === 'luks') throw new UsageError('a LUKS volume cannot be made from a pipe')
  if (target === '-') throw new UsageError('a qcow2 image cannot be made from one pipe into another: the source must be read twice')
  if (options['no-create'] || needsEngine(values)) throw new UsageError('a pipe can only be stored in a new image without -n, encryption, data file and preallocation')
  context.leaves(`${target} is incomplete: delete it`)
  await using file = await createFile(context, target)
  await convertStreamToQcow2(chunks, file, { ...shapeOf(await aboutTarget(target, () => Promise.resolve(layoutOf(values)))), compressed: options.compress, workers, sparseSize, signal, onProgress })
  progress.finish()
}

/** The chunks; an interrupt does not wait for the next one. */
async function* untilAborted(chunks: AsyncIterable<Uint8Array>, signal: AbortSignal): AsyncGenerator<Uint8Array, void, undefined> {
  const iterator = chunks[Symbol.asyncIterator]()
  // a promise for each chunk: racing against one that lives on would keep every chunk alive
  let stop: (reason: Error) => void = () => undefined
  signal.addEventListener('abort', () => stop(signal.reason as Error), { once: true })
  for (;;) {
    signal.throwIfAborted()
    const next = await new Promise<IteratorResult<Uint8Array, unknown>>((resolve, reject) => {
      stop = reject
      iterator.next().then(resolve, reject)
    })
    if (next.done === true) return
    yield next.value
  }
}

/** Sends a qcow2 image to stdout. */
export async function sendImage(context: ConvertContext, source: BlockDevice, { values, sparseSize, workers }: Request, progress: Progress): Promise<void> {
  const { options, signal, terminal } = context
  if (options['no-create'] || options.bitmaps || needsEngine(values)) {
    throw new UsageError('a pipe takes a new image without -n, --bitmaps, encryption, data file and preallocation')
  }
  const below = await backingSize(context, '-', values)
  const onProgress = ({ done, total }: { done: number; total: number }): void => progress.update(done, total)
  const send = (bytes: Uint8Array): Promise<void> => terminal.stdout.write(bytes)
  await convertToQcow2Stream(source, send, { ...shapeOf(layoutOf(values)), backingSize: below, compressed: options.compress, workers, sparseSize, signal, onProgress })
  progress.finish()
}
