/**
 * A new image as far as the engine over it: the layout in its file, the data file and the encryption. Owns that a
 * failure leaves nothing open.
 */
import type { CallOptions } from '../block/device.ts'
import { holdImageFile } from '../block/file-lock.ts'
import { openTarget, pathOf, type Source } from '../block/source.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { freshState, planLayout, writeLayout, type LayoutOptions } from './create.ts'
import type { EncryptionOptions } from './encryption.ts'
import type { Engine } from './engine.ts'
import { assembleEngine, hostFile, readState } from './open.ts'
import { createDataFile, openBacking, rootContext, type ReferenceContext, type ReferenceOptions } from './references.ts'
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

/** Makes an image; `openImage` opens those of its backing chain. */
export async function createEngine(target: Source, options: CreateOptions, openImage: ReferenceContext['openImage']): Promise<NewEngine> {
  refuseUnknownOptions('Qcow2Image.create', options, createOptions)
  options.signal?.throwIfAborted()
  const { references, probeBackingFormat, cacheSize } = options
  const context = rootContext(pathOf(target), { references, probeBackingFormat, cacheSize }, openImage)
  if (options.size !== undefined) return createSized(target, { ...options, size: options.size }, context)
  const { backing } = options
  if (backing === undefined) throw new TypeError('size is missing: only an overlay may leave it to its backing file')
  const device = await openBacking(backing.file, backing.format, context)
  try {
    return await createSized(target, { ...options, size: device.size }, { ...context, sizedBy: device })
  } catch (error) {
    await device.close()
    throw error
  }
}

async function createSized(target: Source, options: CreateOptions & LayoutOptions, context: ReferenceContext): Promise<NewEngine> {
  const layout = planLayout(options)
  if (options.encryption !== undefined) checkEncryption(options)
  const device = await openTarget(target, options)
  const host = hostFile(device)
  let release: (() => void) | undefined
  try {
    release = holdImageFile(device)
    if (options.dataFile !== undefined) await createDataFile(options.dataFile, layout.content.header.size, context)
    await writeLayout(host, layout)
    const state = layout.preallocation === 'off' ? freshState(layout) : await readState(host, layout.content, false)
    const engine = await assembleEngine(host, state, { readOnly: false, cacheSize: options.cacheSize, context })
    const isMapped = layout.preallocation !== 'off' && !engine.geometry.extendedL2
    if (options.encryption !== undefined && isMapped) await zeroActive(engine, 0, engine.header.size, 'keep', options.signal)
    // for encrypted images only: Node's ciphers take a few milliseconds to load
    if (options.encryption !== undefined) engine.cipher = await (await import('./encryption.ts')).encryptEmptyImage(engine, options.encryption)
    engine.unchanged = false
    engine.untouched = false
    return { engine, release }
  } catch (error) {
    release?.()
    if (device !== target) await device.close()
    throw error
  }
}

/** Version 2 knows only legacy AES, and cannot say that a cluster with space reads as zeroes: it would read as decrypted ones. */
function checkEncryption({ encryption, preallocation = 'off', version, dataFile }: CreateOptions): void {
  if (dataFile !== undefined) throw new TypeError('encryption and a data file exclude each other')
  if (version === 2 && preallocation !== 'off') throw new TypeError('encryption goes with preallocation only in version 3')
  if (version === 2 && encryption?.format === 'luks') throw new TypeError('version 2 has only the legacy encryption aes; use version 3')
}
