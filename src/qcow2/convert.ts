/**
 * Converting disks: into a new qcow2 image in one pass, or onto any device. Owns what `qemu-img convert`
 * decides (what is skipped, what is zero, what is compressed); layout and buffers are elsewhere.
 */
import { isZero } from '../bytes/zero.ts'
import { zeroRun } from '../bytes/zero-run.ts'
import { batchBytes, CodecPool } from '../codec/worker-pool.ts'
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { withTarget, type Source } from '../block/source.ts'
import { pad } from '../block/pad.ts'
import { allocateAligned } from '../block/slab.ts'
import { runLanes, type Job, type LaneOptions } from './convert-lanes.ts'
import { convertPieces, type ConvertPiece, type PlanOptions } from './convert-plan.ts'
import { DataProgress, type ConvertProgress } from './convert-progress.ts'
import type { LayoutOptions } from './create.ts'
import type { HostFile } from './host-file.ts'
import { ImageWriter } from './image-writer.ts'
import { InFlight } from '../core/in-flight.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { hostFile } from './open.ts'

/** Options of {@link copyDevice}. */
export interface CopyOptions extends CallOptions {
  /**
   * Runs of zeroes of at least this many bytes are not written as data. 0 writes everything, so that all
   * space is allocated. Default 4096, as `qemu-img convert -S`.
   */
  readonly sparseSize?: number | undefined
  /** The target reads as zeroes everywhere: zeroes need not be written at all. Default: it does if it had to grow from empty. */
  readonly targetIsZero?: boolean | undefined
  /** Called after every MiB of data that is copied, and at the end. */
  readonly onProgress?: ((progress: ConvertProgress) => void) | undefined
}

/** Options of {@link convertToQcow2}. */
export interface ConvertToQcow2Options
  extends Omit<LayoutOptions, 'size' | 'preallocation' | 'dataFile' | 'dataFileRaw'>,
    CallOptions {
  /** Store clusters compressed where that makes them smaller. Default false. */
  readonly compressed?: boolean | undefined
  /** Threads that compress; default the number of cores. */
  readonly workers?: number | undefined
  /** 0 allocates all clusters, also those of zeroes. Default 4096; any other value means the same here. */
  readonly sparseSize?: number | undefined
  /** Called after every MiB of data that is copied, and at the end. */
  readonly onProgress?: ((progress: ConvertProgress) => void) | undefined
}

/** Bytes from which zeroes take no space, as `qemu-img convert -S`. */
export const defaultSparseSize = 4096

/** Bytes of a buffer at most, and buffers in flight: enough to keep a disk streaming, little enough to stay in the cache. */
const pieceBytes = 1 << 20
const leastPieceBytes = 1 << 16
const lanes = 4

/** Bytes of a buffer: what both devices transfer best, in whole `boundary`s. */
function pieceSize(source: BlockDevice, target: BlockDevice, boundary: number): number {
  const best = Math.min(source.limits.optimalTransfer, target.limits.optimalTransfer)
  const size = Math.max(leastPieceBytes, Math.min(pieceBytes, best))
  return Math.max(boundary, size - (size % boundary))
}

/**
 * Writes the content of `source` into `target` as a new qcow2 image. The whole content of a device is replaced, and it
 * stays open; a path names a file that does not exist yet, which is made and closed again. Memory stays below 32 MiB
 * whatever the size.
 *
 * `source` is a device, because a path does not tell what is meant: the disk in an image is
 * `await Qcow2Image.open(path)`, the bytes of a raw file are `await openFile(path)`.
 *
 * With `backing` the image becomes an overlay: only what `source` itself holds is copied, not what it
 * has from its own backing file, which must read like the backing file named.
 * @throws what reading the source or writing the target throws; RangeError or TypeError for options the
 * format does not allow, and unknown ones; `ERR_EXISTS` for the path of a file. After an error the target is not a qcow2 image.
 */
export async function convertToQcow2(source: BlockDevice, target: Source, options: ConvertToQcow2Options = {}): Promise<void> {
  refuseUnknownOptions('convertToQcow2', options, conversionOptions)
  const progress = new DataProgress(options.onProgress)
  await withTarget(target, options, (host) =>
    writeImage(host, { ...options, size: source.size }, deviceContent(source, allocatorFor(source, host), options, progress)),
  )
  progress.finish()
}

/** The options that all conversions to qcow2 take. */
export const conversionOptions: OptionNames<ConvertToQcow2Options> = {
  ...{ clusterSize: true, version: true, refcountBits: true, extendedL2: true, lazyRefcounts: true, compressionType: true, backing: true },
  ...{ compressed: true, workers: true, sparseSize: true, onProgress: true, signal: true },
}

/** Where the content of a new image comes from. */
export interface ImageContent {
  /** What pieces without their content are read from. */
  readonly source: BlockDevice | undefined
  readonly allocate: (length: number) => Uint8Array
  /** The pieces, cut at multiples of `clusterSize`. */
  readonly pieces: (clusterSize: number, pieceSize: number) => AsyncGenerator<ConvertPiece, void, undefined>
  readonly onPiece: (piece: ConvertPiece) => void
  /** Size of the disk, asked for when all pieces are written; default the one of the options. */
  readonly finalSize?: () => number
}

