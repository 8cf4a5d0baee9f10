/**
 * Other files an image names: its backing file and its external data file. Owns the policy under which
 * they are opened, because a name in an image is data from whoever made the image. By default a
 * reference is followed only within the directory tree of the image; protocol prefixes and `json:` are
 * refused, and a format is never guessed.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { openFile } from '../block/file.ts'
import { identityAt } from '../block/file-identity.ts'
import { isInTreeOf, resolveReference } from '../block/file-path.ts'
import { openTarget, type Target } from '../block/source.ts'
import { FormatError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { hasMagic } from './header.ts'

/** A file that an image names. */
export interface Reference {
  readonly kind: 'backing file' | 'data file'
  /** The name as stored. */
  readonly name: string
  /** Format as stored, `qcow2` or `raw`; undefined if the image names none. */
  readonly format: string | undefined
  /** Path of the image that holds the reference; undefined if it was not opened by a path. */
  readonly from: string | undefined
  /** The path the name stands for, by QEMU's rule; undefined for protocols and `json:`. */
  readonly path: string | undefined
}

/**
 * Decides about a reference: `true` opens the path, `false` refuses it; a device is used as it is, and
 * then belongs to the image.
 */
export type ReferencePolicy = (reference: Reference) => boolean | BlockDevice | Promise<boolean | BlockDevice>

/** How references are followed. */
export interface ReferenceOptions {
  /**
   * `tree` (default): files in the directory tree of the image that was opened first. `any`: any path.
   * `none`: an image that names a file is refused. Or a decision of your own.
   */
  readonly references?: 'tree' | 'any' | 'none' | ReferencePolicy | undefined
  /** The backing file itself, instead of the one the image names; it then belongs to the image. */
  readonly backing?: BlockDevice | undefined
  /** The external data file itself, instead of the one the image names; it then belongs to the image. */
  readonly dataFile?: BlockDevice | undefined
  /** Bytes of memory for cached metadata tables, of each image of a backing chain. Default 32 MiB. */
  readonly cacheSize?: number | undefined
  /** Guess the format of a backing file that has none recorded, by its first bytes. Default false: refused. */
  readonly probeBackingFormat?: boolean | undefined
}

/** A file of a backing chain. */
interface ChainLink {
  readonly path: string
  /** Undefined for a file that is yet to be made. */
  readonly identity: string | undefined
}

/** What following a reference needs to know of the image that holds it. */
export interface ReferenceContext {
  readonly options: ReferenceOptions
  /** Path of the image, if it was opened by one. */
  readonly path: string | undefined
  /** Path of the image that was opened first. */
  readonly root: string | undefined
  /** The files of the images above, and of this one; undefined for the one that was opened first: found when it is needed. */
  readonly chain?: readonly ChainLink[]
  /** The backing file, where it is open already because a new overlay takes its size from it. */
  readonly sizedBy?: BlockDevice | undefined
  /** Opens a qcow2 image of the backing chain, read-only. */
  openImage(device: BlockDevice, path: string, context: ReferenceContext): Promise<BlockDevice>
}

/** The context of an image that nobody refers to. */
export function rootContext(path: string | undefined, options: ReferenceOptions, openImage: ReferenceContext['openImage']): ReferenceContext {
  return { options, path, root: path, openImage }
}

/**
 * Opens the backing file an image names, read-only.
 * @throws Qcow2Error `ERR_UNSUPPORTED` if the policy refuses it or the format is not named; FormatError
 * if the chain loops.
 */
export async function openBacking(name: string, format: string | undefined, context: ReferenceContext): Promise<BlockDevice> {
  const reference = describe('backing file', name, format, context)
  const decision = await decide(reference, context)
  if (typeof decision !== 'boolean') return decision
  const path = decision ? reference.path : undefined
  if (path === undefined) throw refused(reference)
  const [device, above] = await Promise.all([openFile(path, { readOnly: true }), chainOf(context)])
  const { identity } = device
  const chain = [...above, { path, identity }]
  if (above.some((link) => link.identity === identity)) {
    await device.close()
    throw new FormatError(`the backing chain loops: ${chain.map((link) => link.path).join(' -> ')}`, { structure: 'header', field: 'backing_file_name' })
  }
  try {
    const known = format ?? (await probe(device, reference, context))
    if (known === 'raw') return device
    if (known !== 'qcow2') throw new UnsupportedError(`backing file ${name}: format ${known} is not supported, qcow2 and raw are`, [known])
    return await context.openImage(device, path, { ...context, path, chain })
  } catch (error) {
    await device.close()
    // which file of the chain it is, the format's errors do not know
    if (error instanceof FormatError) error.message = `backing file ${name}: ${error.message}`
    throw error
  }
}

