/** Making image files, for `create` and `convert`. Owns the files beside them; the layout is the engine's. */
import type { BlockDevice } from '../../block/device.ts'
import { identityAt } from '../../block/file-identity.ts'
import { MemoryDevice } from '../../block/memory.ts'
import { zeroContent } from '../../block/zero-content.ts'
import { Qcow2Error } from '../../core/errors.ts'
import { LuksImage } from '../../luks/luks-image.ts'
import { Qcow2Image } from '../../qcow2/image.ts'
import type { CreateOptions } from '../../qcow2/new-image.ts'
import type { Reference } from '../../qcow2/references.ts'
import { ExitError } from '../errors.ts'
import { isPipe } from '../payload.ts'
import { layoutOf, preallocationOf, switchOf, tooLarge, type CreateValues } from './create-options.ts'
import type { ImageFormat } from './formats.ts'
import { nbdUri } from './nbd-name.ts'
import { newTarget, targetName, targetPlace, type NewTarget, type TargetContext, type TargetPlace } from './new-target.ts'
import type { OpenedImage } from './opened.ts'
import { couldNotCreate } from './reasons.ts'
import { secretOf, type Secrets } from './secrets.ts'
import { parseName, parsePlace } from './spec.ts'

/** What making an image needs of its command. */
export interface ImageContext extends TargetContext {
  readonly secrets?: Secrets | undefined
}

/** An image that is being made: its files have their names when it is kept. */
export interface NewImage {
  /** What the guest sees; all of it reads as zeroes, or as the backing file. */
  readonly disk: BlockDevice
  /** The same, of qcow2. */
  readonly image: Qcow2Image | undefined
  /** Closes the image; its files get their names. */
  keep(): Promise<void>
  /** Closes it; if it was not kept, nothing is left of it. */
  discard(): Promise<void>
}

/**
 * Makes an image and closes it. An existing file is replaced when the new one is whole.
 * @throws ExitError in qemu-img's words
 */
export async function makeImage(context: ImageContext, name: string, format: ImageFormat, values: CreateValues): Promise<void> {
  const made = await beginImage(context, name, format, values)
  try {
    await made.keep()
  } catch (error) {
    throw inWordsOf(name, format, error)
  } finally {
    await made.discard()
  }
}

/**
 * Begins an image to be copied into. `below` opens its backing file, if it will be read.
 * @throws ExitError in qemu-img's words
 */
export async function beginImage(context: ImageContext, name: string, format: ImageFormat, values: CreateValues, below: () => Promise<BlockDevice> = nothingBelow): Promise<NewImage> {
  const path = placeOf(name)
  const files: NewTarget[] = []
  const begin = async (file: TargetPlace): Promise<NewTarget> => {
    const target = await newTarget(context, file)
    files.push(target)
    return target
  }
  const discard = async (): Promise<void> => {
    for (const each of files.splice(0)) await each.discard()
  }
  try {
    const making = format === 'raw' ? makeRaw(context, path, values, begin) : format === 'luks' ? makeLuks(context, path, values, begin) : makeQcow2(context, path, values, begin, below)
    const { disk, image } = await making
    const keep = async (): Promise<void> => {
      await disk.flush()
      await disk.close()
      // the data file first: an image without the file it names is of no use
      for (const each of [...files].reverse()) await each.keep()
    }
    return { disk, image, keep, discard: () => disk.close().finally(discard) }
  } catch (error) {
    await discard()
    throw inWordsOf(name, format, error)
  }
}

/** Errors of the library as qemu-img says them. */
function inWordsOf(name: string, format: ImageFormat, error: unknown): unknown {
  if (Qcow2Error.is(error, 'ERR_RANGE')) return new ExitError(1, tooLarge(format), { cause: error })
  return Qcow2Error.is(error) ? couldNotCreate(name, error) : error
}

/** Begins the file of a new image, or its data file. */
type Begin = (path: TargetPlace) => Promise<NewTarget>

/** What is made in the file. */
interface Made {
  readonly disk: BlockDevice
  readonly image?: Qcow2Image
}

async function makeQcow2({ secrets, signal }: ImageContext, path: TargetPlace, values: CreateValues, begin: Begin, below: () => Promise<BlockDevice>): Promise<Made & { readonly image: Qcow2Image }> {
  const { dataFile, ...layout } = layoutOf(values)
  const encryption = encryptionOf(values, secrets)
  const { device } = await begin(path)
  if (dataFile === undefined) {
    const image = await Qcow2Image.create(device, { ...layout, ...encryption, references: below, signal })
    return { disk: image, image }
  }
  const data = (await begin(placeOf(dataFile))).device
  const references = ({ kind }: Reference): BlockDevice | Promise<BlockDevice> => (kind === 'data file' ? data : below())
  const image = await Qcow2Image.create(device, { ...layout, dataFile, ...encryption, references, signal })
  const { preallocation, size } = layout
  if (preallocation === 'falloc' || preallocation === 'full') await data.writeZeroes(0, size, { signal })
  return { disk: image, image }
}

/** Nothing is read through a backing file while an image is made: it may be anything, or missing. */
function nothingBelow(): Promise<BlockDevice> {
  return Promise.resolve(new MemoryDevice(0))
}

