/**
 * Opening an image: reads header, tables and snapshot list, follows references, and refuses what
 * cannot be handled. Everything is checked against the limits before memory is taken for it.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { MemoryDevice } from '../block/memory.ts'
import { pad } from '../block/pad.ts'
import { allocateAligned } from '../block/slab.ts'
import { FormatError, UnsupportedError } from '../core/errors.ts'
import type { CheckReport } from './check-report.ts'
import { Engine, type DataCipher, type EngineState } from './engine.ts'
import { incompatible } from './features.ts'
import { prepareFirstWrite } from './first-write.ts'
import { decodeHeaderCluster, refuseRawWithoutDataFile, type HeaderCluster } from './header.ts'
import { HostFile } from './host-file.ts'
import { PointerTable } from './pointer-table.ts'
import { namesOf } from './names.ts'
import { openBacking, openDataFile, openGivenDataFile, rootContext, type ReferenceContext } from './references.ts'
import { repairImage } from './repair.ts'
import { readSnapshotTable } from './snapshot-list.ts'

/** How an engine is opened on a device. */
export interface OpenEngineOptions extends CallOptions {
  readonly readOnly: boolean
  /** Bytes of the metadata caches; default 32 MiB. */
  readonly cacheSize?: number | undefined
  /** Makes the cipher of an encrypted image. */
  readonly openCipher?: ((content: HeaderCluster, host: HostFile) => Promise<DataCipher | undefined>) | undefined
  readonly context: ReferenceContext
  /** See `OpenOptions`. */
  readonly onRepair?: ((report: CheckReport) => void) | undefined
}

const defaultCacheSize = 32 << 20
const firstRead = 64 << 10

/** The device as the engine uses it: any request, zeroes past the end. */
export function hostFile(device: BlockDevice): HostFile {
  const aligned = device.limits.memoryAlignment > 1
  return new HostFile(pad(device), aligned ? allocateAligned : undefined)
}

/** Reads and decodes cluster 0. */
export async function readHeaderCluster(host: HostFile, { signal }: CallOptions = {}): Promise<HeaderCluster> {
  const first = host.allocate(Math.min(firstRead, host.size))
  await host.readInto(0, first, signal)
  const content = decodeHeaderCluster(first)
  const clusterSize = 2 ** content.header.clusterBits
  if (clusterSize <= first.length || host.size <= first.length) return content
  const whole = host.allocate(clusterSize)
  await host.readInto(0, whole, signal)
  return decodeHeaderCluster(whole)
}

/** Opens an engine. The device stays the caller's if it fails. */
export async function openEngine(device: BlockDevice, options: OpenEngineOptions): Promise<Engine> {
  const { readOnly } = options
  const host = hostFile(device)
  const content = await readHeaderCluster(host, options)
  const { header } = content
  refuseRawWithoutDataFile(header)
  refuseState(content, options)
  if (!readOnly && (header.incompatibleFeatures & incompatible.dirty) !== 0n) {
    await repairDirty(host, options)
    return openEngine(device, options)
  }
  const cipher = header.cryptMethod === 'none' ? undefined : await options.openCipher?.(content, host)
  const state = await readState(host, content, readOnly, options)
  options.signal?.throwIfAborted()
  return assembleEngine(host, state, options, cipher)
}

/** Opens an engine for its tables and counters alone: it has neither a backing file nor a key, and may not be asked for guest data. */
export function openMetadata(device: BlockDevice): Promise<Engine> {
  const none = new MemoryDevice(0)
  const context = rootContext({}, { backing: none, dataFile: none }, () => Promise.resolve(device))
  return openEngine(device, { readOnly: false, context, openCipher: () => Promise.resolve(undefined) })
}

