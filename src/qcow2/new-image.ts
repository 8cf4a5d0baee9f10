/**
 * A new image as far as the engine over it: the layout in its file, the data file and the encryption. Owns that a
 * failure leaves nothing open.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { holdImageFile } from '../block/file-claim.ts'
import { fileKey } from '../block/file-tree.ts'
import { pad } from '../block/pad.ts'
import { isBlockDevice, openTarget, pathOf, type Source, type Target } from '../block/source.ts'
import { zeroContent } from '../block/zero-content.ts'
import { IoError } from '../core/errors.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { assertNotBelow } from './chain-files.ts'
import { checkNewBacking, freshState, layoutEnd, makeBlank, planLayout, writeLayout, type Layout, type LayoutOptions } from './create.ts'
import type { EncryptionOptions } from './encryption.ts'
import type { Engine } from './engine.ts'
import type { HostFile } from './host-file.ts'
import { assembleEngine, hostFile, readState } from './open.ts'
import { createDataFile, openBacking, rootContext, type ReferenceContext, type ReferenceOptions } from './references.ts'
import { settle } from './shutdown.ts'
import { zeroActive } from './zero.ts'

/** Options of `Qcow2Image.create`. */
export interface CreateOptions extends Omit<LayoutOptions, 'size'>, Omit<ReferenceOptions, 'backing' | 'dataFile'>, CallOptions {
  /** Virtual size of the disk in bytes; rounded up to a multiple of 512. An overlay may leave it to its backing file. */
  readonly size?: number | undefined
  /** Direct I/O for paths: past the page cache. Default false. */
  readonly direct?: boolean | undefined
  /** Requests of at most this many bytes to the new file are made synchronously; see `openFile`. Default as there. */
  readonly syncLimit?: number | undefined
  /** Fail with `ERR_EXISTS` if the file exists, instead of replacing it. Default false. */
  readonly exclusive?: boolean | undefined
  /** Permissions of the new file. Default: those of the file that is replaced, or 0o666 less the umask. */
  readonly mode?: number | undefined
  /** False: replace a file whoever uses it. Default true. */
  readonly locking?: boolean | undefined
  /** Encrypt guest data. Default: not. */
  readonly encryption?: EncryptionOptions | undefined
}

const createOptions: OptionNames<CreateOptions> = {
  size: true,
  clusterSize: true,
  version: true,
  refcountBits: true,
  extendedL2: true,
  lazyRefcounts: true,
  compressionType: true,
  preallocation: true,
  backing: true,
  dataFile: true,
  dataFileRaw: true,
  encryption: true,
  exclusive: true,
  direct: true,
  mode: true,
  locking: true,
  syncLimit: true,
  references: true,
  probeBackingFormat: true,
  cacheSize: true,
  signal: true,
}

/** An engine over a new image. */
export interface NewEngine {
  readonly engine: Engine
  /** Lets others open the file for writing. */
  readonly release: () => void
}

/** Makes an image; `openImage` opens those of its backing chain. The backing file is opened before anything is written. */
export async function createEngine(target: Source, given: CreateOptions | undefined, openImage: ReferenceContext['openImage']): Promise<NewEngine> {
  const options = given ?? {}
  refuseUnknownOptions('Qcow2Image.create', options, createOptions)
  options.signal?.throwIfAborted()
  const { references, probeBackingFormat, cacheSize, locking, backing } = options
  if (backing !== undefined) checkNewBacking(backing)
  else if (options.size === undefined) throw new TypeError('size is missing: only an overlay may leave it to its backing file')
  const context = { ...rootContext(await targetFile(target), { references, probeBackingFormat, cacheSize, locking }, openImage), isNew: true }
  if (backing === undefined) return createSized(target, { ...options, size: options.size! }, context)
  // what the caller's own decision gives says nothing of the file that is named
  if (typeof references === 'function') await refuseOwnBase(pathOf(target), options)
  const device = await openBacking(backing.file, backing.format, context)
  try {
    return await createSized(target, { ...options, size: options.size ?? device.size }, { ...context, backing: device })
  } catch (error) {
    await device.close()
    throw error
  }
}

/** The file that the image will be, also where it does not exist yet. */
async function targetFile(target: Source): Promise<Pick<BlockDevice, 'path' | 'identity'>> {
  const path = pathOf(target)
  if (isBlockDevice(target)) return { path, identity: target.identity }
  return path === undefined ? {} : { path, identity: await fileKey(path) }
}

