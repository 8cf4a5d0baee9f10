/**
 * Claims: what tells two processes of this library from another that a file is being written. A claim is a socket in Linux's
 * abstract namespace whose name has the file's identity. The system lets one process have a name, and frees it when that
 * process ends, however it ends; nothing is left in any folder. Processes in different network namespaces (containers) do not
 * see each other's claims, other systems than Linux have none.
 */
import { readFile } from 'node:fs/promises'
import { Qcow2Error } from '../core/errors.ts'
import type { BlockDevice } from './device.ts'
import { processFiles } from './file-registry.ts'

/**
 * Claims a file for this process until the function returned is called. Any number of claims of one process share it.
 * @param key what is claimed: a file's identity, or a place in a folder
 * @param name of the file, for the error
 * @throws Qcow2Error `ERR_BUSY` if another process has claimed it
 */
export async function claim(key: string, name: string): Promise<() => void> {
  const { claims } = processFiles
  const held = claims.get(key) ?? { holders: 0, bound: bind(key, name) }
  claims.set(key, held)
  held.holders++
  let unbind: (() => void) | undefined
  const letGo = (): void => {
    held.holders--
    if (held.holders > 0) return
    if (claims.get(key) === held) claims.delete(key)
    unbind?.()
  }
  try {
    unbind = await held.bound
    return letGo
  } catch (error) {
    letGo()
    throw error
  }
}

/**
 * Marks the file that `device` stands on as one that an image writes to, until the function returned is called: for this
 * process and for others. A device on no file, or on a part of one, concerns nobody else.
 * @throws Qcow2Error `ERR_BUSY` if another image of this process, or another process of this library, writes to it
 */
export async function holdImageFile(device: BlockDevice): Promise<() => void> {
  const { identity, path = 'file' } = device
  if (identity === undefined) return () => undefined
  const { written } = processFiles
  if (written.has(identity)) throw writtenHere(path)
  written.add(identity)
  try {
    const letGo = await claim(identity, path)
    return () => {
      written.delete(identity)
      letGo()
    }
  } catch (error) {
    written.delete(identity)
    throw error
  }
}

/** The error for a second image on a file that one of this process writes to. */
export function writtenHere(name: string): Qcow2Error {
  return new Qcow2Error('ERR_BUSY', `${name}: an image of this process has this file open for writing; use that one, or close it first`)
}

/** The system has no such sockets, or Node is too old to name them. */
let unavailable = false
let tried = false

/**
 * How often a name that is taken is tried again, and milliseconds between. The number of a file that was removed is soon that of
 * a new one, while the process that had claimed the old one is about to let it go.
 */
const [retries, pause] = [5, 20]

/** The function that ends the claim; undefined where there can be none. */
async function bind(key: string, name: string): Promise<(() => void) | undefined> {
  if (process.platform !== 'linux' || unavailable) return undefined
  // loaded only by who writes: reading starts without it
  const { createServer } = await import('node:net')
  for (let attempt = 0; ; attempt++) {
    const server = createServer((socket) => socket.destroy())
    const code = await new Promise<string | undefined>((settle) => {
      server.once('error', (error: NodeJS.ErrnoException) => settle(error.code ?? 'unknown'))
      server.listen({ path: socketName(key), exclusive: true }, () => settle(undefined))
      server.unref()
    })
    if (code === undefined) {
      if (!tried) unavailable = !(await isListed(key))
      tried = true
      return () => void server.close()
    }
    if (code !== 'EADDRINUSE') return undefined
    if (attempt < retries) await new Promise((resolve) => setTimeout(resolve, pause))
    else if (await isListed(key)) throw writtenElsewhere(name)
    else return undefined
  }
}

/** Old versions of Node bind another name than the one given, the same for all. */
async function isListed(key: string): Promise<boolean> {
  const list = await readFile('/proc/net/unix', 'utf8').catch(() => '')
  return list.includes(`@${socketName(key).slice(1)}`)
}

/** Of full length: some versions of Node fill shorter names with zeroes, others do not, and they are to mean the same. */
function socketName(key: string): string {
  return `\0qcow2:${key}`.padEnd(108, '.')
}

function writtenElsewhere(name: string): Qcow2Error {
  return new Qcow2Error('ERR_BUSY', `${name}: another process of this library has this file open for writing; let it end first (locking: false opens it all the same)`)
}
