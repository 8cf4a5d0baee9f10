/**
 * Where files are, links followed. Opening one that must lie in a directory tree: the name is judged, then what was opened by
 * it, because between the two a symbolic link may have changed.
 */
import { lstat } from 'node:fs/promises'
import { basename, dirname, join, resolve } from 'node:path'
import { Qcow2Error } from '../core/errors.ts'
import type { BlockDevice } from './device.ts'
import { fileIdentity, identityAt } from './file-identity.ts'
import { outsideTree, realPath, systemPath, type OutsideTree } from './file-path.ts'

/**
 * Opens the file at `path`, if it lies in the directory of the file `from` or below it, symbolic links followed, and no part
 * of the way begins with a dot.
 * @returns The device, or why the file was refused; then nothing is left open.
 * @throws the system's error if the directory or the file cannot be found; what `open` throws
 */
export async function openInTree(from: string, path: string, open: () => Promise<BlockDevice>): Promise<BlockDevice | OutsideTree> {
  const [tree, named] = await Promise.all([realPath(dirname(resolve(from))), realPath(path)])
  const refused = outsideTree(tree, named)
  if (refused !== undefined) return refused
  const device = await open()
  try {
    const outside = outsideTree(tree, await realPathOfDevice(device, path))
    if (outside === undefined) return device
    await device.close()
    return outside
  } catch (error) {
    await device.close()
    throw error
  }
}

/** Where the open file is: as the system says; else where the name leads now, if that is the same file still. */
async function realPathOfDevice(device: BlockDevice, path: string): Promise<string> {
  const told = toldBySystem(device)
  if (told !== undefined) return told
  const real = await realPath(path)
  const { identity } = device
  if (identity !== undefined && fileIdentity(await lstat(systemPath(real), { bigint: true })) === identity) return real
  throw new Qcow2Error('ERR_IO', `${path}: the name became another file's while it was opened`)
}

/** By what they have: devices of the ESM and of the CommonJS build have different classes. */
function toldBySystem({ realPath: told, inner }: BlockDevice & { readonly realPath?: string | undefined; readonly inner?: BlockDevice }): string | undefined {
  return told ?? (inner === undefined ? undefined : toldBySystem(inner))
}

/** A name for the file at `path`, whatever path leads to it: device and inode, or the real path where it would be made. */
export async function fileKey(path: string): Promise<string> {
  return (await identityAt(path)) ?? realPath(dirname(resolve(path))).then((folder) => join(folder, basename(path)), () => resolve(path))
}

/** A path made absolute as it is written: nothing is looked up, links stay. */
export function lexicalPath(path: string): string {
  return resolve(path)
}
