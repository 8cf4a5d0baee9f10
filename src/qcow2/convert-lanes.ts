/**
 * Several pieces of a copy at once. Owns the buffers, how many pieces are under way, and the order in
 * which they may claim their place; knows nothing of what a piece becomes.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { allocateAligned } from '../block/slab.ts'
import type { ConvertPiece } from './convert-plan.ts'

/** Bytes of a buffer: little enough to stay in the cache. */
const pieceBytes = 1 << 20
const leastPieceBytes = 1 << 16
/** Buffers in flight: enough to keep a disk streaming. */
export const lanes = 4

/** Bytes of a buffer: what both devices transfer best, in whole `boundary`s. */
export function pieceSize(source: BlockDevice, target: BlockDevice, boundary: number): number {
  const best = Math.min(source.limits.optimalTransfer, target.limits.optimalTransfer)
  const size = Math.max(leastPieceBytes, Math.min(pieceBytes, best))
  return Math.max(boundary, size - (size % boundary))
}

/** Takes memory that both devices transfer from and to directly. */
export function allocatorFor(a: BlockDevice, b: BlockDevice): (length: number) => Uint8Array {
  const aligned = a.limits.memoryAlignment > 1 || b.limits.memoryAlignment > 1
  return aligned ? allocateAligned : (length) => new Uint8Array(length)
}

/** A piece under way. */
export interface Job {
  readonly piece: ConvertPiece
  /** Memory for the piece, reused by later ones. */
  readonly buffer: Uint8Array
  /** Resolves when all earlier pieces have called `done`, or never if one failed. */
  turn(): Promise<void>
  /** Lets the next piece take its turn. */
  done(): void
}

/** What {@link runLanes} needs. */
export interface LaneOptions extends CallOptions {
  /** Pieces under way at once. */
  readonly lanes: number
  readonly allocate: () => Uint8Array
  readonly onPiece?: ((piece: ConvertPiece) => void) | undefined
}

/** Does `work` for every piece. Rejects with the first error, after the work under way has ended. */
export async function runLanes(
  pieces: AsyncGenerator<ConvertPiece, void, undefined>,
  options: LaneOptions,
  work: (job: Job) => Promise<void>,
): Promise<void> {
  let tail: Promise<void> = Promise.resolve()
  let failure: { readonly error: unknown } | undefined
  const lane = async (): Promise<void> => {
    const buffer = options.allocate()
    while (failure === undefined) {
      options.signal?.throwIfAborted()
      const next = await pieces.next()
      if (next.done === true) return
      const before = tail
      let done!: () => void
      tail = new Promise((resolve) => {
        done = resolve
      })
      try {
        await work({ piece: next.value, buffer, turn: () => before.then(assertNoFailure), done })
      } finally {
        done()
      }
      options.onPiece?.(next.value)
    }
  }
  const assertNoFailure = (): void => {
    if (failure !== undefined) throw failure.error
  }
  const guarded = async (): Promise<void> => {
    try {
      await lane()
    } catch (error) {
      failure ??= { error }
    }
  }
  await Promise.all(Array.from({ length: options.lanes }, guarded))
  await pieces.return()
  assertNoFailure()
}
