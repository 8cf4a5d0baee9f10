/**
 * Giving an overlay another backing file. Safe: what would read differently is copied into the overlay
 * first. Unsafe: only the name changes.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { equalBytes } from '../bytes/equal.ts'
import { UnsupportedError } from '../core/errors.ts'
import { extensionType, withExtension } from './extensions.ts'
import type { Qcow2Image } from './image.ts'
import { maxBackingFormatName } from './limits.ts'

/** The backing file an image is to have. */
export interface NewBacking {
  /** Name to be stored. */
  readonly file: string
  /** `qcow2` or `raw`; never guessed later. */
  readonly format: string
}

/** Options of {@link rebaseImage}. */
export interface RebaseOptions extends CallOptions {
  /** Bytes done, of how many. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined
}

const pieceBytes = 1 << 20
/** Differences are found and copied in grains of this many bytes. */
const grain = 4096

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
  const { signal, onProgress } = options
  const [old, next] = [new Uint8Array(pieceBytes), new Uint8Array(pieceBytes)]
  for await (const extent of image.map({ signal })) {
    // what the overlay has itself hides any backing file
    if (extent.depth === 0 && extent.present) continue
    const end = extent.start + extent.length
    for (let at = extent.start; at < end; at += pieceBytes) {
      const length = Math.min(pieceBytes, end - at)
      const [was, becomes] = [old.subarray(0, length), next.subarray(0, length)]
      if (extent.zero) was.fill(0)
      else await image.readInto(at, was, { signal })
      await readPadded(backing?.device, at, becomes, signal)
      await copyDifferences(image, at, was, becomes, signal)
      onProgress?.({ done: at + length, total: image.size })
    }
  }
  await image.flush({ signal })
  await setBackingFile(image, backing)
}

/**
 * Changes only the name and format of the backing file, `qemu-img rebase -u`. The image reads
 * differently afterwards unless the file named has the same content.
 * @throws RangeError if the name does not fit into the header.
 */
export async function setBackingFile(image: Qcow2Image, backing: NewBacking | undefined): Promise<void> {
  const { engine } = image
  if (engine.rawDataFile && backing !== undefined) throw new UnsupportedError('a raw data file and a backing file exclude each other', ['backing file'])
  const text = new TextEncoder()
  const format = backing === undefined ? undefined : text.encode(backing.format)
  if (format !== undefined && format.length > maxBackingFormatName) {
    throw new RangeError(`backing format names have at most ${maxBackingFormatName} bytes: ${backing!.format}`)
  }
  const extensions = withExtension(engine.content.extensions, extensionType.backingFormat, format)
  await engine.requests.exclusive(async () => {
    if (engine.untouched) await engine.touch()
    await engine.writeHeader({}, { extensions, backingFile: backing === undefined ? undefined : text.encode(backing.file) })
  })
}

async function readPadded(device: BlockDevice | undefined, at: number, target: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
  const present = Math.max(0, Math.min(target.length, (device?.size ?? 0) - at))
  target.fill(0, present)
  if (device !== undefined && present > 0) await device.readInto(at, target.subarray(0, present), { signal })
}

/** Writes the runs of grains in which `was` and `becomes` differ. */
async function copyDifferences(image: Qcow2Image, at: number, was: Uint8Array, becomes: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
  const same = (from: number): boolean => equalBytes(was, becomes, from, Math.min(grain, was.length - from))
  for (let from = 0; from < was.length; from += grain) {
    if (same(from)) continue
    let to = from + grain
    while (to < was.length && !same(to)) to += grain
    await image.write(at + from, was.subarray(from, Math.min(to, was.length)), { signal })
    from = to - grain
  }
}
