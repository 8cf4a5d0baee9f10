/** Which files a device stands on. Owns the walk down through filters, images and their backing files. */
import { Qcow2Error } from '../core/errors.ts'
import type { BlockDevice } from './device.ts'

/** A device that says what it is made of; those of this library do. */
type Layered = BlockDevice & { readonly below?: readonly BlockDevice[] }

/** The identities of all files below `device`, its own among them. */
export function filesBelow(device: BlockDevice): Set<string> {
  const files = new Set<string>()
  const seen = new Set<BlockDevice>()
  const rest: Layered[] = [device]
  for (let each = rest.pop(); each !== undefined; each = rest.pop()) {
    if (seen.has(each)) continue
    seen.add(each)
    if (each.identity !== undefined) files.add(each.identity)
    rest.push(...(each.below ?? []))
  }
  return files
}

/**
 * Refuses to copy a source over a file that it is read from, whatever names they were opened by.
 * @throws Qcow2Error `ERR_BUSY`
 */
export function assertApart(source: BlockDevice, target: BlockDevice): void {
  if (target.identity === undefined || !filesBelow(source).has(target.identity)) return
  throw new Qcow2Error('ERR_BUSY', `${target.path ?? 'the target'}: the source is read from this file: it cannot be overwritten by its own content; choose another target`)
}
