/**
 * Files and host block devices. Owns the requests to an open descriptor, the loop over short transfers, and
 * closing it when nothing uses it any more; knows nothing of what the bytes mean.
 *
 * Requests go through callback `fs.read` and `fs.write`: promises of a `FileHandle` cost a third more
 * CPU for each request.
 */
import * as fs from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import { Qcow2Error, UnsupportedError, type IoOperation } from '../core/errors.ts'
import { refuseUnknownOptions } from '../core/options.ts'
import { BaseDevice, type BlockLimits, type WriteZeroesOptions } from './device.ts'
import { fileError } from './file-error.ts'
import { closeDescriptor, fileOptions, measure, openDescriptor, type FileOptions, type OpenedFile } from './file-open.ts'
import { realPathOf } from './file-path.ts'
import { noteOpen } from './file-registry.ts'
import { isInMemory } from './file-system.ts'
import { allocateAligned } from './slab.ts'

export type { FileHandle, FileOptions }

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
 * Opens a file or a host block device: its bytes, whatever they mean. For writing it is the only one but for other devices of
 * this process: see `locking`.
 * @param file a path, a `file:` URL, or an open `FileHandle`, which the device takes over and closes
 * @throws Qcow2Error `ERR_NOT_FOUND`, `ERR_EXISTS` (with `create: 'wx'`), `ERR_BUSY` (for writing; see `locking`), `ERR_UNSUPPORTED` (direct I/O
 *   refused; neither a file nor a block device), `ERR_IO`
 */
export function openFile(file: string | URL | FileHandle, options: FileOptions = {}): Promise<FileDevice> {
  return FileDevice.open(file, options)
}

/** A file as a `BlockDevice`: grows when written past its end, and does not give space back. */
export class FileDevice extends BaseDevice {
  /** Device and inode: the same for every device on the same file, whatever path it was opened by. */
  readonly identity: string
  readonly readOnly: boolean
  readonly limits: BlockLimits
  #path: string | undefined
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
  /** Called when the file is closed. */
  readonly #endings: (() => void)[] = []
  /** What the next flush makes durable besides the file: that it has its name. */
  #besides: (() => Promise<void>) | undefined

  private constructor(opened: OpenedFile, options: FileOptions) {
    super()
    this.#path = opened.path
    this.identity = opened.identity
    this.#fd = opened.fd
    this.#endings.push(noteOpen(opened.identity), opened.letGo)
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
    return new FileDevice(await openDescriptor(file, options), options)
  }

  /** Path as it was opened; undefined for a `FileHandle`. */
  get path(): string | undefined {
    return this.#path
  }

  get size(): number {
    return this.#size
  }

  /**
   * Path of the open file itself, symbolic links followed, whatever its name leads to by now; undefined where the
   * system does not tell it.
   * @internal
   */
  get realPath(): string | undefined {
    return realPathOf(this.#fd)
  }

  override get growable(): boolean {
    return this.#growable
  }

  /** @internal The file has, or will have, another name than it was opened by: what errors and references go by. */
  named(path: string): void {
    this.#path = path
  }

  /**
   * @internal Gives the file an owner, where this process may, and permissions.
   */
  async access({ uid, gid, mode }: { readonly uid: number; readonly gid: number; readonly mode: number }): Promise<void> {
    const owned = await new Promise<boolean>((settle) => fs.fchown(this.#fd, uid, gid, (error) => settle(error === null)))
    // what only the owner of the old file was to have, this process's user does not hand to others
    await this.#call('open', (settle) => fs.fchmod(this.#fd, owned ? mode : mode & 0o777, settle))
  }

  /** @internal Calls `ending` when the file is closed. */
  onceClosed(ending: () => void): void {
    this.#endings.push(ending)
  }

  /** @internal The next flush also does `task`. */
  withNextFlush(task: () => Promise<void>): void {
    this.#besides = task
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
    const besides = this.#besides
    try {
      await Promise.all([this.#call('flush', (settle) => fs.fdatasync(this.#fd, settle)), besides?.()])
      if (this.#besides === besides) this.#besides = undefined
    } catch (error) {
      if (!this.#direct) this.#lostWrites = error as Error
      throw error
    }
  }

  /** Shrinking waits for nothing: the caller ends its requests beyond the new size first. */
  protected override async onResize(size: number): Promise<void> {
    if (!this.growable) {
      this.#measureAgain(size)
      return
    }
    if (size >= this.#submittedEnd) {
      this.#extend(size)
      return
    }
    this.#submittedEnd = size
    this.#size = size
    await this.#call('resize', (settle) => fs.ftruncate(this.#fd, size, settle))
  }

  /** A block device cannot be made larger from here, but may have been since it was opened. */
  #measureAgain(wanted: number): void {
    this.#assertHeld()
    this.#size = this.#submittedEnd = measure(this.#fd, this.path).size
    if (this.#size === wanted) return
    throw new UnsupportedError(`${this.path ?? 'FileHandle'}: a host block device has a fixed size, of ${this.#size} bytes`)
  }

  protected async onClose(): Promise<void> {
    // a descriptor closed under a running request may be reused by another file
    if (this.#inFlight > 0) await new Promise<void>((resolve) => (this.#idle = resolve))
    this.#released = true
    for (const ending of this.#endings) ending()
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
