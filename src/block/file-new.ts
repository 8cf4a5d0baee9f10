/**
 * A file made anew. It is written beside its place, under a name nobody else has, and gets its own name once it is whole: what
 * had the name before stays until then, and stays for good if the writing fails or the process dies. A symbolic link stays a
 * link: what it leads to is replaced.
 *
 * Written in place, after the same checks, are block devices, and files that cannot be replaced: in folders that take no new
 * files, mounted at their name, or without a name.
 *
 * What a crash leaves: before the rename, the old file and perhaps one with `.partial` in its name; after it, the new one.
 */
import * as fs from 'node:fs'
import { link, lstat, open, readlink, rename, unlink } from 'node:fs/promises'
import { basename, dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Qcow2Error } from '../core/errors.ts'
import type { CallOptions } from './device.ts'
import { claim } from './file-claim.ts'
import { openError, systemCode } from './file-error.ts'
import { claimTarget } from './file-gate.ts'
import { realPath, systemPath } from './file-path.ts'
import { fileIdentity, statAt } from './file-identity.ts'
import { isMountPoint } from './file-mount.ts'
import { processFiles } from './file-registry.ts'
import { FileDevice } from './file.ts'

/** Options of {@link newFile}. */
export interface NewFileOptions extends CallOptions {
  /** Fail with `ERR_EXISTS` if something has the name, now or when the file is whole. */
  readonly exclusive?: boolean | undefined
  /** See `openFile`. */
  readonly direct?: boolean | undefined
  /** See `openFile`. */
  readonly syncLimit?: number | undefined
  /** Permissions. Default: those of the file that is replaced, or 0o666 less the umask. */
  readonly mode?: number | undefined
  /** False: replace a file whoever uses it. */
  readonly locking?: boolean | undefined
}

/** A file that is being made. */
export interface NewFile {
  /** Empty, but for a block device. It stays open, and the caller's to close, whatever becomes of the file. */
  readonly device: FileDevice
  /** When others see what is written: at once where it is written in place. */
  readonly shows: 'at once' | 'when kept'
  /** The path of the file itself: links are followed. */
  readonly path: string
  /**
   * Makes what was written durable and gives the file its name. A wrapper that still holds bytes is
   * flushed before, and so is a device that its owner closed meanwhile.
   * @param options.folder when the name becomes durable: at once, or with the next flush of the device
   * @throws Qcow2Error `ERR_BUSY` or `ERR_EXISTS` if somebody took the name into use meanwhile; nothing is replaced then
   */
  keep(options?: { readonly folder?: 'now' | 'with next flush' }): Promise<void>
  /** Closes the device and removes the file, unless it was kept. What was written in place is emptied. */
  discard(): Promise<void>
}

/**
 * Begins a new file at `target`.
 * @throws Qcow2Error `ERR_BUSY` if the file that has the name is in use (see `openFile`), or another new file of this name
 *   is being written; what `openFile` throws
 */
export async function newFile(target: string | URL, options: NewFileOptions = {}): Promise<NewFile> {
  const { exclusive, locking, signal } = options
  signal?.throwIfAborted()
  const given = target instanceof URL ? fileURLToPath(target) : target
  if (exclusive === true && (await isThere(given))) throw new Qcow2Error('ERR_EXISTS', `${given}: exists already`)
  const place = await placeOf(given)
  const letGo = await claimPlace(place, locking)
  try {
    return (await writeBeside(place, options, letGo)) ?? (await writeInPlace(place, options, letGo))
  } catch (error) {
    letGo()
    throw error
  }
}

/** Where a file is to be. */
interface Place {
  /** As the caller named it. */
  readonly given: string
  /** Links followed. */
  readonly path: string
  /** What is there. */
  readonly stat: fs.BigIntStats | undefined
  /** What is there can only be written as it is. */
  readonly fixed: boolean
}

const maxLinks = 40