/** The content of a device. */
export function deviceContent(
  source: BlockDevice,
  allocate: ImageContent['allocate'],
  { backing, sparseSize = defaultSparseSize, signal }: ConvertToQcow2Options,
  progress: DataProgress,
): ImageContent {
  const skipBacking = backing !== undefined
  const pieces: ImageContent['pieces'] = (boundary, pieceSize) =>
    countedPieces(source, { boundary, pieceSize, skipZeroes: !skipBacking && sparseSize > 0, skipBacking, signal }, progress)
  return { source: pad(source), allocate, pieces, onPiece: (piece) => progress.add(piece) }
}

/** The pieces of a source, after those that count for the progress were counted. */
async function* countedPieces(source: BlockDevice, options: PlanOptions, progress: DataProgress): AsyncGenerator<ConvertPiece, void, undefined> {
  await progress.count(() => convertPieces(source, options))
  yield* convertPieces(source, options)
}

/** Options of {@link writeImage}: of a conversion, and of the writer. */
export type WriteImageOptions = ConvertToQcow2Options & { readonly size: number; readonly inOrder?: boolean }

/** Writes a new image into `host`: what all conversions to qcow2 share. */
export async function writeImage(host: BlockDevice, options: WriteImageOptions, content: ImageContent): Promise<void> {
  const file = hostFile(host)
  // whatever was there is gone: an old header must not survive a conversion that fails
  if (host.size > 0) await host.resize(0).catch(() => file.write(0, file.allocate(Math.min(host.size, 512))))
  const { compressed, workers, sparseSize = defaultSparseSize, signal, onProgress: _, ...layout } = options
  const writer = new ImageWriter(file, layout)
  const { clusterSize } = writer.geometry
  // version 2 cannot say "zeroes" over a backing file, it stores them
  const skipZeroes = sparseSize > 0 && (options.backing === undefined || writer.header.version === 3)
  const conversion: Conversion = { source: content.source, file, writer, options, skipZeroes }
  const length = compressed === true ? Math.max(batchBytes, clusterSize) : pieceSize(content.source ?? host, host, clusterSize)
  const pieces = content.pieces(clusterSize, length)
  const lane: LaneOptions = { lanes, allocate: () => content.allocate(length), onPiece: content.onPiece, signal }
  if (compressed === true) {
    await using pool = new CodecPool({ clusterSize, type: writer.header.compressionType, workers })
    await runLanes(pieces, { ...lane, lanes: pool.depth }, (job) => storeCompressed(conversion, pool, job))
  } else {
    await runLanes(pieces, lane, (job) => storePlain(conversion, job))
  }
  await writer.finish(content.finalSize?.())
}

interface Conversion {
  readonly source: BlockDevice | undefined
  readonly file: HostFile
  readonly writer: ImageWriter
  readonly options: ConvertToQcow2Options
  /** Clusters of zeroes are not stored. */
  readonly skipZeroes: boolean
}

/** Reads a piece, drops clusters of zeroes and writes the others as few runs. */
async function storePlain(conversion: Conversion, job: Job): Promise<void> {
  const { writer, file } = conversion
  const { clusterSize } = writer.geometry
  const clusters = await readClusters(conversion, job)
  const kept = keepData(conversion, job, clusters)
  await job.turn()
  const writes = (writer.writes = new InFlight())
  for (let i = 0; i < clusters; ) {
    const guest = job.piece.start + i * clusterSize
    if (kept[i] === dropped) {
      storeZero(conversion, guest)
      i++
      continue
    }
    let end = i + 1
    while (end < clusters && kept[end] !== dropped) end++
    const run = writer.data(guest, end - i)
    const at = kept[i]! * clusterSize
    addWrite(writes, file, run.offset, job.buffer.subarray(at, at + run.clusters * clusterSize))
    i += run.clusters
  }
  job.done()
  await writes.settle()
}

/** Reads a piece, compresses its clusters on another thread and packs them. */
async function storeCompressed(conversion: Conversion, pool: CodecPool, job: Job): Promise<void> {
  const { writer, file } = conversion
  const { clusterSize } = writer.geometry
  const clusters = await readClusters(conversion, job)
  const kept = keepData(conversion, job, clusters)
  const count = kept.reduce((most, place) => Math.max(most, place + 1), 0)
  const result = count === 0 ? undefined : await pool.compress(job.buffer.subarray(0, count * clusterSize))
  await job.turn()
  const writes = (writer.writes = new InFlight())
  let packed = 0
  for (let i = 0; i < clusters; i++) {
    const guest = job.piece.start + i * clusterSize
    const place = kept[i]!
    const length = place === dropped ? 0 : result!.lengths[place]!
    if (place === dropped) {
      storeZero(conversion, guest)
    } else if (length > 0) {
      writer.compressed(guest, result!.bytes.subarray(packed, packed + length))
      packed += length
    } else {
      const { offset } = writer.data(guest, 1)
      addWrite(writes, file, offset, job.buffer.subarray(place * clusterSize, (place + 1) * clusterSize))
    }
  }
  result?.release()
  job.done()
  await writes.settle()
}

