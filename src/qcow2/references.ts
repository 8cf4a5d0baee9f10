/**
 * Other files an image names: its backing file and its external data file. Owns the rule under which they are opened, because
 * a name in an image is data from whoever made the image; the program asks the same rule. What a caller names
 * himself, for an image he makes or opens, is no question of it.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { holdImageFile } from '../block/file-claim.ts'
import { isAbsolutePath, isPlainPath, resolveReference, type OutsideTree } from '../block/file-path.ts'
import { fileKey, openInTree } from '../block/file-tree.ts'
import { isBlockDevice, openSource, openTarget, type Source, type Target } from '../block/source.ts'
import { FormatError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { maxBackingChain } from './limits.ts'
import { probeFormat } from './probe.ts'

/** A file that an image names. */
export interface Reference {
  readonly kind: 'backing file' | 'data file'
  /** The name as stored; bytes that are no UTF-8 are lone surrogates, U+DC80 to U+DCFF. */
  readonly name: string
  /** Format as stored, `qcow2` or `raw`; undefined if the image names none. */
  readonly format: string | undefined
  /** Path of the image that holds the reference; undefined if it was not opened by a path. */
  readonly from: string | undefined
  /** The path the name stands for, by QEMU's rule; undefined for protocols and `json:`, which a data file's name never is. */
  readonly path: string | undefined
  /** What the image is to do with the file; backing files are never written to. */
  readonly access: 'read' | 'write'
}

/**
 * Decides about a reference: `true` opens the path, `false` refuses it; a device is used as it is, and
 * then belongs to the image.
 */
export type ReferencePolicy = (reference: Reference) => boolean | BlockDevice | Promise<boolean | BlockDevice>

/**
 * How far names in an image are followed. `none`: not at all. `tree`: to files in the directory of the image that was opened
 * first, or below it, symbolic links followed; none whose way there has a part that begins with a dot; never
 * where that directory is the root of the file system; read-only. `any`: to any path, and data files are written to.
 */
export type ReferenceRule = 'none' | 'tree' | 'any'

/** All of them. */
export const referenceRules: readonly ReferenceRule[] = ['none', 'tree', 'any']

/** How references are followed. */
export interface ReferenceOptions {
  /**
   * Default `tree`. A path is opened in any case, never a protocol; pipes, sockets and directories are refused at once. An image
   * with a data file is opened for writing only with `any`, a decision of your own, or the `dataFile` given.
   */
  readonly references?: ReferenceRule | ReferencePolicy | undefined
  /** The backing file itself, instead of the one the image names; it then belongs to the image. */
  readonly backing?: BlockDevice | undefined
  /** The external data file, by its path or itself, instead of the one the image names; a device then belongs to the image. */
  readonly dataFile?: Source | undefined
  /** @internal False: write to the data file whoever else uses it. */
  readonly locking?: boolean | undefined
  /** Bytes of memory for cached metadata tables, of each image of a backing chain. Default 32 MiB. */
  readonly cacheSize?: number | undefined
  /** Guess the format of a backing file that has none recorded, by its first bytes. Default false: refused. */
  readonly probeBackingFormat?: boolean | undefined
}

/** A file that is open as a part of an image. */
interface ChainLink {
  readonly path: string
  /** As `fileKey` has it; undefined for what is no file. */
  readonly identity: string | undefined
}

/** What following a reference needs to know of the image that holds it. */
export interface ReferenceContext {
  readonly options: ReferenceOptions & { readonly forceShare?: boolean | undefined }
  /** Path of the image, if it was opened by one. */
  readonly path: string | undefined
  /** Path of the image that was opened first. */
  readonly root: string | undefined
  /** The files of the images above, and of this one, as far as they are files. */
  readonly chain: readonly ChainLink[]
  /** What was opened by names so far, for any image of the chain. */
  readonly opened: ChainLink[]
  /** The names in this image are the caller's: it is new. */
  readonly isNew?: boolean | undefined
  /** The backing file, where it is open already: that of a new overlay is, before anything is written. */
  readonly backing?: BlockDevice | undefined
  /** Ends opening; not for what is opened later. */
  readonly signal?: AbortSignal | undefined
  /** Functions that let others write to the files which this image does; for whoever closes it. */
  readonly held: (() => void)[]
  /** Opens a qcow2 image of the backing chain, read-only. */
  openImage(device: BlockDevice, path: string, context: ReferenceContext): Promise<BlockDevice>
}

