/**
 * Files and host block devices. Owns the descriptor, the loop over short transfers, and the
 * translation of system errors; knows nothing of what the bytes mean.
 *
 * Requests go through callback `fs.read` and `fs.write`: promises of a `FileHandle` cost a third more
 * CPU for each request.
 */
import * as fs from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { Qcow2Error, UnsupportedError, type IoOperation } from '../core/errors.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { BaseDevice, type BlockLimits, type CallOptions, type WriteZeroesOptions } from './device.ts'
import { fileError, openError } from './file-error.ts'
import { fileIdentity } from './file-lock.ts'
import { probeAlignment, type DirectAlignment } from './file-direct.ts'
import { isInMemory } from './file-system.ts'
import { allocateAligned } from './slab.ts'

export type { FileHandle }

/** Options of {@link openFile}. */
export interface FileOptions extends CallOptions {
  /** Default false: the file must be writable. */
  readonly readOnly?: boolean | undefined
  /**
   * Direct I/O: requests go to the disk past the page cache (`O_DIRECT`), and must then be aligned as
   * `limits` says; `pad()` lifts that. Refused with `ERR_UNSUPPORTED` where the system or the
   * filesystem has none.
   */
  readonly direct?: boolean | undefined
  /** `'wx'`: the file must not exist and is created; `'w'`: it is created, or emptied. As Node's flags. */
  readonly create?: 'wx' | 'w' | undefined
  /**
   * Requests of at most this many bytes are made synchronously: about five times faster when the page
   * cache has the bytes, and a fifth for one after the other with `direct`, but the event loop stands
   * still while the disk is waited for; it turns at least once in 32 MiB. `limits.optimalTransfer` is then
   * at most this. Default 0: never; 512 KiB for a path on a file system in memory, which is never waited for.
   */
  readonly syncLimit?: number | undefined
}

const fileOptions: OptionNames<FileOptions> = { readOnly: true, direct: true, create: true, syncLimit: true, signal: true }

/** What `fs.read` and `fs.write` have in common. */
type Transfer = (fd: number, bytes: Uint8Array, at: number, length: number, offset: number, moved: (error: Error | null, count: number) => void) => void

/** The system transfers a little less than 2 GiB at a time; this divides into whole pages. */
const maxTransfer = 1 << 30

/** For files in memory: a turn through the thread pool costs as much as copying a quarter of this. */
const syncLimitInMemory = 512 << 10
/** Bytes moved synchronously before one request goes the other way, so that the event loop turns. */
const syncStretch = 32 << 20
/** What a request counts for beside its bytes. */
const syncRequest = 16 << 10

/**
 * Opens a file or a host block device.
 * @param file a path, a `file:` URL, or an open `FileHandle`, which the device takes over and closes
 * @throws Qcow2Error `ERR_NOT_FOUND`, `ERR_EXISTS` (with `create: 'wx'`), `ERR_UNSUPPORTED` (direct I/O
 *   refused; neither a file nor a block device), `ERR_IO`
 */
export function openFile(file: string | URL | FileHandle, options: FileOptions = {}): Promise<FileDevice> {
  return FileDevice.open(file, options)
}

/** A file as a `BlockDevice`: grows when written past its end, and does not give space back. */
export class FileDevice extends BaseDevice {
  /** Path as it was opened; undefined for a `FileHandle`. */
  readonly path: string | undefined
  /** Device and inode: the same for every device on the same file, whatever path it was opened by. */
  readonly identity: string
  readonly readOnly: boolean
  readonly limits: BlockLimits
  readonly #fd: number
  readonly #handle: FileHandle | undefined
  readonly #syncLimit: number
  readonly #growable: boolean
  readonly #direct: boolean
  #size: number
  /** End of the furthest write submitted: truncating below it would cut bytes that are on their way. */
  #submittedEnd: number
  #syncBytes = 0
  /** Operations under way, each with all its system calls. */
  #inFlight = 0
  #idle: (() => void) | undefined
  #released = false
  #lostWrites: Error | undefined

