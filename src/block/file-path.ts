/**
 * Names of files that other files refer to. Owns what a path means on this system; opens nothing to read or write. `win32` says whose rules
 * apply: by default those of the system.
 */
import * as fs from 'node:fs'
import { posix, win32 as windows } from 'node:path'
import { decodeName, encodeName, hasEscapedBytes } from '../bytes/file-name.ts'

const isWindows = process.platform === 'win32'

/** False for names with a protocol: a colon before the first separator. A drive letter is none. */
export function isPlainPath(name: string, win32: boolean = isWindows): boolean {
  if (win32 && hasDrive(name)) return true
  const colon = name.indexOf(':')
  const separator = name.search(win32 ? /[/\\]/ : /\//)
  return colon < 0 || (separator >= 0 && separator < colon)
}

/** True for a path that depends on no other. */
export function isAbsolutePath(name: string, win32: boolean = isWindows): boolean {
  return win32 ? hasDrive(name) || /^[/\\]/.test(name) : name.startsWith('/')
}

function hasDrive(name: string): boolean {
  return /^[A-Za-z]:/.test(name)
}

/** The directory part of a path as it stands, with the separator; empty for a name alone. */
export function folderPrefix(path: string, win32: boolean = isWindows): string {
  const cut = win32 ? Math.max(path.lastIndexOf('/'), path.lastIndexOf('\\'), hasDrive(path) ? 1 : -1) : path.lastIndexOf('/')
  return path.slice(0, cut + 1)
}

/**
 * The file a name refers to, when it is stored in the file at `from`: a relative name is appended to
 * the directory part of `from` as it stands, without resolving symbolic links.
 */
export function resolveReference(from: string, name: string, win32: boolean = isWindows): string {
  return isAbsolutePath(name, win32) ? name : folderPrefix(from, win32) + name
}

/** Why a file is not in a directory tree: it is elsewhere, hidden in it, or the tree would be all there is. */
export type OutsideTree = 'outside' | 'hidden' | 'root'

/** Judges two real paths; undefined: the file is in the tree, and no part of the way to it begins with a dot. */
export function outsideTree(tree: string, file: string, win32: boolean = isWindows): OutsideTree | undefined {
  const path = win32 ? windows : posix
  const way = path.relative(tree, file)
  const steps = way.split(path.sep)
  if (way === '' || steps[0] === '..' || path.isAbsolute(way)) return 'outside'
  if (path.relative(path.parse(tree).root, tree) === '') return 'root'
  return steps.some((step) => step.startsWith('.')) ? 'hidden' : undefined
}

/** A path as the system takes it: names that are no UTF-8 as bytes. */
export function systemPath(path: string): string | Buffer {
  return hasEscapedBytes(path) ? Buffer.from(encodeName(path)) : path
}

/** The path with all symbolic links followed. A third of the time that the function of `node:fs/promises` takes. */
export function realPath(path: string): Promise<string> {
  return new Promise((found, fail) => {
    fs.realpath.native(systemPath(path), { encoding: 'buffer' }, (error, real) => {
      if (error === null) found(decodeName(real))
      else fail(error)
    })
  })
}

/** The real path of an open file, as Linux shows it; undefined elsewhere. */
export function realPathOf(fd: number): string | undefined {
  try {
    return decodeName(fs.readlinkSync(`/proc/self/fd/${fd}`, { encoding: 'buffer' }))
  } catch {
    return undefined
  }
}