/** Fills the buffer with the piece, zeroes behind the end of the disk; the number of clusters. */
async function readClusters({ source, writer, options }: Conversion, { piece, buffer }: Job): Promise<number> {
  const { clusterSize } = writer.geometry
  const clusters = Math.ceil(piece.length / clusterSize)
  if (piece.zero) {
    buffer.fill(0, 0, clusters * clusterSize)
  } else {
    if (piece.bytes !== undefined) buffer.set(piece.bytes)
    else await source!.readInto(piece.start, buffer.subarray(0, piece.length), { signal: options.signal })
    buffer.fill(0, piece.length, clusters * clusterSize)
  }
  return clusters
}

/** In the result of {@link keepData}: the cluster is zeroes and was left out. */
const dropped = -1

/** Moves the clusters worth storing to the front of the buffer; for each cluster its place there. */
function keepData({ writer, skipZeroes }: Conversion, { piece, buffer }: Job, clusters: number): number[] {
  const { clusterSize } = writer.geometry
  const places = new Array<number>(clusters).fill(dropped)
  let kept = 0
  for (let i = 0; i < clusters; i++) {
    const at = i * clusterSize
    if (skipZeroes && (piece.zero || isZero(buffer, at, clusterSize))) continue
    if (kept !== i) buffer.copyWithin(kept * clusterSize, at, at + clusterSize)
    places[i] = kept++
  }
  return places
}

/** A cluster of zeroes: over a backing file it has to say so. */
function storeZero({ writer, options }: Conversion, guest: number): void {
  if (options.backing !== undefined) writer.zero(guest)
}

function addWrite(writes: InFlight, file: HostFile, offset: number, bytes: Uint8Array): void {
  writes.add(file.write(offset, bytes))
}

/**
 * Makes `target` read like `source`: any devices, images among them. A growable target gets the size of
 * the source; any other must be at least as large, and keeps what lies behind. Durable when it resolves. Both are
 * devices, because a path does not tell whether the bytes of a file or the disk in it are meant.
 * @throws RangeError if the target is too small; what reading and writing throw.
 */
export async function copyDevice(source: BlockDevice, target: BlockDevice, options: CopyOptions = {}): Promise<void> {
  const { sparseSize = defaultSparseSize, signal } = options
  const progress = new DataProgress(options.onProgress)
  const fresh = target.growable && target.size === 0
  const blank = (options.targetIsZero ?? fresh) && sparseSize > 0
  if (target.growable && target.size !== source.size) await target.resize(source.size)
  if (target.size < source.size) {
    throw new RangeError(`the target has ${target.size} bytes, the source ${source.size}; resize the target first`)
  }
  const copy: Copy = { source: pad(source), target: pad(target), sparseSize, blank, signal }
  const length = pieceSize(source, target, 4096)
  const pieces = countedPieces(source, { boundary: 4096, pieceSize: length, skipZeroes: blank, skipBacking: false, signal }, progress)
  const allocate = allocatorFor(source, target)
  const lane: LaneOptions = { lanes, allocate: () => allocate(length), onPiece: (piece) => progress.add(piece), signal }
  await runLanes(pieces, lane, (job) => copyPiece(copy, job))
  await target.flush({ signal })
  progress.finish()
}

/** Takes memory that both devices transfer from and to directly. */
export function allocatorFor(a: BlockDevice, b: BlockDevice): (length: number) => Uint8Array {
  const aligned = a.limits.memoryAlignment > 1 || b.limits.memoryAlignment > 1
  return aligned ? allocateAligned : (length) => new Uint8Array(length)
}

interface Copy extends CallOptions {
  readonly source: BlockDevice
  readonly target: BlockDevice
  readonly sparseSize: number
  readonly blank: boolean
}

/** Writes begin in the order of the disk, so that a target that allocates does so in that order. */
async function copyPiece({ source, target, sparseSize, blank, signal }: Copy, job: Job): Promise<void> {
  const { piece, buffer } = job
  const bytes = buffer.subarray(0, piece.length)
  const unmap = piece.zero && sparseSize > 0
  if (piece.zero && !unmap) bytes.fill(0)
  else if (!piece.zero) await source.readInto(piece.start, bytes, { signal })
  await job.turn()
  const writes = new InFlight()
  for (let at = 0; at < bytes.length; ) {
    const { end, zero } = unmap ? { end: bytes.length, zero: true } : zeroRun(bytes, at, sparseSize)
    if (!zero) writes.add(target.write(piece.start + at, bytes.subarray(at, end), { signal }))
    else if (unmap || !blank) writes.add(target.writeZeroes(piece.start + at, end - at, { unmap: true, signal }))
    at = end
  }
  job.done()
  await writes.settle()
}
