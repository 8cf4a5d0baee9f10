/**
 * The gate before a file that is to be written, emptied, replaced or formatted: by this library, or by a program it asks to. Owns who
 * may be in the way; everything that makes a result under a name passes here before the first byte changes.
 */
import { Qcow2Error } from '../core/errors.ts'
import { claim } from './file-claim.ts'
import { fileIdentity, statAt } from './file-identity.ts'
import { checkImageLocks, readImageLocks } from './file-lock.ts'
import { processFiles } from './file-registry.ts'

/**
 * Claims a file whose content is about to be lost, until the function returned is called.
 * @param file its path or descriptor; not one that a device of this process is noted for
 * @param name of it, for errors
 * @throws Qcow2Error `ERR_BUSY` if this process has it open, as an input perhaps; if another process of this library has it
 *   open for writing; or if a running QEMU uses it
 */
export async function claimTarget(file: string | number, identity: string, name: string): Promise<() => void> {
  assertNotOpenHere(identity, name)
  const letGo = await claimForWriting(file, identity, name)
  try {
    await assertNotHeld(file, name)
    return letGo
  } catch (error) {
    letGo()
    throw error
  }
}

/**
 * Claims a file that is to be written where it is, until the function returned is called. Other devices of this process may be
 * open on it, but no image that is written to.
 * @param file its path or descriptor
 * @param name of it, for errors
 * @throws Qcow2Error `ERR_BUSY` if an image of this process writes to it, another process of this library has it open for
 *   writing, or a running QEMU uses it and wants no writer beside it
 */
export async function claimForWriting(file: string | number, identity: string, name: string): Promise<() => void> {
  await checkImageLocks(file, 'write', name)
  return claim(identity, name)
}

/** A QEMU that only reads a file may share it with a writer; with one that replaces it, it cannot. */
async function assertNotHeld(file: string | number, name: string): Promise<void> {
  const { held, unshared } = await readImageLocks(file)
  if (held.size + unshared.size > 0) throw new Qcow2Error('ERR_BUSY', `${name}: a running QEMU has this file open: it cannot be overwritten; choose another name, or end it first`)
}

/** @throws Qcow2Error `ERR_BUSY` if a device of this process is open on the file. */
export function assertNotOpenHere(identity: string, name: string): void {
  if (!processFiles.open.has(identity)) return
  throw new Qcow2Error('ERR_BUSY', `${name}: this process has the file open, under this name or another: it cannot be overwritten; choose another name, or close it first`)
}

/**
 * Makes sure that another program may make a file at `path`, QEMU an overlay for example: nothing may be there but an empty
 * regular file that nobody uses.
 * @throws Qcow2Error `ERR_EXISTS` for a file with content, and for what is no regular file; `ERR_BUSY` for one in use
 */
export async function assertVacant(path: string): Promise<void> {
  const stat = await statAt(path)
  if (stat === undefined) return
  if (stat.isFile() && stat.size === 0n) {
    const letGo = await claimTarget(path, fileIdentity(stat), path)
    letGo()
    return
  }
  throw new Qcow2Error('ERR_EXISTS', `${path}: exists already${stat.isFile() ? ' and is not empty' : ''}: it would be overwritten; choose another name, or remove it first`)
}
