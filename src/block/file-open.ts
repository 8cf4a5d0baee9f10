/**
 * Opening files and host block devices. Owns the options, what the system is asked of the new descriptor, and the
 * words for what it refuses.
 */
import * as fs from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import type { OptionNames } from '../core/options.ts'
import type { CallOptions } from './device.ts'
import { probeAlignment, type DirectAlignment } from './file-direct.ts'
import { fileError, openError, systemCode } from './file-error.ts'
import { claimForWriting, claimTarget } from './file-gate.ts'
import { fileIdentity } from './file-identity.ts'
import { deviceNumbers } from './file-mount.ts'
import { systemPath } from './file-path.ts'

/** Options of `openFile`. */
export interface FileOptions extends CallOptions {
  /** Default false: the file must be writable. */
  readonly readOnly?: boolean | undefined
  /**
   * Direct I/O: requests go to the disk past the page cache (`O_DIRECT`), and must then be aligned as
   * `limits` says; `pad()` lifts that. Refused with `ERR_UNSUPPORTED` where the system or the
   * filesystem has none.
   */
  readonly direct?: boolean | undefined
  /**
   * `'wx'`: the file must not exist and is created; `'w'`: it is created, or emptied. As Node's flags, but a file that
   * is in use is not emptied: `ERR_BUSY` if this process has it open, if another process of this library has it open for
   * writing, or if a running QEMU uses it. A block device is never emptied.
   */
  readonly create?: 'wx' | 'w' | undefined
  /** Permissions of a file that is created, less the process's umask. Default 0o666. */
  readonly mode?: number | undefined
  /**
   * False: open it for writing, or empty it, whoever else uses it. Default true: a file is not opened for writing (`ERR_BUSY`)
   * while a running QEMU uses it and wants no writer beside it, while an image of this process writes to it, or while another
   * process of this library has it open for writing. Reading is never refused: `openSource` is for whoever wants to know that
   * a QEMU is changing what is read.
   */
  readonly locking?: boolean | undefined
  /**
   * Requests of at most this many bytes are made synchronously: about five times faster when the page
   * cache has the bytes, and a fifth for one after the other with `direct`, but the event loop stands
   * still while the disk is waited for; it turns at least once in 32 MiB. `limits.optimalTransfer` is then
   * at most this. Default 0: never; 512 KiB for a path on a file system in memory, which is never waited for.
   */
  readonly syncLimit?: number | undefined
}

export const fileOptions: OptionNames<FileOptions> = { readOnly: true, direct: true, create: true, mode: true, locking: true, syncLimit: true, signal: true }

/** An open file and what is known of it. */
export interface OpenedFile {
  readonly fd: number
  readonly path: string | undefined
  readonly handle: FileHandle | undefined
  readonly size: number
  readonly isBlockDevice: boolean
  readonly identity: string
  readonly alignment: DirectAlignment
  /** Ends the claim on a file that was opened for writing. */
  readonly letGo: () => void
}

/** Opens a file; one that is of no use here is closed again. */
export async function openDescriptor(file: string | URL | FileHandle, options: FileOptions): Promise<OpenedFile> {
  const opened = await openHandle(file, options)
  const { fd, path, handle } = opened
  let letGo = nothing
  try {
    const { isBlockDevice, identity } = measure(fd, path)
    if (options.readOnly !== true && options.locking !== false) {
      const claim = options.create === undefined ? claimForWriting : claimTarget
      letGo = await claim(fd, identity, path ?? 'FileHandle')
    }
    if (options.create === 'w' && !isBlockDevice) fs.ftruncateSync(fd, 0)
    const { size } = measure(fd, path)
    const alignment = options.direct === true ? await probeAlignment(fd, size, path ?? 'FileHandle') : { request: 1, memory: 1 }
    return { ...opened, size, isBlockDevice, identity, alignment, letGo }
  } catch (error) {
    letGo()
    await (handle === undefined ? closeDescriptor(fd) : handle.close())
    throw error
  }
}

async function openHandle(file: string | URL | FileHandle, options: FileOptions): Promise<Pick<OpenedFile, 'fd' | 'path' | 'handle'>> {
  if (typeof file !== 'string' && !(file instanceof URL)) {
    if (options.direct === true || options.create !== undefined) {
      throw new TypeError('direct and create are decided when a file is opened: give a path, not a FileHandle')
    }
    return { fd: file.fd, path: undefined, handle: file }
  }
  const path = file instanceof URL ? fileURLToPath(file) : file
  const flags = openFlags(options)
  return { fd: await openPath(path, flags, options), path, handle: undefined }
}

