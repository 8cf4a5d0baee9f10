/**
 * Committing an overlay: what it holds is written into its backing file, and the overlay emptied.
 * Works through the two open images alone.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { ReadOnlyDevice } from '../block/read-only.ts'
import { Qcow2Error } from '../core/errors.ts'
import type { Engine } from './engine.ts'
import { Qcow2Image } from './image.ts'

/** Options of {@link commitImage}. */
export interface CommitOptions extends CallOptions {
  /** Keep the overlay's data instead of giving it back. Default false. */
  readonly keep?: boolean | undefined
  /** How many files down the chain the target is; default 1, the immediate backing file. The overlay is then kept. */
  readonly depth?: number | undefined
  /** Bytes done, of how many. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined
}

const pieceBytes = 1 << 20

/**
 * Writes everything that lies above `target` in the overlay's chain into `target`, its backing file
 * opened for writing, which grows if it is shorter. Then the overlay is emptied, so that the backing
 * file shows through; its snapshots keep their data.
 *
 * Order: data into the backing file, flush, then emptying the overlay. A crash in between leaves the
 * overlay as it was, over a backing file that already holds some of the same bytes.
 *
 * The overlay's own view of its backing chain, and that of its open snapshots, is out of date then. Unless `target`
 * is part of that chain itself, the backing file is opened anew. Where that cannot be, because it was given as a
 * device, the commit failed or opening failed (which does not undo the commit, so it does not reject), it is closed:
 * what only it has is an `ERR_CLOSED` until the overlay is opened again.
 * @throws Qcow2Error `ERR_READ_ONLY`, and what reading and writing throw.
 */
export async function commitImage(overlay: Qcow2Image, target: BlockDevice, options: CommitOptions = {}): Promise<void> {
  const { signal, depth = 1 } = options
  if (target.readOnly) throw new Qcow2Error('ERR_READ_ONLY', 'commit: the backing file is open read-only; open it for writing')
  if (!Number.isInteger(depth) || depth < 1) throw new RangeError(`depth must be a positive integer, not ${depth}`)
  const outdated = !isInChain(overlay, target)
  let fresh: BlockDevice | undefined
  try {
    await copyDown(overlay, target, depth, options)
    if (outdated) fresh = await reopenBacking(overlay.engine, target.size)
  } finally {
    if (outdated) await replaceBacking(overlay, fresh)
  }
  if (options.keep === true || depth > 1) return
  await overlay.forget(0, overlay.size, { signal })
  await overlay.flush({ signal })
}

async function copyDown(overlay: Qcow2Image, target: BlockDevice, depth: number, { signal, onProgress }: CommitOptions): Promise<void> {
  const total = overlay.size
  const before = target.size
  if (before < total) await target.resize(total, { signal })
  const buffer = new Uint8Array(pieceBytes)
  for await (const extent of overlay.map({ signal })) {
    if (extent.depth >= depth) continue
    const end = extent.start + extent.length
    if (!extent.present) {
      // a file between the two ends before: the disk reads as zeroes there, whatever the target holds
      const hidden = extent.depth === depth - 1 ? 0 : Math.min(end, before) - extent.start
      if (hidden > 0) await target.writeZeroes(extent.start, hidden, { unmap: true, signal })
    } else if (extent.zero && !extent.data) {
      await target.writeZeroes(extent.start, extent.length, { unmap: true, signal })
    } else {
      for (let at = extent.start; at < end; at += pieceBytes) {
        const bytes = buffer.subarray(0, Math.min(pieceBytes, end - at))
        await overlay.readInto(at, bytes, { signal })
        await target.write(at, bytes, { signal })
        onProgress?.({ done: at + bytes.length, total })
      }
    }
  }
  await target.flush({ signal })
}

function isInChain(overlay: Qcow2Image, target: BlockDevice): boolean {
  let below = overlay.engine.backing
  while (below !== undefined && below !== target) below = Qcow2Image.is(below) ? below.engine.backing : undefined
  return below !== undefined
}

/** The backing file opened once more; in place of one that cannot be, a device that says so to whoever reads it. */
async function reopenBacking(engine: Engine, size: number): Promise<BlockDevice | undefined> {
  try {
    return await engine.reopenBacking?.()
  } catch (cause) {
    return new LostBacking(size, cause)
  }
}

/** Stands for a backing file that a commit changed and that could not be opened since. */
class LostBacking extends ReadOnlyDevice {
  readonly size: number
  readonly #cause: unknown

  constructor(size: number, cause: unknown) {
    super()
    this.size = size
    this.#cause = cause
  }

  protected onRead(): Promise<void> {
    const message = 'the backing file could not be opened again after the commit, which is done; open the image again'
    return Promise.reject(new Qcow2Error('ERR_CLOSED', message, { cause: this.#cause }))
  }
}

/** Closes the backing file; `fresh`, if there is one, takes its place. */
async function replaceBacking({ engine }: Qcow2Image, fresh: BlockDevice | undefined): Promise<void> {
  await engine.requests.exclusive(async () => {
    const old = engine.backing
    if (fresh !== undefined) engine.backing = fresh
    if (old !== fresh) await old?.close()
  })
}
