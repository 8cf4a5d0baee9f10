/** Files of a saved VM as wholes: small ones are written and read, any is replaced or removed. */
import { open, readFile, realpath, rename, stat, unlink } from 'node:fs/promises'
import { dirname, isAbsolute, resolve } from 'node:path'

/** Writes a text file whole or not at all: a crash leaves the old one. */
export async function writeTextFile(path: string, text: string): Promise<void> {
  const fresh = `${path}.new`
  const file = await open(fresh, 'w')
  try {
    await file.writeFile(text)
    await file.datasync()
  } finally {
    await file.close()
  }
  await replaceFile(fresh, path)
}

/** Gives the file `fresh`, whose content is durable, the name `path`: a crash leaves the old file or the new one. */
export async function replaceFile(fresh: string, path: string): Promise<void> {
  await rename(fresh, path)
  const folder = await open(dirname(path))
  try {
    await folder.sync()
  } finally {
    await folder.close()
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

/** `name` as seen from the folder of `file`. */
export function pathBeside(file: string, name: string): string {
  return resolve(dirname(file), name)
}

/** What is at `path`: a regular file, something else such as a device, or nothing. */
export async function fileAt(path: string): Promise<'regular' | 'special' | undefined> {
  try {
    return (await stat(path)).isFile() ? 'regular' : 'special'
  } catch (error) {
    if (isMissing(error)) return undefined
    throw error
  }
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