/** Ends when `signal` aborts, even where the system does not answer: what it opens later is closed. */
function openPath(path: string, flags: number, { signal, direct, mode = 0o666 }: FileOptions): Promise<number> {
  return new Promise((resolve, reject) => {
    let aborted = false
    const onAbort = (): void => {
      aborted = true
      reject(signal!.reason as Error)
    }
    signal?.addEventListener('abort', onAbort, { once: true })
    fs.open(systemPath(path), flags, mode, (error, fd) => {
      signal?.removeEventListener('abort', onAbort)
      if (error !== null) reject(refusedByKind(path, error) ?? openError(error, path, direct === true))
      else if (aborted) fs.close(fd)
      else resolve(fd)
    })
  })
}

/** Some kinds the system refuses itself: sockets, directories for writing, pipes with direct I/O. They get the words of the others. */
function refusedByKind(path: string, error: Error): UnsupportedError | undefined {
  if (!['ENXIO', 'EISDIR', 'EINVAL'].includes(systemCode(error) ?? '')) return undefined
  const stat = fs.statSync(systemPath(path), { throwIfNoEntry: false })
  return stat === undefined || stat.isFile() || stat.isBlockDevice() ? undefined : notAFile(path, stat, error)
}

function notAFile(name: string, stat: fs.StatsBase<number> | fs.StatsBase<bigint>, cause?: Error): UnsupportedError {
  const kind = stat.isFIFO()
    ? 'a pipe (FIFO)'
    : stat.isSocket()
      ? 'a socket'
      : stat.isDirectory()
        ? 'a directory'
        : 'a character device'
  return new UnsupportedError(`${name}: ${kind}, neither a regular file nor a block device`, [], { cause })
}

function openFlags(options: FileOptions): number {
  const { O_RDONLY, O_RDWR, O_CREAT, O_EXCL } = fs.constants
  const { O_DIRECT: direct, O_NONBLOCK: nonBlocking } = fs.constants as { O_DIRECT?: number; O_NONBLOCK?: number }
  if (options.readOnly === true && options.create !== undefined) {
    throw new TypeError('create and readOnly exclude each other: a new file is opened for writing')
  }
  if (options.direct === true && direct === undefined) {
    throw new UnsupportedError(`direct I/O: this platform has no O_DIRECT; open with direct: false`, ['O_DIRECT'])
  }
  // opening a pipe would wait for its other end, in a thread of the pool; files and devices do not mind the flag
  let flags = (options.readOnly === true ? O_RDONLY : O_RDWR) | (nonBlocking ?? 0)
  if (options.create !== undefined) flags |= O_CREAT | (options.create === 'wx' ? O_EXCL : 0)
  return options.direct === true ? flags | (direct ?? 0) : flags
}

/** What the system says of an open file. */
export function measure(fd: number, path: string | undefined): { size: number; isBlockDevice: boolean; identity: string } {
  const stat = fs.fstatSync(fd, { bigint: true })
  const identity = fileIdentity(stat)
  if (stat.isFile()) return { size: Number(stat.size), isBlockDevice: false, identity }
  const name = path ?? 'FileHandle'
  if (!stat.isBlockDevice()) throw notAFile(name, stat)
  return { size: hostDeviceSize(stat.rdev, name), isBlockDevice: true, identity }
}

/** Linux shows the size of a block device in /sys, in sectors of 512 bytes; `stat` says 0. */
function hostDeviceSize(rdev: bigint, name: string): number {
  const { major, minor } = deviceNumbers(rdev)
  try {
    return Number(fs.readFileSync(`/sys/dev/block/${major}:${minor}/size`, 'utf8')) * 512
  } catch (cause) {
    throw new Qcow2Error('ERR_UNSUPPORTED', `${name}: the size of a block device is only known on Linux`, { cause })
  }
}

export function closeDescriptor(fd: number): Promise<void> {
  return new Promise((resolve, reject) => {
    fs.close(fd, (error) => {
      if (error) reject(fileError('close', error))
      else resolve()
    })
  })
}

const nothing = (): void => undefined