  private constructor(opened: OpenedFile, options: FileOptions) {
    super()
    this.path = opened.path
    this.identity = opened.identity
    this.#fd = opened.fd
    this.#handle = opened.handle
    this.#size = opened.size
    this.#submittedEnd = opened.size
    this.#growable = !opened.isBlockDevice
    this.#direct = options.direct === true
    this.readOnly = options.readOnly ?? false
    this.#syncLimit = options.syncLimit ?? defaultSyncLimit(opened)
    this.limits = {
      requestAlignment: opened.alignment.request,
      memoryAlignment: opened.alignment.memory,
      optimalTransfer: this.#syncLimit > 0 ? Math.min(this.#syncLimit, 1 << 20) : 1 << 20,
      discardAlignment: 0,
    }
  }

  /** See {@link openFile}. */
  static async open(file: string | URL | FileHandle, options: FileOptions = {}): Promise<FileDevice> {
    refuseUnknownOptions('openFile', options, fileOptions)
    options.signal?.throwIfAborted()
    const { descriptor, path, handle } = await openDescriptor(file, options)
    try {
      const { size, isBlockDevice, identity } = measure(descriptor, path)
      const alignment = options.direct === true ? await probeAlignment(descriptor, size, path ?? 'FileHandle') : { request: 1, memory: 1 }
      return new FileDevice({ fd: descriptor, path, handle, size, isBlockDevice, identity, alignment }, options)
    } catch (error) {
      await (handle === undefined ? closeDescriptor(descriptor) : handle.close())
      throw error
    }
  }

  get size(): number {
    return this.#size
  }

  override get growable(): boolean {
    return this.#growable
  }

  protected onRead(offset: number, target: Uint8Array): Promise<void> {
    const odd = target.length % this.limits.requestAlignment
    if (odd === 0) return this.#transfer('read', offset, target)
    return this.#asOne(() => this.#readLastSector(offset, target, odd))
  }

