/** Where a command puts bytes: a file, or what takes them from front to back only. */
import type { BlockDevice } from '../block/device.ts'
import { zeroRun } from '../bytes/zero-run.ts'
import { AlignedWriteQueue } from '../block/write-queue.ts'
import type { Context, OptionDefinitions } from './command.ts'
import { InOrderDevice } from './image/in-order.ts'
import { intoNewTarget } from './image/new-target.ts'
import { isPipe, withPayload } from './payload.ts'
import type { Progress } from './progress.ts'

/** A file with the memory of a VM is for its owner only. */
export const secretMode = 0o600

/**
 * Writes a stream of bytes. What had the name stays until all is written.
 * @param total how many there will be, where it is known
 * @param mode permissions of a new file
 */
export async function writeStream<O extends OptionDefinitions>(
  context: Context<O>,
  path: string,
  chunks: AsyncIterable<Uint8Array>,
  total: number | undefined,
  progress: Progress,
  mode?: number,
): Promise<number> {
  let done = 0
  const count = (chunk: Uint8Array): void => {
    context.signal.throwIfAborted()
    done += chunk.length
    progress.update(total === undefined ? done : Math.min(done, total), total)
  }
  if (isPipe(path)) {
    await withPayload(path, context.terminal, async (send) => {
      for await (const chunk of chunks) {
        await send(chunk)
        count(chunk)
      }
    })
  } else {
    await intoNewTarget(context, path, { mode }, async (file) => {
      const queue = new AlignedWriteQueue(file)
      for await (const chunk of chunks) {
        await queue.write(chunk)
        count(chunk)
      }
      await queue.close()
      if (file.growable) await file.resize(done)
      await file.flush()
    })
  }
  progress.finish()
  return done
}

/**
 * Writes a stream of bytes to a file, leaving holes for runs of zeroes of at least `grain` bytes (0: none), which
 * begin at multiples of it. What had the name stays until all is written.
 */
export async function writeSparse<O extends OptionDefinitions>(context: Context<O>, path: string, chunks: AsyncIterable<Uint8Array>, grain: number, progress: Progress): Promise<void> {
  const { signal } = context
  await intoNewTarget(context, path, {}, async (file) => {
    let end = 0
    for await (const chunk of chunks) {
      signal.throwIfAborted()
      for (let from = 0; from < chunk.length; ) {
        const { end: to, zero } = zeroRun(chunk, from, grain, end)
        if (!zero) await file.write(end + from, chunk.subarray(from, to), { signal })
        else if (!file.growable) await file.writeZeroes(end + from, to - from, { signal })
        from = to
      }
      end += chunk.length
      progress.update(end)
    }
    if (file.growable) await file.resize(end)
    await file.flush()
  })
}

/** Copies the bytes of a RAM block, leaving holes in a file where it is known to be zero. */
export async function writeDevice<O extends OptionDefinitions>(context: Context<O>, path: string, device: BlockDevice, progress: Progress): Promise<void> {
  const { signal } = context
  if (isPipe(path)) {
    await writeStream(context, path, contentOf(device, signal), device.size, progress)
    return
  }
  await intoNewTarget(context, path, { mode: secretMode }, async (file) => {
    if (file.size < device.size) await file.resize(device.size)
    for await (const { start, length, zero } of device.map({ signal })) {
      if (zero && !file.growable) await file.writeZeroes(start, length, { signal })
      for (let at = start; at < start + length && !zero; at += piece) {
        const bytes = await device.read(at, Math.min(piece, start + length - at), { signal })
        await file.write(at, bytes, { signal })
        progress.update(at, device.size)
      }
    }
    await file.flush()
  })
  progress.finish()
}

/** Lets `task` write a file of which it knows the layout, from front to back. What had the name stays until all is written. */
export async function writeLaidOut<O extends OptionDefinitions>(context: Context<O>, path: string, task: (target: BlockDevice) => Promise<void>): Promise<void> {
  if (isPipe(path)) await withPayload(path, context.terminal, (send) => task(new InOrderDevice(send)))
  else await intoNewTarget(context, path, { mode: secretMode }, task)
}

const piece = 1 << 20

/** All bytes of a device, in pieces. */
export async function* contentOf(device: BlockDevice, signal: AbortSignal): AsyncGenerator<Uint8Array, void, undefined> {
  for (let at = 0; at < device.size; at += piece) yield await device.read(at, Math.min(piece, device.size - at), { signal })
}
