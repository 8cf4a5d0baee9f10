/** The files of a backing chain that is being opened. Owns that it neither loops nor is too long. */
import { resolve } from 'node:path'
import { fileKey } from '../../block/file-tree.ts'
import { Qcow2Error, UnsupportedError } from '../../core/errors.ts'
import { maxBackingChain } from '../../qcow2/limits.ts'
import type { ImageSpec } from './spec.ts'

/** A file of a chain that is being opened. */
export interface Link {
  readonly shown: string
  /** What it is known by, whatever path leads to it. */
  readonly key: string
  /** Path of the image, where it is a file. */
  readonly path: string | undefined
}

/** The chain with one more image. @throws Qcow2Error if it loops, or is too long */
export async function lengthened(above: readonly Link[], { place, shown }: ImageSpec): Promise<readonly Link[]> {
  const path = place.kind === 'file' ? place.path : undefined
  const link = { shown: path === undefined ? shown : resolve(path), key: path === undefined ? shown : await fileKey(path), path }
  const chain = [...above, link]
  if (above.some(({ key }) => key === link.key)) throw new Qcow2Error('ERR_FORMAT', `the backing chain loops: ${chain.map((each) => each.shown).join(' -> ')}`)
  if (chain.length > maxBackingChain) throw new UnsupportedError(`the backing chain has more than ${maxBackingChain} files`, ['backing chain'])
  // after images whose tree does not count the first one that has a tree is the root
  return above.length > 0 && above[0]!.path === undefined && path !== undefined ? [link, ...chain.slice(1)] : chain
}