  protected onWrite(offset: number, source: Uint8Array): Promise<void> {
    const end = offset + source.length
    this.#submittedEnd = Math.max(this.#submittedEnd, end)
    const writing = this.#transfer('write', offset, source)
    if (end <= this.#size) return writing
    return writing.then(() => {
      this.#size = Math.max(this.#size, end)
    })
  }

  /** Past the end the file only gets longer: the new bytes are a hole and read as zeroes. */
  protected override async onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    const end = offset + length
    const written = Math.max(0, Math.min(end, this.#submittedEnd) - offset)
    if (written < length) this.#extend(end)
    if (written > 0) await this.#asOne(() => super.onWriteZeroes(offset, this.#roundUp(written, length), options))
  }

  /**
   * The system reports a failed write-back once and then takes the pages for clean: after that no flush of a
   * buffered file can promise anything.
   */
  protected async onFlush(): Promise<void> {
    if (this.#lostWrites !== undefined) throw this.#lostWrites
    try {
      await this.#call('flush', (settle) => fs.fdatasync(this.#fd, settle))
    } catch (error) {
      if (!this.#direct) this.#lostWrites = error as Error
      throw error
    }
  }

  /** Shrinking waits for nothing: the caller ends its requests beyond the new size first. */
  protected override async onResize(size: number): Promise<void> {
    if (!this.growable) throw new UnsupportedError('a host block device has a fixed size')
    if (size >= this.#submittedEnd) {
      this.#extend(size)
      return
    }
    this.#submittedEnd = size
    this.#size = size
    await this.#call('resize', (settle) => fs.ftruncate(this.#fd, size, settle))
  }

  protected async onClose(): Promise<void> {
    // a descriptor closed under a running request may be reused by another file
    if (this.#inFlight > 0) await new Promise<void>((resolve) => (this.#idle = resolve))
    this.#released = true
    await (this.#handle === undefined ? closeDescriptor(this.#fd) : this.#handle.close())
  }

  /** Before each use of the descriptor: once it is closed its number may be another file's. */
  #assertHeld(): void {
    if (this.#released) throw new Qcow2Error('ERR_CLOSED', `${this.path ?? 'FileHandle'}: the file is closed`)
  }

  /** Synchronous, so that no write can be submitted between the decision and the truncation. */
  #extend(size: number): void {
    this.#assertHeld()
    this.#submittedEnd = size
    try {
      fs.ftruncateSync(this.#fd, size)
    } catch (error) {
      throw fileError('resize', error, { name: this.path })
    }
    this.#size = size
  }

  /** Direct I/O to a file whose size is no multiple of the sector: its last sector comes over a bounce buffer. */
  async #readLastSector(offset: number, target: Uint8Array, odd: number): Promise<void> {
    const whole = target.length - odd
    if (whole > 0) await this.#transfer('read', offset, target.subarray(0, whole))
    const sector = allocateAligned(this.limits.requestAlignment)
    const at = offset + whole
    await this.#call('read', (settle) => {
      fs.read(this.#fd, sector, 0, sector.length, at, (error, count) => {
        settle(error ?? (count < odd ? new Error(endOfFile) : null))
      })
    }, at, odd)
    target.set(sector.subarray(0, odd), whole)
  }

  #transfer(operation: 'read' | 'write', offset: number, bytes: Uint8Array): Promise<void> {
    if (bytes.length <= this.#syncLimit && this.#syncBytes < syncStretch) return this.#transferSync(operation, offset, bytes)
    this.#syncBytes = 0
    return this.#call(operation, (settle) => this.#move(operation, offset, bytes, 0, settle), offset, bytes.length)
  }

  /** Moves the bytes from `at` on, as often as the system stops short. Nearly all requests are one call: little is made for each. */
  #move(operation: 'read' | 'write', offset: number, bytes: Uint8Array, at: number, settle: (error: Error | null) => void): void {
    const rest = bytes.length - at
    const call: Transfer = operation === 'read' ? fs.read : fs.write
    call(this.#fd, bytes, at, Math.min(rest, maxTransfer), offset + at, (error, count) => {
      const moved = error === null ? this.#usable(count, rest) : 0
      if (error !== null || moved === rest) settle(error)
      else if (moved === 0) settle(new Error(operation === 'read' ? endOfFile : 'the system wrote nothing'))
      else this.#move(operation, offset, bytes, at + moved, settle)
    })
  }

  // eslint-disable-next-line @typescript-eslint/require-await -- async turns what it throws into a rejection
  async #transferSync(operation: 'read' | 'write', offset: number, bytes: Uint8Array): Promise<void> {
    this.#syncBytes += bytes.length + syncRequest
    this.#assertHeld()
    try {
      for (let at = 0; at < bytes.length; ) {
        const rest = bytes.length - at
        const moved =
          operation === 'read'
            ? fs.readSync(this.#fd, bytes, at, rest, offset + at)
            : fs.writeSync(this.#fd, bytes, at, rest, offset + at)
        const count = this.#usable(moved, rest)
        if (count === 0) throw new Error(operation === 'read' ? endOfFile : 'the system wrote nothing')
        at += count
      }
    } catch (error) {
      throw fileError(operation, error, { offset, length: bytes.length, name: this.path })
    }
  }

  /** Of a short direct transfer only whole sectors count: the rest must start at one again. */
  #usable(count: number, wanted: number): number {
    return count === wanted ? count : count - (count % this.limits.requestAlignment)
  }

  #roundUp(length: number, limit: number): number {
    const { requestAlignment } = this.limits
    return Math.min(Math.ceil(length / requestAlignment) * requestAlignment, limit)
  }

  /** An operation of several calls, counted as one: `close` must not come between them. */
  async #asOne(operation: () => Promise<void>): Promise<void> {
    this.#inFlight++
    try {
      await operation()
    } finally {
      this.#ended()
    }
  }

  #ended(): void {
    this.#inFlight--
    if (this.#inFlight === 0) this.#idle?.()
  }

  /** One system call as a promise, counted so that `close` can wait for it. */
  #call(
    operation: IoOperation,
    start: (settle: (error: Error | null) => void) => void,
    offset?: number,
    length?: number,
  ): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#assertHeld()
      this.#inFlight++
      start((error) => {
        this.#ended()
        if (error === null) resolve()
        else reject(fileError(operation, error, { offset, length, name: this.path }))
      })
    })
  }
}

