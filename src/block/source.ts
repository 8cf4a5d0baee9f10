/**
 * Everything that a function taking "an image" accepts, made a `BlockDevice`. Owns the choice of the driver, and what becomes of a file in the way. A
 * build for browsers replaces `file.ts` and `file-lock.ts`, which alone need Node.
 */
import { UnsupportedError } from '../core/errors.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { BlobDevice } from './blob.ts'
import type { BlockDevice, CallOptions } from './device.ts'
import { checkImageLocks } from './file-lock.ts'
import { newFile } from './file-new.ts'
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

/** How a target is opened: see `newFile`. */
interface TargetOptions extends CallOptions {
  readonly exclusive?: boolean | undefined
  readonly direct?: boolean | undefined
  readonly syncLimit?: number | undefined
  readonly mode?: number | undefined
  readonly locking?: boolean | undefined
}

/** Where a result is written. */
export interface Target {
  /** Of a path: a file made anew, which has its name only when it is kept. Anything else as it is. */
  readonly device: BlockDevice
  /** When others see what is written. */
  readonly shows: 'at once' | 'when kept'
  /** The result is whole: what was written becomes durable, and a file gets its name. A device given is left as it is. */
  keep(options?: { readonly folder?: 'now' | 'with next flush' }): Promise<void>
  /** Closes what was opened here. A file that was not kept disappears, what had its name stays. */
  discard(): Promise<void>
}

/**
 * Opens a target. A path is a new file beside what has its name; a device given stays the caller's.
 * @throws Qcow2Error `ERR_BUSY` if the file at a path is in use, `ERR_EXISTS` with `exclusive`, and what `openFile` throws
 */
export async function openTarget(target: Source, options: TargetOptions = {}): Promise<Target> {
  const { exclusive, direct, syncLimit, mode, locking, signal } = options
  if (typeof target === 'string' || target instanceof URL) return newFile(target, { exclusive, direct, syncLimit, mode, locking, signal })
  if (isBlockDevice(target)) return { device: target, shows: 'at once', keep: nothing, discard: nothing }
  const device = await openSource(target)
  return { device, shows: 'at once', keep: nothing, discard: () => device.close() }
}

/**
 * Runs a task on the device of a target. A device given stays open; a file that is made for the task is closed after it, and
 * is there only if the task succeeds. A file that exists is not touched: it could be the one that the task reads from.
 */
export async function withTarget<T>(given: Source, { signal }: CallOptions, task: (device: BlockDevice) => Promise<T>): Promise<T> {
  const target = await openTarget(given, { exclusive: true, signal })
  try {
    const result = await task(target.device)
    await target.keep()
    return result
  } finally {
    await target.discard()
  }
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

const nothing = (): Promise<void> => Promise.resolve()

async function openLocal(file: string | URL | FileHandle, readOnly: boolean, options: SourceOptions): Promise<BlockDevice> {
  const { direct, syncLimit, signal, locking } = options
  const device = await openFile(file, { readOnly, direct, syncLimit, signal, locking })
  try {
    if (readOnly && locking !== false && options.forceShare !== true) await checkImageLocks(file, 'read')
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

/** After a failed open: closes what was opened for it. A device given is the caller's until the call resolves. */
export async function closeUnlessGiven(device: BlockDevice, source: Source): Promise<void> {
  if (!isBlockDevice(source)) await device.close()
}

/** It can only be read: a web address, a device that says so. */
export function isReadOnly(source: Source): boolean {
  if (source instanceof URL) return source.protocol !== 'file:'
  return isObject(source) && 'readOnly' in source && source.readOnly
}

/** The path a source was given by, of a local file; undefined for anything else. */
export function pathOf(source: Source): string | undefined {
  if (typeof source === 'string') return source
  if (source instanceof URL) return source.protocol === 'file:' ? decodeURIComponent(source.pathname) : undefined
  return isObject(source) && 'path' in source && typeof source.path === 'string' ? source.path : undefined
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