async function placeOf(given: string): Promise<Place> {
  const stat = await statAt(given).catch((error: unknown) => {
    throw openError(error as Error, given, false)
  })
  if (stat === undefined) return { given, path: await followLinks(given), stat, fixed: false }
  const path = await realPath(given).catch(() => given)
  // a file that was removed but is open has a path in /proc only
  const found = await statAt(path)
  const isNamed = found !== undefined && fileIdentity(found) === fileIdentity(stat)
  const fixed = !stat.isFile() || !isNamed || (await isMountPoint(path))
  return { given, path: isNamed ? path : given, stat, fixed }
}

/** Where a file would be made: what links without a target lead to. */
async function followLinks(given: string): Promise<string> {
  let path = resolve(given)
  for (let count = 0; count < maxLinks; count++) {
    const next = await readlink(systemPath(path)).catch(() => undefined)
    if (next === undefined) return path
    path = resolve(await realPath(dirname(path)).catch(() => dirname(path)), next)
  }
  throw new Qcow2Error('ERR_NOT_FOUND', `${given}: symbolic links lead in a circle`)
}

/** The file that has the name and the name itself are this caller's until the function returned is called. */
async function claimPlace({ given, path, stat }: Place, locking = true): Promise<() => void> {
  const claims: (() => void)[] = []
  const letGo = (): void => {
    for (const each of claims.splice(0)) each()
  }
  if (!locking) return letGo
  try {
    if (stat !== undefined) claims.push(await claimTarget(path, fileIdentity(stat), given))
    const folder = await statAt(dirname(path)).catch(() => undefined)
    if (folder === undefined) return letGo
    const key = `${fileIdentity(folder)}/${hashOf(basename(path))}`
    const { places } = processFiles
    if (places.has(key)) throw new Qcow2Error('ERR_BUSY', `${given}: a new file of this name is being written already`)
    places.add(key)
    claims.push(() => places.delete(key))
    claims.push(await claim(key, given))
    return letGo
  } catch (error) {
    letGo()
    throw error
  }
}

/** Undefined if the folder takes no new file: then what is there has to be written in place. */
async function writeBeside(place: Place, options: NewFileOptions, letGo: () => void): Promise<NewFile | undefined> {
  if (place.fixed) return undefined
  const { direct, syncLimit, signal, mode, locking } = options
  const { stat } = place
  for (;;) {
    const partial = join(dirname(place.path), partialName(basename(place.path)))
    try {
      // until it has the owner of the file that it replaces, it is nobody else's to read
      const device = await FileDevice.open(partial, { direct, syncLimit, signal, locking, create: 'wx', mode: stat === undefined ? mode : 0o600 })
      device.named(place.given)
      try {
        if (stat !== undefined) await device.access({ uid: Number(stat.uid), gid: Number(stat.gid), mode: mode ?? Number(stat.mode & 0o7777n) })
      } catch (error) {
        await device.close()
        throw error
      }
      return new Beside(device, place, partial, options, letGo)
    } catch (error) {
      if (Qcow2Error.is(error, 'ERR_EXISTS')) continue
      await unlink(systemPath(partial)).catch(() => undefined)
      const code = systemCode(error instanceof Error ? error.cause : undefined)
      if (stat !== undefined && ['EACCES', 'EPERM', 'EROFS'].includes(code ?? '')) return undefined
      throw aboutPlace(error, partial, place.given)
    }
  }
}

async function writeInPlace({ path, given }: Place, { direct, syncLimit, signal, mode }: NewFileOptions, letGo: () => void): Promise<NewFile> {
  // the claims of the place are held: those of a file opened for itself would be in their way
  const device = await FileDevice.open(path, { direct, syncLimit, signal, mode, create: 'w', locking: false })
  device.named(given)
  device.onceClosed(letGo)
  let kept = false
  return {
    device,
    shows: 'at once',
    path,
    keep: async () => {
      if (!device.closed) await device.flush()
      kept = true
    },
    discard: async () => {
      if (!kept && device.growable) await device.resize(0).catch(() => undefined)
      await device.close()
    },
  }
}