/** The name of a host block device is in memory, its bytes are not. */
function defaultSyncLimit({ path, isBlockDevice }: OpenedFile): number {
  return path !== undefined && !isBlockDevice && isInMemory(path) ? syncLimitInMemory : 0
}

const endOfFile = 'the file ended early: was it truncated by another program?'

interface OpenedFile {
  readonly fd: number
  readonly path: string | undefined
  readonly handle: FileHandle | undefined
  readonly size: number
  readonly isBlockDevice: boolean
  readonly identity: string
  readonly alignment: DirectAlignment
}

async function openDescriptor(
  file: string | URL | FileHandle,
  options: FileOptions,
): Promise<{ descriptor: number; path: string | undefined; handle: FileHandle | undefined }> {
  if (typeof file !== 'string' && !(file instanceof URL)) {
    if (options.direct === true || options.create !== undefined) {
      throw new TypeError('direct and create are decided when a file is opened: give a path, not a FileHandle')
    }
    return { descriptor: file.fd, path: undefined, handle: file }
  }
  const path = file instanceof URL ? fileURLToPath(file) : file
  const flags = openFlags(options)
  const descriptor = await new Promise<number>((resolve, reject) => {
    fs.open(path, flags, 0o666, (error, fd) => {
      if (error === null) resolve(fd)
      else reject(openError(error, path, options.direct === true))
    })
  })
  return { descriptor, path, handle: undefined }
}

function openFlags(options: FileOptions): number {
  const { O_RDONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC } = fs.constants
  const direct = (fs.constants as { O_DIRECT?: number }).O_DIRECT
  if (options.readOnly === true && options.create !== undefined) {
    throw new TypeError('create and readOnly exclude each other: a new file is opened for writing')
  }
  if (options.direct === true && direct === undefined) {
    throw new UnsupportedError(`direct I/O: this platform has no O_DIRECT; open with direct: false`, ['O_DIRECT'])
  }
  let flags = options.readOnly === true ? O_RDONLY : O_RDWR
  if (options.create !== undefined) flags |= O_CREAT | (options.create === 'wx' ? O_EXCL : O_TRUNC)
  return options.direct === true ? flags | (direct ?? 0) : flags
}

function measure(fd: number, path: string | undefined): { size: number; isBlockDevice: boolean; identity: string } {
  const stat = fs.fstatSync(fd, { bigint: true })
  const identity = fileIdentity(stat)
  if (stat.isFile()) return { size: Number(stat.size), isBlockDevice: false, identity }
  const name = path ?? 'FileHandle'
  if (!stat.isBlockDevice()) throw new UnsupportedError(`${name}: neither a regular file nor a block device`)
  return { size: hostDeviceSize(Number(stat.rdev), name), isBlockDevice: true, identity }
}

/** Linux shows the size of a block device in /sys, in sectors of 512 bytes; `stat` says 0. */
function hostDeviceSize(rdev: number, name: string): number {
  const major = Math.floor(rdev / 256) % 4096
  const minor = (rdev % 256) + Math.floor(rdev / 0x10_0000) * 256
  try {
    return Number(fs.readFileSync(`/sys/dev/block/${major}:${minor}/size`, 'utf8')) * 512
  } catch (cause) {
    throw new Qcow2Error('ERR_UNSUPPORTED', `${name}: the size of a block device is only known on Linux`, { cause })
  }
}

function closeDescriptor(fd: number): Promise<void> {
  return new Promise((resolve, reject) => {
    fs.close(fd, (error) => {
      if (error) reject(fileError('close', error))
      else resolve()
    })
  })
}