/** The context of an image that nobody refers to. */
export function rootContext(
  { path, identity }: Pick<BlockDevice, 'path' | 'identity'>,
  options: ReferenceContext['options'],
  openImage: ReferenceContext['openImage'],
): ReferenceContext {
  const { references = 'tree' } = options
  if (typeof references !== 'function' && !referenceRules.includes(references)) throw new TypeError(`references must be ${referenceRules.join(', ')} or a function, not ${JSON.stringify(references)}`)
  return { options, path, root: path, chain: identity === undefined ? [] : [{ path: path ?? 'the image', identity }], opened: [], held: [], openImage }
}

/** What refusals say there is to do. */
export interface Advice {
  /** To follow the name whatever it is. */
  readonly any: string
  /** To write to the data file. */
  readonly write: string
  /** For a name with a protocol. */
  readonly protocol: string
}

const advice: Advice = {
  any: "give the device itself, or references: 'any' for an image that you trust",
  write: "name it yourself with dataFile, or set references: 'any' for an image that you trust",
  protocol: 'give the device itself',
}

/** How {@link follow} opens a file. */
export interface Following {
  /** Path of the image that was opened first. */
  readonly root: string | undefined
  readonly open: (path: string) => Promise<BlockDevice>
  readonly advice: Advice
}

/**
 * Opens what a reference names, under a rule.
 * @throws UnsupportedError if the rule refuses it; Qcow2Error `ERR_NOT_FOUND`
 */
export async function follow(rule: ReferenceRule, reference: Reference, { root, open, advice }: Following): Promise<BlockDevice> {
  const { path, access } = reference
  if (rule === 'none') throw refused(reference, 'is not opened: no other file is', advice.any)
  if (path === undefined) throw refused(reference, 'is not a path', advice.protocol)
  if (rule === 'any') return open(path)
  if (access === 'write') throw refused(reference, 'would be written to', advice.write)
  if (root === undefined) throw refused(reference, 'is in no directory tree: the image was not opened by a path', advice.any)
  const opened = await openInTree(root, path, () => open(path)).catch((cause: unknown) => {
    throw Qcow2Error.is(cause) ? cause : notFound(reference, cause)
  })
  if (typeof opened !== 'string') return opened
  throw refused(reference, outside[opened], advice.any)
}

const outside: Readonly<Record<OutsideTree, string>> = {
  outside: 'is outside the directory tree of the image',
  hidden: 'is hidden: a part of its path begins with a dot',
  root: 'is in no tree: the directory of the image is the root of the file system',
}

function refused({ kind, name, from }: Reference, why: string, whatToDo: string): UnsupportedError {
  return new UnsupportedError(`${kind} ${JSON.stringify(name)}${from === undefined ? '' : ` of ${from}`} ${why}; ${whatToDo}`, [kind])
}

function notFound({ kind, path, from }: Reference, cause: unknown): Qcow2Error {
  return new Qcow2Error('ERR_NOT_FOUND', `${kind} ${path!} cannot be found (named in ${from ?? 'the image'})`, { cause })
}

/**
 * Opens the backing file an image names, read-only.
 * @throws Qcow2Error `ERR_UNSUPPORTED` if the rule refuses it, the format is not named, or the chain is too deep; FormatError
 * if the chain loops.
 */
export async function openBacking(name: string, format: string | undefined, context: ReferenceContext): Promise<BlockDevice> {
  const isFound = isPlainPath(name) && (isAbsolutePath(name) || context.path !== undefined)
  const path = isFound ? resolveReference(context.path ?? '', name) : undefined
  const reference = { kind: 'backing file', name, format, from: context.path, path, access: 'read' } as const
  const { device, isGiven } = await openReference(reference, context)
  if (isGiven) return device
  try {
    const chain = extended(context, { path: path!, identity: device.identity })
    const known = format ?? (await guess(device, reference, context))
    if (known === 'raw') return device
    if (known !== 'qcow2') throw new UnsupportedError(`format ${known} is not supported, qcow2 and raw are`, [known])
    const below = { ...context, path, chain, isNew: undefined, root: context.isNew === true ? path : context.root }
    return await context.openImage(device, path!, below)
  } catch (error) {
    await device.close()
    // which file of the chain it is, the errors do not know
    if (Qcow2Error.is(error) && !error.message.startsWith('the backing chain') && !error.message.startsWith('backing file')) error.message = `backing file ${name}: ${error.message}`
    throw error
  }
}

