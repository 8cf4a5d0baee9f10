/**
 * Giving an overlay another backing file. Safe: what would read differently is copied into the overlay
 * first. Unsafe: only the name changes.
 */
import type { BlockDevice, CallOptions, Extent } from '../block/device.ts'
import { equalBytes } from '../bytes/equal.ts'
import { isZero } from '../bytes/zero.ts'
import { encodeName } from '../bytes/file-name.ts'
import { UnsupportedError } from '../core/errors.ts'
import { withSource, type Source } from '../block/source.ts'
import { refuseLoop } from './chain-files.ts'
import { assertCompressible } from './compressed.ts'
import { checkNewBacking } from './create.ts'
import type { Engine } from './engine.ts'
import { extensionType, withExtension } from './extensions.ts'
import { Qcow2Image } from './image.ts'
import { openMetadata } from './open.ts'
import { settle } from './shutdown.ts'
import { zeroActive } from './zero.ts'

/** The backing file an image is to have. */
export interface NewBacking {
  /** Name to be stored. */
  readonly file: string
  /** `qcow2` or `raw`; never guessed later. */
  readonly format: string
}

/** Options of {@link rebaseImage}. */
export interface RebaseOptions extends CallOptions {
  /** Store what is copied compressed, in whole clusters. Default false. */
  readonly compressed?: boolean | undefined
  /** Bytes done, of how many. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined
}

const leastPieceBytes = 1 << 20
/** Differences are found and copied in grains of this many bytes; compressed ones in clusters. */
const plainGrain = 4096

/**
 * Changes the backing file of `image`, which reads the same before and after. `device` is the new
 * backing file, open for reading; it stays the caller's. Without `backing` the image is flattened: it
 * then needs no other file. Open the image again afterwards: this one goes on reading the old chain.
 *
 * Order: the differences, flush, then the name, in one write of the header. A crash before that leaves
 * the overlay over its old backing file, only with more data of its own.
 */
export async function rebaseImage(
  image: Qcow2Image,
  backing: (NewBacking & { readonly device: BlockDevice }) | undefined,
  options: RebaseOptions = {},
): Promise<void> {
  const { compressed = false, signal, onProgress } = options
  const { clusterSize } = image.engine.geometry
  await refuseNewBacking(image.engine, backing)
  if (compressed) assertCompressible(image.engine)
  const pieceBytes = Math.max(leastPieceBytes, clusterSize)
  const [old, next] = [new Uint8Array(pieceBytes), new Uint8Array(pieceBytes)]
  const copy: Copy = { image, compressed, grain: compressed ? clusterSize : plainGrain, signal }
  let covered = 0
  for await (const extent of image.map({ signal })) {
    // what the overlay has itself hides any backing file
    if (extent.depth === 0 && extent.present) continue
    const [start, end] = compressed ? wholeClusters(extent, clusterSize, image.size) : [extent.start, extent.start + extent.length]
    for (let at = Math.max(start, covered); at < end; ) {
      // pieces end at multiples of their size, so that no cluster is in two of them
      const length = Math.min(end, (Math.floor(at / pieceBytes) + 1) * pieceBytes) - at
      const [was, becomes] = [old.subarray(0, length), next.subarray(0, length)]
      if (extent.zero && !compressed) was.fill(0)
      else await image.readInto(at, was, { signal })
      await readPadded(backing?.device, at, becomes, signal)
      await copyDifferences(copy, at, was, becomes)
      at += length
      onProgress?.({ done: at, total: image.size })
    }
    covered = Math.max(covered, end)
  }
  await image.flush({ signal })
  await setBackingFile(image, backing)
}

/**
 * Changes only the name and format of the backing file, `qemu-img rebase -u`. The image reads
 * differently afterwards unless the file named has the same content; it need not exist.
 * @param target an open image, or where one is: it is then opened and closed again, and its old backing file need not exist
 * @throws FormatError for a name that leads back to the image; RangeError if the name does not fit into the header;
 *   UnsupportedError with a raw data file.
 */
export async function setBackingFile(target: Qcow2Image | Source, backing: NewBacking | undefined): Promise<void> {
  if (Qcow2Image.is(target)) return setBackingName(target.engine, backing)
  await withSource(target, {}, async (device) => {
    const engine = await openMetadata(device)
    await setBackingName(engine, backing)
    await settle(engine)
  })
}

async function setBackingName(engine: Engine, backing: NewBacking | undefined): Promise<void> {
  await refuseNewBacking(engine, backing)
  const format = backing === undefined ? undefined : encodeName(backing.format)
  const extensions = withExtension(engine.content.extensions, extensionType.backingFormat, format)
  await engine.requests.exclusive(async () => {
    if (engine.unchanged) await engine.change()
    await engine.writeHeader({}, { extensions, backingFile: backing === undefined ? undefined : encodeName(backing.file) })
  })
}

/** What cannot be the backing file is refused before anything is copied or written. */
async function refuseNewBacking(engine: Engine, backing: NewBacking | undefined): Promise<void> {
  if (backing === undefined) return
  checkNewBacking(backing)
  if (engine.rawDataFile) throw new UnsupportedError('a raw data file and a backing file exclude each other', ['backing file'])
  const { path } = engine.host.device
  if (path !== undefined) await refuseLoop(path, { backing })
}

async function readPadded(device: BlockDevice | undefined, at: number, target: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
  const present = Math.max(0, Math.min(target.length, (device?.size ?? 0) - at))
  target.fill(0, present)
  if (device !== undefined && present > 0) await device.readInto(at, target.subarray(0, present), { signal })
}

/** The clusters an extent touches. */
function wholeClusters({ start, length }: Extent, clusterSize: number, size: number): [start: number, end: number] {
  return [Math.floor(start / clusterSize) * clusterSize, Math.min(size, Math.ceil((start + length) / clusterSize) * clusterSize)]
}

interface Copy extends CallOptions {
  readonly image: Qcow2Image
  readonly compressed: boolean
  readonly grain: number
}

/** Writes the runs of grains in which `was` and `becomes` differ. */
async function copyDifferences(copy: Copy, at: number, was: Uint8Array, becomes: Uint8Array): Promise<void> {
  const { image, compressed, grain, signal } = copy
  // as QEMU does: zeroes of a backing file are stored, those of no backing file only marked
  const unbacked = image.engine.backing?.size ?? 0
  const kind = (from: number): 'same' | 'zero' | 'data' => {
    const length = Math.min(grain, was.length - from)
    if (equalBytes(was, becomes, from, length)) return 'same'
    return at + from >= unbacked && isZero(was, from, length) ? 'zero' : 'data'
  }
  for (let from = 0; from < was.length; ) {
    const what = kind(from)
    let to = from + grain
    while (to < was.length && kind(to) === what) to += grain
    const bytes = was.subarray(from, to)
    if (what === 'zero') await coverWithZeroes(copy, at + from, bytes)
    else if (what === 'data' && compressed) await image.writeCompressed(at + from, bytes, { signal })
    else if (what === 'data') await image.write(at + from, bytes, { signal })
    from = to
  }
}

/** Zeroes that hide what the new backing file has there: whole clusters say so, the rest is stored. */
async function coverWithZeroes({ image, signal }: Copy, at: number, zeroes: Uint8Array): Promise<void> {
  const { engine } = image
  const { clusterSize } = engine.geometry
  const end = at + zeroes.length
  const first = Math.min(end, Math.ceil(at / clusterSize) * clusterSize)
  const last = end === image.size ? end : Math.max(first, Math.floor(end / clusterSize) * clusterSize)
  if (at < first) await image.write(at, zeroes.subarray(0, first - at), { signal })
  if (first < last) await engine.requests.run(() => zeroActive(engine, first, last - first, 'cover', signal))
  if (last < end) await image.write(last, zeroes.subarray(last - at), { signal })
}
