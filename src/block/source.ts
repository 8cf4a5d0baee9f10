/**
 * Everything that a function taking "an image" accepts, made a `BlockDevice`. Owns the choice of the driver. A
 * build for browsers replaces `file.ts` and `file-lock.ts`, which alone need Node.
 */
import { UnsupportedError } from '../core/errors.ts'
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
  readonly readOnly?: boolean
  /** Direct I/O for paths and `file:` URLs; see `openFile`. */
  readonly direct?: boolean
  /** Synchronous requests for files; see `openFile`. */
  readonly syncLimit?: number
  /** Read a file even while a running QEMU writes to it: what is read may contradict itself. */
  readonly forceShare?: boolean
  /** False: open it whoever else uses it, also for writing. */
  readonly locking?: boolean | undefined
}

/**
 * Opens a source as a device that takes any request: where the driver demands alignment it is padded. The device
 * owns what it stands on: closing it closes the file, the handle or the device given. Bytes are used in place.
 * @throws Qcow2Error `ERR_NOT_FOUND`, `ERR_BUSY` (a running QEMU uses the file), `ERR_UNSUPPORTED`, `ERR_IO`
 */
export async function openSource(source: Source, options: SourceOptions = {}): Promise<BlockDevice> {
  const readOnly = options.readOnly ?? false
  if (source instanceof Uint8Array) return new MemoryDevice(source, { growable: true, readOnly })
  if (source instanceof Blob) return new BlobDevice(source)
  if (source instanceof URL && source.protocol !== 'file:') return openWeb(source, options)
  if (typeof source === 'string' || source instanceof URL || isFileHandle(source)) return openLocal(source, readOnly, options)
  if (isBlockDevice(source)) return openDevice(source, readOnly)
  throw new TypeError('a source is a path, a URL, a FileHandle, a Blob, bytes or a BlockDevice')
}

/** Runs a task on the device of a source. A device given stays open; what is opened for the task is closed after it. */
export async function withSource<T>(source: Source, options: SourceOptions, task: (device: BlockDevice) => Promise<T>): Promise<T> {
  if (isBlockDevice(source)) return task(source)
  const device = await openSource(source, options)
  try {
    return await task(device)
  } finally {
    await device.close()
  }
}

async function openLocal(file: string | URL | FileHandle, readOnly: boolean, options: SourceOptions): Promise<BlockDevice> {
  const { direct, syncLimit, signal } = options
  const device = await openFile(file, {
    readOnly,
    signal,
    ...(direct === undefined ? {} : { direct }),
    ...(syncLimit === undefined ? {} : { syncLimit }),
  })
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