async function chainOf({ chain, path }: ReferenceContext): Promise<readonly ChainLink[]> {
  if (chain !== undefined) return chain
  return path === undefined ? [] : [{ path, identity: await identityAt(path) }]
}

/** Opens the external data file an image names. A relative name is relative to the working directory, as in QEMU. */
export async function openDataFile(name: string, { readOnly }: { readonly readOnly: boolean }, context: ReferenceContext): Promise<BlockDevice> {
  const found = await dataFileOf(name, context)
  return typeof found === 'string' ? openFile(found, { readOnly }) : found
}

/** Begins the data file of a new image, after the policy allowed it. A device that the policy gives is discarded by closing it. */
export async function createDataFile(name: string, context: ReferenceContext, options: CallOptions): Promise<Target> {
  const found = await dataFileOf(name, context)
  if (typeof found === 'string') return openTarget(found, options)
  const close = (): Promise<void> => found.close()
  return { device: found, shows: 'at once', keep: () => Promise.resolve(), discard: close }
}

/** The path or the device that a data file's name stands for. */
async function dataFileOf(name: string, context: ReferenceContext): Promise<string | BlockDevice> {
  const reference = { kind: 'data file', name, format: 'raw', from: context.path, path: isPath(name) ? name : undefined } as const
  const decision = await decide(reference, context)
  if (typeof decision !== 'boolean') return decision
  if (!decision || reference.path === undefined) throw refused(reference)
  return reference.path
}

function describe(kind: Reference['kind'], name: string, format: string | undefined, context: ReferenceContext): Reference {
  const absolute = name.startsWith('/')
  const plain = isPath(name) && (absolute || context.path !== undefined)
  const path = context.path === undefined ? name : resolveReference(context.path, name)
  return { kind, name, format, from: context.path, path: plain ? path : undefined }
}

/** False for `json:` and for names with a protocol: a colon before the first slash. */
function isPath(name: string): boolean {
  const colon = name.indexOf(':')
  const slash = name.indexOf('/')
  return colon < 0 || (slash >= 0 && slash < colon)
}

async function decide(reference: Reference, context: ReferenceContext): Promise<boolean | BlockDevice> {
  const policy = context.options.references ?? 'tree'
  if (typeof policy === 'function') return policy(reference)
  if (policy === 'none' || reference.path === undefined) return false
  if (policy === 'any' || context.root === undefined) return policy === 'any'
  try {
    return await isInTreeOf(context.root, reference.path, reference.kind === 'data file')
  } catch (cause) {
    throw new Qcow2Error('ERR_NOT_FOUND', `${reference.kind} ${reference.path} cannot be found (named in ${reference.from ?? 'the image'})`, { cause })
  }
}

function refused(reference: Reference): UnsupportedError {
  const { kind, name, from } = reference
  return new UnsupportedError(
    `${kind} ${JSON.stringify(name)}${from === undefined ? '' : ` of ${from}`} is outside what the policy allows; set \`references\`, or give the device itself`,
    [kind],
  )
}

async function probe(device: BlockDevice, reference: Reference, context: ReferenceContext): Promise<string> {
  if (context.options.probeBackingFormat !== true) {
    throw new UnsupportedError(
      `backing file ${JSON.stringify(reference.name)}: its format is not recorded, and guessing lets whoever writes a raw disk choose files to open; record it (backing.format), or set probeBackingFormat to guess`,
      ['backing format'],
    )
  }
  return hasMagic(await device.read(0, Math.min(4, device.size))) ? 'qcow2' : 'raw'
}
