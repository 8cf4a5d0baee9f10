/**
 * Names of files that other files refer to. Owns what a path means on this system; opens nothing.
 */
import * as fs from 'node:fs'
import { basename, dirname, isAbsolute, join, relative, resolve } from 'node:path'

/**
 * The file a name refers to, when it is stored in the file at `from`: a relative name is appended to
 * the directory part of `from` as it stands, without resolving symbolic links.
 */
export function resolveReference(from: string, name: string): string {
  if (isAbsolute(name)) return name
  const cut = from.lastIndexOf('/')
  return cut < 0 ? name : from.slice(0, cut + 1) + name
}

/**
 * True if the file at `path`, symbolic links followed, lies in the directory of `from` or below it. With
 * `mayBeNew` the file need not exist, only its directory.
 */
export async function isInTreeOf(from: string, path: string, mayBeNew = false): Promise<boolean> {
  const [tree, file] = await Promise.all([realpath(dirname(resolve(from))), realpath(path).catch(async (error: unknown) => {
    if (!mayBeNew) throw error
    return join(await realpath(dirname(resolve(path))), basename(path))
  })])
  const way = relative(tree, file)
  return way !== '' && !way.startsWith('..') && !isAbsolute(way)
}

/** The one name of a file, symbolic links followed; the absolute path if it does not exist. */
export async function canonicalPath(path: string): Promise<string> {
  return realpath(path).catch(() => resolve(path))
}

/** A third of the time that the function of `node:fs/promises` takes. */
function realpath(path: string): Promise<string> {
  return new Promise((found, fail) => {
    fs.realpath.native(path, (error, real) => {
      if (error === null) found(real)
      else fail(error)
    })
  })
}