/** How the image is to be encrypted. */
function encryptionOf(values: CreateValues, secrets: Secrets | undefined): Pick<CreateOptions, 'encryption'> {
  const format = values.get('encrypt.format') ?? (switchOf(values, 'encryption') === true ? 'aes' : undefined)
  if (format === undefined) return {}
  if (format !== 'luks' && format !== 'aes') throw new ExitError(1, `Parameter 'encrypt.format' does not accept value '${format}'`)
  if (format === 'luks') refuseOtherCiphers(values, 'encrypt.')
  return { encryption: { format, ...keyOf(values, 'encrypt.', secrets) } }
}

/** The passphrase of a new LUKS header, and how dear trying others is to be. */
function keyOf(values: CreateValues, prefix: 'encrypt.' | '', secrets: Secrets | undefined): { passphrase: Uint8Array; iterations?: number } {
  const id = values.get(`${prefix}key-secret`)
  if (id === undefined) throw new ExitError(1, `Parameter '${prefix}key-secret' is required for cipher`)
  const passphrase = secretOf(secrets, id)
  const time = values.get(`${prefix}iter-time`)
  return { passphrase, ...(time === undefined ? {} : { iterations: iterationsFor(Number(time)) }) }
}

/** What is made of LUKS: QEMU's defaults. */
const madeCipher: Readonly<Record<string, string>> = { 'cipher-alg': 'aes-256', 'cipher-mode': 'xts', 'ivgen-alg': 'plain64', 'hash-alg': 'sha256' }

function refuseOtherCiphers(values: CreateValues, prefix: 'encrypt.' | ''): void {
  for (const [name, made] of Object.entries(madeCipher)) {
    const asked = values.get(prefix + name)
    if (asked !== undefined && asked !== made) throw new ExitError(1, `Parameter '${prefix}${name}' does not accept value '${asked}': only '${made}' is made`)
  }
}

async function makeLuks({ secrets, signal }: ImageContext, path: TargetPlace, values: CreateValues, begin: Begin): Promise<Made> {
  const { size, preallocation } = flatLayoutOf(targetName(path), values)
  refuseOtherCiphers(values, '')
  const key = keyOf(values, '', secrets)
  if (size + (4 << 20) >= 2 ** 53) throw new ExitError(1, tooLarge('luks'))
  const { device } = await begin(path)
  const disk = await LuksImage.create(device, { size, ...key, signal })
  if (preallocation !== 'off') await device.writeZeroes(disk.header.payloadOffset, size, { signal })
  return { disk }
}

/** PBKDF2 iterations that take about so many milliseconds on a machine of today. */
export function iterationsFor(milliseconds: number): number {
  return Math.max(1000, Math.round(milliseconds * 1000))
}

async function makeRaw({ signal }: ImageContext, path: TargetPlace, values: CreateValues, begin: Begin): Promise<Made> {
  const { size, preallocation } = flatLayoutOf(targetName(path), values)
  if (size >= 2 ** 53) throw new ExitError(1, tooLarge('raw'))
  const { device } = await begin(path)
  if (device.size < size) await device.resize(size)
  // a device, unlike a new file, has content
  if (!device.growable) await zeroContent(device, 0, size, { signal })
  if (preallocation !== 'off') await device.writeZeroes(0, size, { signal })
  return { disk: device }
}

/** What is asked for of a disk that lies in its file as it is. */
function flatLayoutOf(path: string, values: CreateValues): { size: number; preallocation: 'off' | 'falloc' | 'full' } {
  const preallocation = preallocationOf(values)
  if (preallocation === 'metadata') throw new ExitError(1, `${path}: Unsupported preallocation mode: metadata`)
  return { size: Math.ceil(Number(values.get('size')) / 512) * 512, preallocation }
}

function placeOf(name: string): TargetPlace {
  const place = targetPlace(parsePlace(name))
  if (place === undefined) throw new ExitError(1, `Could not create '${name}': images are made in files and on NBD exports only; convert -n writes to what exists`)
  return place
}

/**
 * Refuses a target that is one of the sources or below one, by any name.
 * @throws ExitError
 */
export async function refuseSelf(sources: readonly OpenedImage[], target: string): Promise<void> {
  const place = isPipe(target) ? undefined : parseName(target, undefined).place
  if (place?.kind === 'nbd') refuseExport(sources, target, nbdUri(place))
  const identity = place?.kind === 'file' ? await identityAt(place.path) : undefined
  refuseSelfAt(sources, target, identity)
}

/** An export has no identity but its address. */
function refuseExport(sources: readonly OpenedImage[], target: string, uri: string): void {
  for (let source of sources as readonly (OpenedImage | undefined)[]) {
    for (; source !== undefined; source = source.backing) {
      if (source.place.kind === 'nbd' && nbdUri(source.place) === uri) throw new ExitError(1, `Could not open '${target}': it is what is to be copied`)
    }
  }
}

/** The same for a target that is open. */
export function refuseSelfAt(sources: readonly OpenedImage[], target: string, identity: string | undefined): void {
  if (identity === undefined) return
  for (let source of sources as readonly (OpenedImage | undefined)[]) {
    for (; source !== undefined; source = source.backing) {
      const files = [source.host, ...(source.image?.below ?? [])]
      if (files.some((file) => file.identity === identity)) throw new ExitError(1, `Could not open '${target}': it is what is to be copied`)
    }
  }
}
