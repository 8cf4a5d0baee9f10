/**
 * Converting a disk into a new qcow2 image in one pass. Owns what `qemu-img convert`
 * decides (what is skipped, what is zero, what is compressed); layout and buffers are elsewhere.
 */
import { zeroRun } from '../bytes/zero-run.ts'
import { batchBytes, CodecPool } from '../codec/worker-pool.ts'
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { isBlockDevice, pathOf, withSource, withTarget, type Source } from '../block/source.ts'
import { assertApart } from '../block/stands-on.ts'
import { pad } from '../block/pad.ts'
import { allocatorFor, lanes, pieceSize, runLanes, type Job, type LaneOptions } from './convert-lanes.ts'
import { defaultSparseSize, type ConvertPiece } from './convert-plan.ts'
import { countedPieces, DataProgress, type ConvertProgress } from './convert-progress.ts'
import type { LayoutOptions } from './create.ts'
import { assertNotBelow } from './chain-files.ts'
import { hasMagic } from './header.ts'
import type { HostFile } from './host-file.ts'
import { ImageWriter } from './image-writer.ts'
import { InFlight } from '../core/in-flight.ts'
import { UnsupportedError } from '../core/errors.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { Qcow2Image } from './image.ts'
import { hostFile } from './open.ts'

/** Options of {@link convertToQcow2}. */
export interface ConvertToQcow2Options
  extends Omit<LayoutOptions, 'size' | 'preallocation' | 'dataFile' | 'dataFileRaw'>,
    CallOptions {
  /**
   * Bytes of the file that `backing` names: where the source has nothing below it, as much of its zeroes is stored as hides that file. Default:
   * as many as the source's own backing file has; without one, the whole disk.
   */
  readonly backingSize?: number | undefined
  /** Store clusters compressed where that makes them smaller. Default false. */
  readonly compressed?: boolean | undefined
  /** Threads that compress; default the number of cores. */
  readonly workers?: number | undefined
  /**
   * Runs of zeroes of at least this many bytes, rounded down to a power of two and counted from its multiples, are not
   * stored; less than a cluster means a cluster, and so it does with `compressed`. What the source knows to be zeroes is never stored. 0 allocates all
   * clusters, also those of zeroes. Default 4096, as `qemu-img convert -S`.
   */
  readonly sparseSize?: number | undefined
  /** Called after every MiB of data that is copied, and at the end. */
  readonly onProgress?: ((progress: ConvertProgress) => void) | undefined
}

/**
 * Writes the content of `source` into `target` as a new qcow2 image. The whole content of a device is replaced, and it
 * stays open; a path names a file that does not exist yet, which is there only when the conversion has succeeded. Memory
 * stays below 32 MiB whatever the size.
 *
 * `source` is a device, or what holds a raw disk: a path, for example. The disk in an image is `await Qcow2Image.open(path)`;
 * the path of a qcow2 image is refused, because its bytes are not what is meant.
 *
 * With `backing` the image becomes an overlay: only what `source` itself holds is copied, not what it
 * has from its own backing file, which must read like the backing file named.
 * @throws what reading the source or writing the target throws; RangeError or TypeError for options the
 * format does not allow, and unknown ones; `ERR_EXISTS` for the path of a file; `ERR_BUSY` for a device that the source is read from, or the backing
 * file; `ERR_UNSUPPORTED` for the path of a qcow2 image. After an error there is no file at a path, and a device holds no image.
 */
export async function convertToQcow2(source: Source, target: Source, options: ConvertToQcow2Options = {}): Promise<void> {
  refuseUnknownOptions('convertToQcow2', options, conversionOptions)
  const progress = new DataProgress(options.onProgress)
  await withDisk(source, options, async (disk) => {
    await refuseOwnSource(disk, target, options)
    await withTarget(target, options, (host) =>
      writeImage(host, { ...options, size: disk.size }, deviceContent(disk, allocatorFor(disk, host), options, progress)),
    )
  })
  progress.finish()
}

