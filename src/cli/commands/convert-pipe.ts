/** `convert` with a pipe on one side: stdin as a raw disk, stdout as a qcow2 image. */
import type { BlockDevice } from '../../block/device.ts'
import { convertStreamToQcow2, convertToQcow2Stream } from '../../qcow2/convert-stream.ts'
import { defaultSparseSize } from '../../qcow2/convert-plan.ts'
import { UsageError } from '../errors.ts'
import { layoutOf } from '../image/create-options.ts'
import { writeSparse, writeStream } from '../output.ts'
import { isPipe, withPayload } from '../payload.ts'
import { untilAborted } from '../pipe-source.ts'
import type { Progress } from '../progress.ts'
import { aboutTarget, backingSize, intoTarget, needsEngine, shapeOf, type ConvertContext, type Request } from './convert-request.ts'

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
  // a pipe does not say how much will come
  const onProgress = ({ done }: { done: number }): void => progress.update(done)
  const chunks = untilAborted(context.terminal.stdin, signal)
  if (request.format === 'raw' && !options['no-create']) {
    if (isPipe(target)) await writeStream(context, target, chunks, undefined, progress)
    else {
      await writeSparse(context, target, chunks, sparseSize ?? defaultSparseSize, progress)
      progress.finish()
    }
    return
  }
  if (request.format === 'luks') throw new UsageError('a LUKS volume cannot be made from a pipe')
  if (isPipe(target)) throw new UsageError('a qcow2 image cannot be made from one pipe into another: the source must be read twice')
  if (options['no-create'] || needsEngine(values)) throw new UsageError('a pipe can only be stored in a new image without -n, encryption, data file and preallocation')
  const shape = shapeOf(await aboutTarget(target, () => Promise.resolve(layoutOf(values))))
  await intoTarget(context, target, (file) => convertStreamToQcow2(chunks, file, { ...shape, compressed: options.compress, workers, sparseSize, signal, onProgress }))
  progress.finish()
}

/** Sends a qcow2 image into the target, a pipe. */
export async function sendImage(context: ConvertContext, source: BlockDevice, { target, values, sparseSize, workers }: Request, progress: Progress): Promise<void> {
  const { options, signal } = context
  if (options['no-create'] || options.bitmaps || needsEngine(values)) {
    throw new UsageError('a pipe takes a new image without -n, --bitmaps, encryption, data file and preallocation')
  }
  const below = await backingSize(context, target, values)
  const onProgress = ({ done, total }: { done: number; total: number }): void => progress.update(done, total)
  const shape = { ...shapeOf(layoutOf(values)), backingSize: below, compressed: options.compress, workers, sparseSize }
  await withPayload(target, context.terminal, (send) => convertToQcow2Stream(source, send, { ...shape, signal, onProgress }))
  progress.finish()
}