async function createSized(given: Source, options: CreateOptions & LayoutOptions, context: ReferenceContext): Promise<NewEngine> {
  const layout = planLayout(options)
  if (options.encryption !== undefined) checkEncryption(options)
  const target = await openTarget(given, options)
  const host = hostFile(target.device)
  let dataFile: Target | undefined
  const release = (): void => context.held.forEach((free) => free())
  try {
    refuseTooSmall(host, layout)
    if (options.locking !== false) context.held.push(await holdImageFile(target.device))
    if (options.dataFile !== undefined) dataFile = await newDataFile(options, layout, context)
    const engine = await writeEngine(host, layout, target.shows === 'when kept' ? 'any' : 'flushed', options, dataFile === undefined ? context : withDataFile(context, dataFile))
    await keepEngine(engine, target, dataFile)
    return { engine, release }
  } catch (error) {
    release()
    await dataFile?.discard()
    await target.discard()
    throw error
  }
}

/** Before anything is touched: what would replace, or overwrite, the image that it is to stand on. */
async function refuseOwnBase(path: string | undefined, { backing, dataFile }: CreateOptions): Promise<void> {
  if (backing === undefined || path === undefined) return
  await assertNotBelow(path, path, backing)
  if (dataFile !== undefined) await assertNotBelow(dataFile, path, backing)
}

/** A place of fixed size is refused before it is touched. */
function refuseTooSmall({ device }: HostFile, layout: Layout): void {
  const needed = layoutEnd(layout)
  if (device.growable || device.size >= needed) return
  const cause = new Error(`the new image takes ${needed} bytes, the device has ${device.size}: No space left on device`)
  throw new IoError('resize', cause, { code: 'ERR_NO_SPACE', offset: device.size, length: needed - device.size })
}

/** Writes the image and opens it. */
async function writeEngine(host: HostFile, layout: Layout, order: 'flushed' | 'any', options: CreateOptions, context: ReferenceContext): Promise<Engine> {
  await makeBlank(host, layout)
  await writeLayout(host, layout, order)
  const state = layout.preallocation === 'off' ? freshState(layout) : await readState(host, layout.content, false)
  const engine = await assembleEngine(host, state, { readOnly: false, cacheSize: options.cacheSize, context })
  if (options.encryption === undefined) return engine
  try {
    await encrypt(engine, layout, options.encryption, options.signal)
    return engine
  } catch (error) {
    await engine.backing?.close()
    throw error
  }
}

async function encrypt(engine: Engine, layout: Layout, encryption: EncryptionOptions, signal: AbortSignal | undefined): Promise<void> {
  const isMapped = layout.preallocation !== 'off' && !engine.geometry.extendedL2
  if (isMapped) await zeroActive(engine, 0, engine.header.size, 'keep', signal)
  // for encrypted images only: Node's ciphers take a few milliseconds to load
  engine.cipher = await (await import('./encryption.ts')).encryptEmptyImage(engine, encryption)
  await settle(engine)
}

/** Makes the image durable; it gets its name after the data file has its own. Nothing is owed then until the next change. */
async function keepEngine(engine: Engine, target: Target, dataFile: Target | undefined): Promise<void> {
  if (dataFile !== undefined) {
    await engine.data.flush()
    await dataFile.keep()
  }
  // a file made anew is flushed as it is kept; what pads it is not
  if (target.shows === 'at once' || engine.host.device !== target.device) await engine.host.flush()
  await target.keep({ folder: 'with next flush' })
}

/** The data file, empty: all of it reads as zeroes, as far as the image will read it. */
async function newDataFile({ dataFile, signal }: CreateOptions, layout: Layout, context: ReferenceContext): Promise<Target> {
  const { size } = layout.content.header
  const target = await createDataFile(dataFile!, context, { signal })
  const { device } = target
  try {
    if (device.growable && device.size > 0) await device.resize(0)
    if (device.size < size) await device.resize(size, { signal })
    if (!device.growable && layout.preallocation !== 'off') await zeroContent(pad(device), 0, size, { signal })
    return target
  } catch (error) {
    await target.discard()
    throw error
  }
}

function withDataFile(context: ReferenceContext, { device }: Target): ReferenceContext {
  return { ...context, options: { ...context.options, dataFile: device } }
}

/**
 * Version 2 cannot say that a cluster with space reads as zeroes: it would read as decrypted ones. And a data file that is encrypted
 * does not read like the disk.
 */
function checkEncryption({ preallocation = 'off', version, dataFileRaw }: CreateOptions): void {
  if (dataFileRaw === true) throw new TypeError('encryption and a raw data file exclude each other: it would not read like the disk')
  if (version === 2 && preallocation !== 'off') throw new TypeError('encryption goes with preallocation only in version 3')
}
