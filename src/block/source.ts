/**
 * Everything that a function taking "an image" accepts, made a `BlockDevice`. Owns the choice of the driver, and what becomes of a file in the way. A
 * build for browsers replaces `file.ts` and `file-lock.ts`, which alone need Node.
 */
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { BlobDevice } from './blob.ts'
import type { BlockDevice, CallOptions } from './device.ts'
import { checkImageLocks } from './file-lock.ts'
import { openFile, type FileHandle } from './file.ts'
import { openHttp } from './http.ts'
import { MemoryDevice } from './memory.ts'
import { pad } from './pad.ts'
import { slice } from './slice.ts'

/**
 * A path, a `file:` or `http(s):` URL, an open `FileHandle`, a `Blob`, bytes, or a device. A string is always a path.
 */
export type Source = string | URL | FileHandle | Blob | Uint8Array | BlockDevice

/** Options of {@link openSource}. */
export interface SourceOptions extends CallOptions {
  /** Default false. URLs of web servers and blobs are read-only in any case. */
  readonly readOnly?: boolean | undefined
  /** Direct I/O for paths and `file:` URLs; see `openFile`. */
  readonly direct?: boolean | undefined
  /** Synchronous requests for files; see `openFile`. */
  readonly syncLimit?: number | undefined
  /** Read a file even while a running QEMU writes to it: what is read may contradict itself. */
  readonly forceShare?: boolean | undefined
  /** False: open it whoever else uses it, also for writing. */
  readonly locking?: boolean | undefined
}

const sourceOptions: OptionNames<SourceOptions> = { readOnly: true, direct: true, syncLimit: true, forceShare: true, locking: true, signal: true }

/**
 * Opens a source as a device that takes any request: where the driver demands alignment it is padded. The device
 * owns what it stands on: closing it closes the file, the handle or the device given. Bytes are used in place.
 * @throws TypeError for what is no source, and for an unknown option
 * @throws Qcow2Error `ERR_NOT_FOUND`, `ERR_BUSY` (a running QEMU uses the file), `ERR_UNSUPPORTED`, `ERR_IO`
 */
export async function openSource(source: Source, options: SourceOptions = {}): Promise<BlockDevice> {
  refuseUnknownOptions('openSource', options, sourceOptions)
  const readOnly = options.readOnly ?? false
  if (source instanceof Uint8Array) return new MemoryDevice(source, { growable: true, readOnly })
  if (source instanceof Blob) return new BlobDevice(source)
  if (source instanceof URL && source.protocol !== 'file:') return openWeb(source, options)
  if (typeof source === 'string' || source instanceof URL || isFileHandle(source)) return openLocal(source, readOnly, options)
  if (isBlockDevice(source)) return openDevice(source, readOnly)
  throw new TypeError('a source is a path, a URL, a FileHandle, a Blob, bytes or a BlockDevice')
}

/** Runs a task on the device of a source. A device given stays open; what is opened for the task is closed after it. */
export function withSource<T>(source: Source, options: SourceOptions, task: (device: BlockDevice) => Promise<T>): Promise<T> {
  return withDevice(source, () => openSource(source, options), task)
}

/** How a target is opened. */
interface TargetOptions extends CallOptions {
  /** Fail with `ERR_EXISTS` if the file exists, instead of emptying it. */
  readonly exclusive?: boolean | undefined
  readonly direct?: boolean | undefined
  readonly syncLimit?: number | undefined
}

/** A fresh file for a path or `file:` URL; anything else as it is. A file that a running QEMU uses is left alone. */
export async function openTarget(target: Source, { exclusive, direct, syncLimit, signal }: TargetOptions = {}): Promise<BlockDevice> {
  if (typeof target !== 'string' && !(target instanceof URL)) return openSource(target)
  try {
    return await openFile(target, { direct, syncLimit, signal, create: 'wx' })
  } catch (error) {
    if (exclusive === true || !Qcow2Error.is(error, 'ERR_EXISTS')) throw error
  }
  await checkImageLocks(target, 'write')
  return openFile(target, { direct, syncLimit, signal, create: 'w' })
}

/**
 * Runs a task on the device of a target. A device given stays open; what is opened for the task is closed after it. A
 * file that exists is not touched: it could be the one that the task reads from.
 */
export function withTarget<T>(target: Source, { signal }: CallOptions, task: (device: BlockDevice) => Promise<T>): Promise<T> {
  return withDevice(target, () => openTarget(target, { exclusive: true, signal }), task)
}

async function withDevice<T>(given: Source, open: () => Promise<BlockDevice>, task: (device: BlockDevice) => Promise<T>): Promise<T> {
  if (isBlockDevice(given)) return task(given)
  const device = await open()
  try {
    return await task(device)
  } finally {
    await device.close()
  }
}

async function openLocal(file: string | URL | FileHandle, readOnly: boolean, options: SourceOptions): Promise<BlockDevice> {
  const { direct, syncLimit, signal } = options
  const device = await openFile(file, { readOnly, direct, syncLimit, signal })
  try {
    if (options.locking !== false && (!readOnly || options.forceShare !== true)) await checkImageLocks(file, readOnly ? 'read' : 'write')
    return pad(device)
  } catch (error) {
    await device.close()
    throw error
  }
}

function openWeb(url: URL, options: SourceOptions): Promise<BlockDevice> {
  if (url.protocol === 'http:' || url.protocol === 'https:') return openHttp(url, { signal: options.signal })
  throw new UnsupportedError(`${url.protocol} URLs are not supported; use file:, http: or https:`, [url.protocol])
}

function openDevice(device: BlockDevice, readOnly: boolean): BlockDevice {
  const padded = pad(device)
  return readOnly && !padded.readOnly ? slice(padded, 0, padded.size, { readOnly: true }) : padded
}

/** It can only be read: a web address, a device that says so. */
export function isReadOnly(source: Source): boolean {
  if (source instanceof URL) return source.protocol !== 'file:'
  return typeof source === 'object' && 'readOnly' in source && source.readOnly
}

/** The path a source was given by, of a local file; undefined for anything else. */
export function pathOf(source: Source): string | undefined {
  if (typeof source === 'string') return source
  if (source instanceof URL) return source.protocol === 'file:' ? decodeURIComponent(source.pathname) : undefined
  return 'path' in source && typeof source.path === 'string' ? source.path : undefined
}

function isFileHandle(source: unknown): source is FileHandle {
  return isObject(source) && 'fd' in source && typeof source.fd === 'number' && 'stat' in source
}

/** By its methods: devices of the ESM and of the CommonJS build have different classes. */
export function isBlockDevice(source: unknown): source is BlockDevice {
  return isObject(source) && 'readInto' in source && 'limits' in source && typeof source.readInto === 'function'
}

function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null
}
