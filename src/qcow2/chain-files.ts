/**
 * The files a disk image stands on: its own, its data file, and those of the images below. Owns following the names that are
 * stored in images as far as they lead to files here; opens no disk and judges nothing.
 */
import { identityAt } from '../block/file-identity.ts'
import { resolveReference } from '../block/file-path.ts'
import { Qcow2Error } from '../core/errors.ts'
import { readImageInfo, type ImageInfo } from './info.ts'

/** Chains longer than this are followed no further. */
const maxDepth = 1000

/**
 * The files that reading the image at `path` would open, identity to path, the image itself first. A name that cannot be followed
 * ends the chain: a file that is missing, of another format, or on another machine.
 */
export async function filesOfChain(path: string): Promise<Map<string, string>> {
  const files = new Map<string, string>()
  const add = async (name: string): Promise<boolean> => {
    const identity = await identityAt(name)
    if (identity === undefined || files.has(identity)) return false
    files.set(identity, name)
    return true
  }
  for (let at: string | undefined = path, depth = 0; at !== undefined && depth < maxDepth && (await add(at)); depth++) {
    const info: ImageInfo | undefined = await readImageInfo(at, { forceShare: true }).catch(() => undefined)
    if (info?.dataFile !== undefined) await add(plainName(info.dataFile))
    const below: string | undefined = info?.backingFile
    at = below === undefined ? undefined : resolveReference(at, plainName(below))
  }
  return files
}

/**
 * Refuses to make a file at `path` if the image at `base`, on which something new is to stand, reads it: at whatever depth, and by
 * whatever name.
 * @throws Qcow2Error `ERR_BUSY`
 */
export async function assertNotBelow(path: string, base: string): Promise<void> {
  const identity = await identityAt(path)
  if (identity === undefined || !(await filesOfChain(base)).has(identity)) return
  throw new Qcow2Error('ERR_BUSY', `${path}: the backing chain loops: the new image would replace a file that it is to stand on (backing file ${base}); choose another name`)
}

/** The path of a backing file as an image at `path` names it. */
export function backingPath(path: string, name: string): string {
  return resolveReference(path, plainName(name))
}

/** Without QEMU's prefix of plain files. */
export function plainName(name: string): string {
  return name.startsWith('file:') && !name.startsWith('file://') ? name.slice(5) : name
}
