/** Making image files, for `create` and `convert`. Owns the files beside them; the layout is the engine's. */
import { resolve } from 'node:path'
import type { BlockDevice } from '../../block/device.ts'
import { openFile } from '../../block/file.ts'
import { MemoryDevice } from '../../block/memory.ts'
import { Qcow2Error } from '../../core/errors.ts'
import { LuksImage } from '../../luks/luks-image.ts'
import { Qcow2Image } from '../../qcow2/image.ts'
import type { CreateOptions } from '../../qcow2/new-image.ts'
import type { Reference } from '../../qcow2/references.ts'
import type { Context } from '../command.ts'
import { ExitError } from '../errors.ts'
import { layoutOf, preallocationOf, switchOf, tooLarge, type CreateValues } from './create-options.ts'
import type { ImageFormat } from './formats.ts'
import { syncLimit, type OpenedImage } from './open.ts'
import { couldNotCreate } from './reasons.ts'
import { secretOf, type Secrets } from './secrets.ts'
import { parseName, parsePlace } from './spec.ts'

/**
 * Makes an image and closes it. An existing file is replaced.
 * @throws ExitError in qemu-img's words
 */
export async function makeImage(name: string, format: ImageFormat, values: CreateValues, signal: AbortSignal, secrets?: Secrets): Promise<void> {
  const path = pathOf(name)
  if (format === 'raw') return makeRaw(path, values, signal)
  if (format === 'luks') return makeLuks(path, values, signal, secrets)
  const layout = layoutOf(values)
  if (layout.dataFile !== undefined) await makeDataFile(pathOf(layout.dataFile), layout.size)
  try {
    const image = await Qcow2Image.create(path, { ...layout, ...encryptionOf(values, secrets), references: untouched, signal })
    await image.flush()
    await image.close()
    const { dataFile, preallocation } = layout
    if (dataFile !== undefined && (preallocation === 'falloc' || preallocation === 'full')) await fill(pathOf(dataFile), 0, layout.size, signal)
  } catch (error) {
    if (Qcow2Error.is(error, 'ERR_RANGE')) {
      throw new ExitError(1, tooLarge('qcow2'), { cause: error })
    }
    if (Qcow2Error.is(error)) throw couldNotCreate(name, error)
    throw error
  }
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

async function makeLuks(path: string, values: CreateValues, signal: AbortSignal, secrets: Secrets | undefined): Promise<void> {
  const { size, preallocation } = flatLayoutOf(path, values)
  refuseOtherCiphers(values, '')
  const key = keyOf(values, '', secrets)
  if (size + (4 << 20) >= 2 ** 53) throw new ExitError(1, tooLarge('luks'))
  await using image = await LuksImage.create(path, { size, ...key, signal }).catch((error: unknown) => {
    throw couldNotCreate(path, error)
  })
  const { payloadOffset } = image.header
  if (preallocation !== 'off') await fill(path, payloadOffset, size, signal)
}

/** PBKDF2 iterations that take about so many milliseconds on a machine of today. */
export function iterationsFor(milliseconds: number): number {
  return Math.max(1000, Math.round(milliseconds * 1000))
}

/** Nothing is read through a backing file while an image is made: it may be anything, or missing. */
function untouched({ kind }: Reference): boolean | BlockDevice {
  return kind === 'data file' || new MemoryDevice(0)
}

async function makeRaw(path: string, values: CreateValues, signal: AbortSignal): Promise<void> {
  const { size, preallocation } = flatLayoutOf(path, values)
  if (size >= 2 ** 53) throw new ExitError(1, tooLarge('raw'))
  await using device = await openFile(path, { create: 'w' }).catch((error: unknown) => {
    throw couldNotCreate(path, error)
  })
  await device.resize(size)
  if (preallocation !== 'off') await device.writeZeroes(0, size, { signal })
}

/** What is asked for of a disk that lies in its file as it is. */
function flatLayoutOf(path: string, values: CreateValues): { size: number; preallocation: 'off' | 'falloc' | 'full' } {
  const preallocation = preallocationOf(values)
  if (preallocation === 'metadata') throw new ExitError(1, `${path}: Unsupported preallocation mode: metadata`)
  return { size: Math.ceil(Number(values.get('size')) / 512) * 512, preallocation }
}

/** Makes a file take its space. */
async function fill(path: string, offset: number, length: number, signal: AbortSignal): Promise<void> {
  await using device = await openFile(path)
  await device.writeZeroes(offset, length, { signal })
  await device.flush()
}

/**
 * The file of a target, made or emptied, as a device that the command may watch. `failed` begins the message if that fails.
 * @throws ExitError
 */
export async function emptyFile({ wrapDevice }: Pick<Context, 'wrapDevice'>, path: string, { direct = false, failed }: { readonly direct?: boolean; readonly failed: string }): Promise<BlockDevice> {
  const file = await openFile(path, { ...(direct ? { direct } : { syncLimit }), create: 'w' }).catch((error: unknown) => {
    throw new ExitError(1, `${failed}: ${couldNotCreate(path, error).message}`, { cause: error })
  })
  return wrapDevice?.(file, path) ?? file
}

async function makeDataFile(path: string, size: number): Promise<void> {
  await using device = await openFile(path, { create: 'w' })
  await device.resize(size)
}

function pathOf(name: string): string {
  const place = parsePlace(name)
  if (place.kind !== 'file') throw new ExitError(1, `Could not create '${name}': images are made in files only; convert -n writes to what exists`)
  return place.path
}

/**
 * Refuses a target that is one of the sources or below one.
 * @throws ExitError
 */
export function refuseSelf(sources: readonly OpenedImage[], target: string): void {
  const place = target === '-' ? undefined : parseName(target, undefined).place
  if (place?.kind !== 'file') return
  for (let source of sources as readonly (OpenedImage | undefined)[]) {
    for (; source !== undefined; source = source.backing) {
      if (source.place.kind === 'file' && resolve(source.place.path) === resolve(place.path)) {
        throw new ExitError(1, `Could not open '${target}': it is what is to be copied`)
      }
    }
  }
}