/** Runs a task on a disk: a device, or the bytes of anything else. */
function withDisk<T>(source: Source, { signal }: CallOptions, task: (disk: BlockDevice) => Promise<T>): Promise<T> {
  return withSource(source, { readOnly: true, signal }, async (disk) => {
    if (disk !== source && hasMagic(await disk.read(0, Math.min(4, disk.size), { signal }))) {
      const name = pathOf(source) ?? 'the source'
      throw new UnsupportedError(`${name}: a qcow2 image, not a raw disk: give the disk in it, await Qcow2Image.open(...), or its bytes, await openFile(...)`, ['qcow2'])
    }
    return task(disk)
  })
}

/** Before the first byte changes: the target may be no file that the new image's content or its backing file comes from. */
async function refuseOwnSource(disk: BlockDevice, target: Source, { backing }: ConvertToQcow2Options): Promise<void> {
  if (isBlockDevice(target)) assertApart(disk, target)
  const path = pathOf(target)
  if (backing !== undefined && path !== undefined) await assertNotBelow(path, path, backing)
}

/** The options that all conversions to qcow2 take. */
export const conversionOptions: OptionNames<ConvertToQcow2Options> = {
  ...{ clusterSize: true, version: true, refcountBits: true, extendedL2: true, lazyRefcounts: true, compressionType: true },
  ...{ backing: true, backingSize: true },
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
  { backing, backingSize = sizeBelow(source), sparseSize = defaultSparseSize, signal }: ConvertToQcow2Options,
  progress: DataProgress,
): ImageContent {
  const skipBacking = backing === undefined ? false : backingSize
  const pieces: ImageContent['pieces'] = (boundary, pieceSize) =>
    countedPieces(source, { boundary, pieceSize, skipZeroes: backing === undefined && sparseSize > 0, skipBacking, signal }, progress)
  return { source: pad(source), allocate, pieces, onPiece: (piece) => progress.add(piece) }
}

/** Bytes of the backing file of a source. */
function sizeBelow(source: BlockDevice): number {
  return Qcow2Image.is(source) ? (source.engine.backing?.size ?? Infinity) : Infinity
}

/** Options of {@link writeImage}: of a conversion, and of the writer. */
export type WriteImageOptions = ConvertToQcow2Options & { readonly size: number; readonly inOrder?: boolean }

/** Writes a new image into `host`: what all conversions to qcow2 share. */
export async function writeImage(host: BlockDevice, options: WriteImageOptions, content: ImageContent): Promise<void> {
  const file = hostFile(host)
  if (host.size > 0) await clear(file)
  const { compressed, workers, sparseSize = defaultSparseSize, signal, onProgress: _, backingSize: __, ...layout } = options
  const writer = new ImageWriter(file, layout)
  const { clusterSize } = writer.geometry
  // version 2 cannot say "zeroes" over a backing file, it stores them
  const skipZeroes = sparseSize > 0 && (options.backing === undefined || writer.header.version === 3)
  const grain = !skipZeroes ? 0 : compressed === true ? clusterSize : Math.max(clusterSize, 2 ** Math.floor(Math.log2(sparseSize)))
  const conversion: Conversion = { source: content.source, file, writer, options, grain }
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

/** Whatever was there is gone, durably: an old header must not survive a conversion that fails, and refer to what is overwritten. */
async function clear(file: HostFile): Promise<void> {
  await file.device.resize(0).catch(() => file.write(0, file.allocate(Math.min(file.size, 512)).fill(0)))
  await file.flush()
}

interface Conversion {
  readonly source: BlockDevice | undefined
  readonly file: HostFile
  readonly writer: ImageWriter
  readonly options: ConvertToQcow2Options
  /** Zeroes are looked for in so many bytes at once, whole clusters, and not stored; 0 stores everything. */
  readonly grain: number
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
function keepData({ writer, grain }: Conversion, { piece, buffer }: Job, clusters: number): number[] {
  const { clusterSize } = writer.geometry
  const places = new Array<number>(clusters).fill(dropped)
  if (piece.zero && grain > 0) return places
  const bytes = buffer.subarray(0, clusters * clusterSize)
  let kept = 0
  for (let at = 0; at < bytes.length; ) {
    const { end, zero } = zeroRun(bytes, at, grain, piece.start)
    if (!zero) {
      if (kept * clusterSize !== at) buffer.copyWithin(kept * clusterSize, at, end)
      for (let i = at / clusterSize; i < end / clusterSize; i++) places[i] = kept++
    }
    at = end
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
