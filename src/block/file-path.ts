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
  if (isBeside(from, path) && !(await isLink(path, mayBeNew))) return true
  const [tree, file] = await Promise.all([realpath(dirname(resolve(from))), realpath(path).catch(async (error: unknown) => {
    // what a link without a target leads to would be made there
    if (!mayBeNew || (await isLink(path, true))) throw error
    return join(await realpath(dirname(resolve(path))), basename(path))
  })])
  const way = relative(tree, file)
  return way !== '' && !way.startsWith('..') && !isAbsolute(way)
}

/** Both are named in the same directory, whatever links lead there. */
function isBeside(from: string, path: string): boolean {
  const cut = path.lastIndexOf('/') + 1
  const name = path.slice(cut)
  return path.slice(0, cut) === from.slice(0, from.lastIndexOf('/') + 1) && name !== '' && name !== '.' && name !== '..'
}

function isLink(path: string, mayBeNew: boolean): Promise<boolean> {
  return new Promise((tell, fail) => {
    fs.lstat(path, (error, stat) => {
      if (error === null) tell(stat.isSymbolicLink())
      else if (mayBeNew && error.code === 'ENOENT') tell(false)
      else fail(error)
    })
  })
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
