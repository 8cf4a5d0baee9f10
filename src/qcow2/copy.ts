/**
 * Copying a disk onto another that exists, of any kind. Owns what is written, what is zero and what is left out;
 * buffers and pieces are elsewhere.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { pad } from '../block/pad.ts'
import { assertApart } from '../block/stands-on.ts'
import { zeroRun } from '../bytes/zero-run.ts'
import { InFlight } from '../core/in-flight.ts'
import { allocatorFor, lanes, pieceSize, runLanes, type Job, type LaneOptions } from './convert-lanes.ts'
import { defaultSparseSize } from './convert-plan.ts'
import { countedPieces, DataProgress, type ConvertProgress } from './convert-progress.ts'
import { Qcow2Image } from './image.ts'

/** Options of {@link copyDevice}. */
export interface CopyOptions extends CallOptions {
  /**
   * Runs of zeroes of at least this many bytes are not written as data. 0 writes everything, so that all
   * space is allocated. Default 4096, as `qemu-img convert -S`.
   */
  readonly sparseSize?: number | undefined
  /** The target reads as zeroes everywhere: zeroes need not be written at all. Default: it does if it had to grow from empty. Has no meaning with `skipBacking`. */
  readonly targetIsZero?: boolean | undefined
  /**
   * Leave out what the source has only from its backing file, because the target has the same from its own. What the
   * source itself holds is written even where it is zeroes, and so are the zeroes of a source that has no backing file there. Default false.
   */
  readonly skipBacking?: boolean | undefined
  /** Store whole clusters compressed where that makes them smaller; the target must be a `Qcow2Image`. Default false. */
  readonly compressed?: boolean | undefined
  /** Called after every MiB of data that is copied, and at the end. */
  readonly onProgress?: ((progress: ConvertProgress) => void) | undefined
}

/**
 * Makes `target` read like `source`: any devices, images among them. This is writing into a target, not replacing it: a growable
 * target becomes at least as large as the source, any other must be; what a larger one has after the end of the source
 * stays. Durable when it resolves. Both are devices, because a path does not tell whether the bytes of a file or the disk in it
 * are meant.
 * @throws Qcow2Error `ERR_BUSY` if the target is a file that the source is read from; RangeError if the target is too small; TypeError for `compressed` into anything but an image; what reading and writing throw.
 */
export async function copyDevice(source: BlockDevice, target: BlockDevice, options: CopyOptions = {}): Promise<void> {
  const { sparseSize = defaultSparseSize, skipBacking = false, compressed = false, signal } = options
  if (compressed && !Qcow2Image.is(target)) throw new TypeError('copyDevice: only a Qcow2Image takes compressed clusters')
  assertApart(source, target)
  const progress = new DataProgress(options.onProgress)
  const fresh = target.growable && target.size === 0
  const blank = (options.targetIsZero ?? fresh) && sparseSize > 0 && !skipBacking
  const { size } = source
  if (target.growable && target.size < size) await target.resize(size)
  if (target.size < size) throw new RangeError(`the target has ${target.size} bytes, the source ${size}; resize the target first`)
  const image = compressed && Qcow2Image.is(target) ? target : undefined
  const boundary = image?.engine.geometry.clusterSize ?? 4096
  const grain = image === undefined || sparseSize === 0 ? sparseSize : boundary
  const copy: Copy = { source: pad(source), target: pad(target), image, grain, blank, signal }
  const length = pieceSize(source, target, boundary)
  const below = Qcow2Image.is(target) ? (target.engine.backing?.size ?? 0) : Infinity
  const pieces = countedPieces(source, { boundary, pieceSize: length, skipZeroes: blank, skipBacking: skipBacking ? below : false, signal }, progress)
  const allocate = allocatorFor(source, target)
  const lane: LaneOptions = { lanes, allocate: () => allocate(length), onPiece: (piece) => progress.add(piece), signal }
  await runLanes(pieces, lane, (job) => copyPiece(copy, job))
  // not the bare target: what pads it has made its last sector whole
  await copy.target.flush({ signal })
  progress.finish()
}

interface Copy extends CallOptions {
  readonly source: BlockDevice
  readonly target: BlockDevice
  /** The target, if it takes clusters compressed. */
  readonly image: Qcow2Image | undefined
  /** Zeroes are looked for in so many bytes at once; 0 for not at all. */
  readonly grain: number
  readonly blank: boolean
}

/** Writes begin in the order of the disk, so that a target that allocates does so in that order. */
async function copyPiece(copy: Copy, job: Job): Promise<void> {
  const { source, target, grain, blank, signal } = copy
  const { piece, buffer } = job
  const bytes = buffer.subarray(0, piece.length)
  const unmap = piece.zero && grain > 0
  if (piece.zero && !unmap) bytes.fill(0)
  else if (!piece.zero) await source.readInto(piece.start, bytes, { signal })
  await job.turn()
  const writes = new InFlight()
  for (let at = 0; at < bytes.length; ) {
    const { end, zero } = unmap ? { end: bytes.length, zero: true } : zeroRun(bytes, at, grain)
    if (!zero) writes.add(store(copy, piece.start + at, bytes.subarray(at, end)))
    else if (unmap || !blank) writes.add(target.writeZeroes(piece.start + at, end - at, { unmap: true, signal }))
    at = end
  }
  job.done()
  await writes.settle()
}

async function store({ target, image, signal }: Copy, offset: number, bytes: Uint8Array): Promise<void> {
  if (image === undefined) return target.write(offset, bytes, { signal })
  // the last cluster of the source is a part of one in a larger target
  const partial = offset + bytes.length === image.size ? 0 : bytes.length % image.engine.geometry.clusterSize
  const whole = bytes.length - partial
  if (whole > 0) await image.writeCompressed(offset, bytes.subarray(0, whole), { signal })
  if (partial > 0) await target.write(offset + whole, bytes.subarray(whole), { signal })
}