class Beside implements NewFile {
  readonly device: FileDevice
  readonly shows = 'when kept'
  readonly path: string
  readonly #place: Place
  readonly #partial: string
  readonly #options: NewFileOptions
  readonly #letGo: () => void
  #settled = false

  constructor(device: FileDevice, place: Place, partial: string, options: NewFileOptions, letGo: () => void) {
    this.device = device
    this.path = place.path
    this.#place = place
    this.#partial = partial
    this.#options = options
    this.#letGo = letGo
  }

  async keep({ folder = 'now' }: { readonly folder?: 'now' | 'with next flush' } = {}): Promise<void> {
    const { path } = this
    if (!this.device.closed) await this.device.flush()
    await this.#takeName()
    this.#settled = true
    this.#letGo()
    if (folder === 'now') await syncFolder(dirname(path))
    else this.device.withNextFlush(() => syncFolder(dirname(path)))
  }

  async discard(): Promise<void> {
    const remove = !this.#settled
    this.#settled = true
    try {
      await this.device.close()
    } finally {
      if (remove) await unlink(systemPath(this.#partial)).catch(() => undefined)
      this.#letGo()
    }
  }

  async #takeName(): Promise<void> {
    const { given, path, stat } = this.#place
    const now = await statAt(path)
    if (now !== undefined && (stat === undefined || fileIdentity(now) !== fileIdentity(stat))) {
      if (this.#options.exclusive === true || stat !== undefined) throw madeMeanwhile(given)
    }
    // the claims kept our own programs away; a QEMU may have opened the file
    if (stat !== undefined && now !== undefined && this.#options.locking !== false) (await claimTarget(path, fileIdentity(now), given))()
    try {
      if (now === undefined && (await linkNew(this.#partial, path))) return
      if (now !== undefined && stat === undefined) throw madeMeanwhile(given)
      await rename(systemPath(this.#partial), systemPath(path))
    } catch (error) {
      throw Qcow2Error.is(error) ? error : openError(error as Error, given, false)
    }
  }
}

/** Gives a file its name only if nothing has it; false where the file system has no hard links. */
async function linkNew(partial: string, path: string): Promise<boolean> {
  try {
    await link(systemPath(partial), systemPath(path))
  } catch (error) {
    if (systemCode(error) === 'EEXIST') throw error
    return false
  }
  await unlink(systemPath(partial))
  return true
}

/** Makes the names in a folder durable, where the file system can. */
async function syncFolder(path: string): Promise<void> {
  const folder = await open(systemPath(path)).catch(() => undefined)
  if (folder === undefined) return
  try {
    await folder.sync().catch((error: unknown) => {
      if (systemCode(error) === 'EIO') throw error
    })
  } finally {
    await folder.close()
  }
}

/** Unlike any other; short enough where the name itself is as long as names may be. */
function partialName(name: string): string {
  const random = Math.floor(Math.random() * 2 ** 48).toString(36).padStart(10, '0')
  return `${Array.from(name).slice(0, 50).join('')}.${random}.partial`
}

/** 53 bits of a name, for a claim: names are longer than those of sockets may be. */
function hashOf(name: string): string {
  let [a, b] = [0xdead_beef, 0x41c6_ce57]
  for (const byte of Buffer.from(name)) {
    a = Math.imul(a ^ byte, 0x9e37_79b1)
    b = Math.imul(b ^ byte, 0x5f35_6495)
  }
  return `${(a >>> 0).toString(16)}${(b >>> 0).toString(16)}`
}

async function isThere(path: string): Promise<boolean> {
  return (await lstat(systemPath(path)).catch(() => undefined)) !== undefined
}

function madeMeanwhile(name: string): Qcow2Error {
  return new Qcow2Error('ERR_EXISTS', `${name}: another program made a file of this name meanwhile; it was left alone`)
}

/** The failure of a file nobody has heard of, about the one that was asked for. */
function aboutPlace(error: unknown, partial: string, given: string): unknown {
  if (error instanceof Error && error.message.includes(partial)) error.message = error.message.replaceAll(partial, given)
  return error
}
