/** Files of a saved VM as wholes: small ones are written and read, any is removed. */
import { lstat, readFile, realpath, stat, unlink } from 'node:fs/promises'
import { basename, dirname, extname, isAbsolute, join, relative, resolve } from 'node:path'
import { newFile } from '../block/file-new.ts'

/** Permissions of all files of a saved VM: they hold, or lead to, all secrets of the guest. */
export const secretMode = 0o600

/** Writes a text file whole or not at all: a crash leaves the old one. Only its owner may read it. */
export async function writeTextFile(path: string, text: string): Promise<void> {
  const file = await newFile(path, { mode: secretMode })
  try {
    await file.device.write(0, new TextEncoder().encode(text))
    await file.keep()
  } finally {
    await file.discard()
  }
}

/** The path of the file itself, links followed; of one that is not there, the path as given. */
export async function ownPath(path: string): Promise<string> {
  try {
    return await realpath(path)
  } catch (error) {
    if (isMissing(error)) return resolve(path)
    throw error
  }
}

/**
 * The name that files beside a saved memory get theirs from; undefined where there is nothing beside, as at a device. Names like
 * `/dev/stdout` or `/proc/self/fd/1` stand for another file, and it counts.
 */
export async function placeOf(path: string): Promise<string | undefined> {
  const own = await ownPath(path)
  const found = await stat(own).catch(() => undefined)
  if (found !== undefined && !found.isFile()) return undefined
  return /^\/(dev|proc)\//.test(resolve(path)) ? own : path
}

/** `name` as seen from the folder of `file`. */
export function pathBeside(file: string, name: string): string {
  return resolve(dirname(file), name)
}

/** The folder of a file. */
export function folderOf(path: string): string {
  return dirname(resolve(path))
}

/** A path as somebody gave it, from the working directory of this process on. */
export function absoluteFile(path: string): string {
  return resolve(path)
}

/**
 * The first free name beside `file` for its successor, counted on: `disk.img` is followed by `disk-1.qcow2`, that by
 * `disk-2.qcow2`.
 */
export async function freeNameBeside(file: string, extension: string, taken: ReadonlySet<string>): Promise<string> {
  const stem = basename(file, extname(file))
  const counted = /^(.*)-(\d{1,9})$/.exec(stem)
  for (let n = Number(counted?.[2] ?? 0) + 1; ; n++) {
    const path = join(dirname(file), `${counted?.[1] ?? stem}-${n}${extension}`)
    if (!taken.has(path) && !(await isTaken(path))) return path
  }
}

/** Something has this name, be it a link to nowhere. */
async function isTaken(path: string): Promise<boolean> {
  try {
    await lstat(path)
    return true
  } catch (error) {
    if (isMissing(error)) return false
    throw error
  }
}

/**
 * Paths at which a file may be that was at `file` when the memory beside it was at `savedMemory` and is now at `memory`: where
 * it was, as it lay to the memory, and right beside it.
 */
export function namesOfMoved(file: string, savedMemory: string | undefined, memory: string | undefined): string[] {
  if (memory === undefined || file.includes('://')) return [file]
  const folder = dirname(resolve(memory))
  const along = savedMemory === undefined || !isAbsolute(savedMemory) ? [] : [resolve(folder, relative(dirname(savedMemory), file))]
  return [file, ...along, resolve(folder, basename(file))]
}

/** When the content of a file changed last, ISO 8601; undefined for what is not there or not a regular file. */
export async function modificationTime(path: string): Promise<string | undefined> {
  const found = isAbsolute(path) ? await stat(path).catch(() => undefined) : undefined
  return found?.isFile() === true ? found.mtime.toISOString() : undefined
}

/** The text of a file; undefined if there is none. */
export async function readTextFile(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8')
  } catch (error) {
    if (isMissing(error)) return undefined
    throw error
  }
}

/** Removes a file; one that is not there is fine. */
export async function removeFile(path: string): Promise<void> {
  await unlink(path).catch((error: unknown) => {
    if (!isMissing(error)) throw error
  })
}

function isMissing(error: unknown): boolean {
  return (error as NodeJS.ErrnoException).code === 'ENOENT'
}