/** Follows the references of an image whose state is known, and puts the engine together. */
export async function assembleEngine(
  host: HostFile,
  state: EngineState,
  options: OpenEngineOptions,
  cipher?: DataCipher,
): Promise<Engine> {
  const { readOnly, context } = options
  // a device that was given stays the caller's if this fails
  const opened: BlockDevice[] = []
  try {
    const dataDevice = await openData(state.content, readOnly, context)
    if (dataDevice !== undefined && dataDevice !== context.options.dataFile) opened.push(dataDevice)
    const backing = context.backing ?? (await openBackingOf(state.content, context))
    if (backing !== undefined && backing !== context.options.backing) opened.push(backing)
    return new Engine({
      host,
      dataFile: dataDevice === undefined ? undefined : hostFile(dataDevice),
      ...state,
      backing,
      reopenBacking: context.options.backing === undefined ? () => openBackingOf(state.content, { ...context, opened: [], signal: undefined }) : undefined,
      readOnly,
      cacheSize: options.cacheSize ?? defaultCacheSize,
      cipher,
      prepareFirstWrite,
    })
  } catch (error) {
    for (const each of opened) await each.close()
    throw error
  }
}

/** Reads the tables a header names; the refcount table only for writing. */
export async function readState(host: HostFile, content: HeaderCluster, readOnly: boolean, { signal }: CallOptions = {}): Promise<EngineState> {
  const { header } = content
  const refcountEntries = readOnly ? 0 : (header.refcountTableClusters * 2 ** header.clusterBits) / 8
  const [l1Table, refcountTable, snapshots] = await Promise.all([
    PointerTable.read(host, header.l1TableOffset, header.l1Size, signal),
    PointerTable.read(host, header.refcountTableOffset, refcountEntries, signal),
    readSnapshotTable(host, header),
  ])
  return { content, l1Table, refcountTable, snapshots: snapshots.records, snapshotTableLength: snapshots.length }
}

/** Sets right the refcounts that the last writer postponed and did not get to. */
async function repairDirty(host: HostFile, { onRepair, signal }: OpenEngineOptions): Promise<void> {
  const report = await repairImage(host.device, { repair: 'all', signal })
  onRepair?.(report)
  if (report.corruptions === 0 && report.checkErrors === 0) return
  throw new FormatError(
    `the dirty bit is set, and repairing left ${report.corruptions} corruptions and ${report.checkErrors} check errors`,
    { structure: 'header', field: 'incompatible_features', offset: 72 },
    'ERR_CORRUPT',
  )
}

function refuseState(content: HeaderCluster, options: OpenEngineOptions): void {
  const { header } = content
  if (header.cryptMethod !== 'none' && options.openCipher === undefined) {
    throw new UnsupportedError(`header: crypt_method is ${header.cryptMethod}; the image is encrypted and needs a key (offset 32)`, [
      `encryption ${header.cryptMethod}`,
    ])
  }
  if (!options.readOnly && (header.incompatibleFeatures & incompatible.corrupt) !== 0n) {
    throw new FormatError(
      'the corrupt bit is set: the image may be opened read-only, or repaired with repair: "all"',
      { structure: 'header', field: 'incompatible_features', offset: 72 },
      'ERR_CORRUPT',
    )
  }
}

async function openData(content: HeaderCluster, readOnly: boolean, context: ReferenceContext): Promise<BlockDevice | undefined> {
  if ((content.header.incompatibleFeatures & incompatible.dataFile) === 0n) return undefined
  const access = readOnly ? 'read' : 'write'
  if (context.options.dataFile !== undefined) return openGivenDataFile(context.options.dataFile, access, context)
  const { dataFile } = namesOf(content)
  if (dataFile === undefined || dataFile === '') {
    throw new UnsupportedError('the image has an external data file and does not name it; give it as `dataFile`', ['external data file'])
  }
  return openDataFile(dataFile, access, context)
}

async function openBackingOf(content: HeaderCluster, context: ReferenceContext): Promise<BlockDevice | undefined> {
  if (context.options.backing !== undefined) return context.options.backing
  const { backingFile, backingFormat } = namesOf(content)
  if (backingFile === undefined) return undefined
  return openBacking(backingFile, backingFormat, {
    ...context,
    backing: undefined,
    options: { ...context.options, backing: undefined, dataFile: undefined },
  })
}
