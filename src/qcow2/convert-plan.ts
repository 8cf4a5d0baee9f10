/**
 * What of a source has to be looked at when it is converted: a list of pieces, cut so that each fits a
 * buffer and begins at a boundary of the target. Moves no data.
 */
import type { BlockDevice, CallOptions, Extent } from '../block/device.ts'

/** Bytes from which zeroes take no space, as `qemu-img convert -S`. */
export const defaultSparseSize = 4096

/** A piece of the disk. */
export interface ConvertPiece {
  readonly start: number
  /** At most the piece size; ends at a boundary, or at the end of the disk. */
  readonly length: number
  /** Nothing has to be read: it is all zeroes. */
  readonly zero: boolean
  /** The content, where it came with the piece. */
  readonly bytes?: Uint8Array
}

/** How a source is cut. */
export interface PlanOptions extends CallOptions {
  /** Pieces begin and end at multiples of this, the cluster size of the target. */
  readonly boundary: number
  /** Bytes of the largest piece, a multiple of `boundary`. */
  readonly pieceSize: number
  /** Leave out zeroes and what was never written: the target reads so by itself. */
  readonly skipZeroes: boolean
  /**
   * Leave out what the source has only from its backing file: the target has the same, from a file of so many bytes.
   * Where the source has nothing below it, zeroes are not left out before that.
   */
  readonly skipBacking: number | false
}

/** The pieces of a source, in ascending order. */
export async function* convertPieces(source: BlockDevice, options: PlanOptions): AsyncGenerator<ConvertPiece, void, undefined> {
  const { boundary, signal } = options
  const { size } = source
  let run: Run = { start: 0, end: 0, zero: true }
  let covered = 0
  for await (const extent of source.map({ length: size, signal })) {
    for (const { zero, ...part } of partsOf(extent, size, options)) {
      let first = Math.max(covered, Math.floor(part.start / boundary) * boundary)
      const last = Math.min(size, Math.ceil(part.end / boundary) * boundary)
      // a boundary cluster that data and zeroes share is data
      if (zero && !run.zero) first = Math.max(first, run.end)
      if (first >= last) continue
      if (zero === run.zero && first <= run.end && run.end > run.start) {
        run.end = Math.max(run.end, last)
        continue
      }
      if (run.zero) run.end = Math.min(run.end, first)
      yield* cut(run.start, run.end, run.zero, options)
      covered = Math.max(covered, run.end)
      run = { start: Math.max(first, covered), end: last, zero }
    }
  }
  yield* cut(run.start, run.end, run.zero, options)
}

/** Bytes of the disk that are all zeroes, or not known to be. */
interface Run {
  start: number
  end: number
  zero: boolean
}

/** What of an extent has to be looked at. */
function partsOf(extent: Extent, size: number, { boundary, skipZeroes, skipBacking }: PlanOptions): readonly Readonly<Run>[] {
  const { start } = extent
  let end = start + extent.length
  if (extent.data && !extent.zero && (skipBacking === false || extent.depth === 0)) return [{ start, end, zero: false }]
  if (skipBacking === false) return skipZeroes ? [] : [{ start, end, zero: true }]
  if (extent.depth > 0) return []
  if (!extent.present) end = Math.min(end, Math.max(start, skipBacking))
  if (skipZeroes || start === end) return []
  // what comes before or behind zeroes may be skipped: a boundary cluster of both has to be read
  const first = Math.ceil(start / boundary) * boundary
  const last = end === size ? end : Math.floor(end / boundary) * boundary
  if (first >= last) return [{ start, end, zero: false }]
  const parts = [
    { start, end: first, zero: false },
    { start: first, end: last, zero: true },
    { start: last, end, zero: false },
  ]
  return parts.filter((part) => part.start < part.end)
}

function* cut(start: number, end: number, zero: boolean, options: PlanOptions): Generator<ConvertPiece, void, undefined> {
  const { pieceSize } = options
  for (let at = start; at < end; ) {
    // pieces end at multiples of their size, so that requests are aligned as well as can be
    const stop = Math.min(end, (Math.floor(at / pieceSize) + 1) * pieceSize)
    yield { start: at, length: stop - at, zero }
    at = stop
  }
}

/** The pieces of a disk that comes as a stream of chunks; each brings its content. */
export async function* streamPieces(chunks: AsyncIterable<Uint8Array>, pieceSize: number): AsyncGenerator<ConvertPiece, void, undefined> {
  let start = 0
  let filled = 0
  let bytes = new Uint8Array(pieceSize)
  for await (const chunk of chunks) {
    if (!ArrayBuffer.isView(chunk)) throw new TypeError(`a chunk of the stream must be a Uint8Array, not ${typeof chunk}: leave the stream without an encoding`)
    for (let from = 0; from < chunk.length; ) {
      const length = Math.min(chunk.length - from, pieceSize - filled)
      bytes.set(chunk.subarray(from, from + length), filled)
      from += length
      filled += length
      if (filled < pieceSize) continue
      yield { start, length: filled, zero: false, bytes }
      start += filled
      filled = 0
      bytes = new Uint8Array(pieceSize)
    }
  }
  if (filled > 0) yield { start, length: filled, zero: false, bytes: bytes.subarray(0, filled) }
}