/** The chain with one more file. */
function extended({ chain, opened }: ReferenceContext, link: ChainLink): readonly ChainLink[] {
  const longer = [...chain, link]
  if (has(chain, link)) {
    throw new FormatError(`the backing chain loops: ${longer.map(({ path }) => path).join(' -> ')}`, { structure: 'header', field: 'backing_file_name' })
  }
  if (has(opened, link)) throw new FormatError(`${link.path} is a data file of the chain, too`, { structure: 'header', field: 'backing_file_name' })
  if (longer.length > maxBackingChain) {
    throw new UnsupportedError(`the backing chain has more than ${maxBackingChain} files; convert or rebase one in the middle`, ['backing chain'])
  }
  opened.push(link)
  return longer
}

function has(links: readonly ChainLink[], { identity }: ChainLink): boolean {
  return identity !== undefined && links.some((link) => link.identity === identity)
}

/** Opens the external data file an image names. A relative name is relative to the working directory, as in QEMU. */
export async function openDataFile(name: string, access: 'read' | 'write', context: ReferenceContext): Promise<BlockDevice> {
  // any name is a path: QEMU follows no protocol here since CVE-2024-4467
  const reference = { kind: 'data file', name, format: 'raw', from: context.path, path: name, access } as const
  const { device } = await openReference(reference, context)
  return asDataFile(device, access, context)
}

/**
 * Begins the data file of a new image. It takes the place of no file that the image stands on. A device that the policy gives
 * is discarded by closing it.
 */
export async function createDataFile(name: string, context: ReferenceContext, { signal }: CallOptions): Promise<Target> {
  const { references, locking } = context.options
  refuseClash({ path: name, identity: await fileKey(name) }, context)
  if (typeof references !== 'function') return openTarget(name, { locking, signal })
  const reference = { kind: 'data file', name, format: 'raw', from: context.path, path: name, access: 'write' } as const
  const decision = await references(reference)
  if (typeof decision !== 'boolean') return { device: decision, shows: 'at once', keep: () => Promise.resolve(), discard: () => decision.close() }
  if (decision) return openTarget(name, { locking, signal })
  throw refused(reference, 'is not opened', advice.any)
}

/** Opens the data file that the caller gives instead of the one that the image names. */
export async function openGivenDataFile(source: Source, access: 'read' | 'write', context: ReferenceContext): Promise<BlockDevice> {
  const { forceShare, locking } = context.options
  const device = isBlockDevice(source) ? source : await openSource(source, { readOnly: access === 'read', forceShare, locking })
  return asDataFile(device, access, context)
}

/** No two images write to one data file. */
async function asDataFile(device: BlockDevice, access: 'read' | 'write', context: ReferenceContext): Promise<BlockDevice> {
  try {
    const link = { path: device.path ?? 'data file', identity: device.identity }
    refuseClash(link, context)
    if (access === 'write' && context.options.locking !== false) context.held.push(await holdImageFile(device))
    context.opened.push(link)
    return device
  } catch (error) {
    await device.close()
    throw error
  }
}

/** No file of the chain can be the data file. */
function refuseClash(link: ChainLink, { chain, opened }: ReferenceContext): void {
  if (!has(chain, link) && !has(opened, link)) return
  throw new FormatError(`the data file ${link.path} is the image itself, or a file below it`, { structure: 'header', field: 'data_file_name' })
}

interface Opened {
  readonly device: BlockDevice
  /** By the caller's decision: what it is he knows. */
  readonly isGiven: boolean
}

async function openReference(reference: Reference, context: ReferenceContext): Promise<Opened> {
  const { references = 'tree', forceShare, locking } = context.options
  let rule: ReferenceRule = context.isNew === true ? 'any' : 'none'
  if (typeof references === 'function') {
    const decision = await references(reference)
    if (typeof decision !== 'boolean') return { device: decision, isGiven: true }
    rule = decision ? 'any' : 'none'
  } else if (context.isNew !== true) rule = references
  const open = (path: string): Promise<BlockDevice> => openSource(path, { readOnly: reference.access === 'read', forceShare, locking })
  return { device: await follow(rule, reference, { root: context.root, open, advice }), isGiven: false }
}

async function guess(device: BlockDevice, { name }: Reference, { options }: ReferenceContext): Promise<string> {
  if (options.probeBackingFormat === true) return probeFormat(device)
  throw new UnsupportedError(
    `backing file ${JSON.stringify(name)}: its format is not recorded, and guessing lets whoever writes a raw disk choose files to open; record it (setBackingFile), or set probeBackingFormat to guess`,
    ['backing format'],
  )
}
