/**
 * Changing properties of an existing image, `qemu-img amend`: version, refcount width, lazy refcounts,
 * the data file's name. Works on the file itself; the image must not be open.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { withSource, type Source } from '../block/source.ts'
import { Qcow2Error } from '../core/errors.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { refuseDowngrade, removeZeroClusters, type DowngradeOptions } from './amend-downgrade.ts'
import { encodeName } from '../bytes/file-name.ts'
import { refuseLoop } from './chain-files.ts'
import { CheckContext } from './check-context.ts'
import { CheckCollector } from './check-report.ts'
import { runCheck, type CheckState } from './check.ts'
import { encodeFeatureNames, featureNames, autoclear, compatible, incompatible } from './features.ts'
import { extensionType, withExtension, type Extension } from './extensions.ts'
import { encodeHeaderCluster, type Header, type HeaderCluster } from './header.ts'
import { checkDataFileName } from './create.ts'
import { namesOf } from './names.ts'
import { openMetadata } from './open.ts'
import { rebuildRefcounts } from './repair-rebuild.ts'
import { repairedSnapshots, repairImage } from './repair.ts'
import { settle } from './shutdown.ts'
import { replaceSnapshots } from './snapshot-operations.ts'

/** What is to change; what is left out stays. */
export interface AmendOptions extends DowngradeOptions {
  /** 3 (`compat=1.1`) or 2 (`compat=0.10`). */
  readonly version?: 2 | 3 | undefined
  /** 1, 2, 4, 8, 16, 32 or 64. Rebuilds all refcount structures. */
  readonly refcountBits?: number | undefined
  readonly lazyRefcounts?: boolean | undefined
  /** Name of the external data file, of an image that has one; empty takes the name out, so that whoever opens the image must say it. */
  readonly dataFile?: string | undefined
  /** `false`: the data file alone need no longer read like the disk. It cannot be set later. */
  readonly dataFileRaw?: false | undefined
}

const amendOptions: OptionNames<AmendOptions> = {
  ...{ version: true, refcountBits: true, lazyRefcounts: true, dataFile: true, dataFileRaw: true },
  ...{ onProgress: true, signal: true },
}

/**
 * Changes an image as asked. The file is opened and closed again, a device given stays open. Cluster size, extended L2
 * entries and compression type cannot change.
 *
 * Order: an upgrade comes first, then the refcounts, then a downgrade; each ends with one write of the
 * header, before which nothing that the image refers to has changed. A crash leaves the image before
 * or after a step.
 * An image with more references than its refcounts can count becomes sound with wider ones.
 * @throws Qcow2Error `ERR_CORRUPT` for an image that is not sound but for its refcounts when these become wider, `ERR_RANGE` if a count does not fit the
 * new width; UnsupportedError for a downgrade of what version 2 does not have; RangeError, TypeError for
 * options outside the format and unknown ones.
 */
export async function amendImage(source: Source, options: AmendOptions): Promise<void> {
  refuseUnknownOptions('amendImage', options, amendOptions)
  return withSource(source, { signal: options.signal }, (host) => amendHost(host, options))
}

async function amendHost(host: BlockDevice, options: AmendOptions): Promise<void> {
  let state = await runCheck(host, { signal: options.signal })
  const { header } = state.context
  const version = options.version ?? header.version
  const refcountOrder = Math.log2(options.refcountBits ?? 2 ** header.refcountOrder)
  checkOptions(options, header, version, refcountOrder)
  await refuseDataFile(host, state.context.cluster0, options)
  const isSound = isUndamaged(state)
  if (!isSound) await refuseDamage(host, state, refcountOrder, options)
  const isDowngrade = version === 2 && header.version === 3
  if (isDowngrade) refuseDowngrade(state)
  if (version === 3 && header.version === 2) await upgrade(host, state, options)
  if (refcountOrder !== header.refcountOrder) {
    const { context } = await runCheck(host, { signal: options.signal, omitRefcounts: true, refcountOrder })
    await rebuildRefcounts(context, { refcountOrder, start: isSound ? await clustersInUse(host, options) : undefined })
    if (!isSound) {
      // flags that agreed with a counter which was wrong, and counts that the narrow counters cut off
      await repairImage(host, { repair: 'all', signal: options.signal })
      state = await runCheck(host, { signal: options.signal })
    }
  }
  await changeFields(host, options)
  // what was counted is still true: neither new refcounts nor a new header move data or its tables
  if (isDowngrade) await downgrade(host, state, options)
}

/** Clusters up to the last one in use. */
async function clustersInUse(host: BlockDevice, { signal }: CallOptions): Promise<number> {
  const { context, report } = await runCheck(host, { signal })
  return Math.ceil(report.imageEndOffset / context.geometry.clusterSize)
}

function isUndamaged({ report: { corruptions, checkErrors } }: CheckState): boolean {
  return corruptions === 0 && checkErrors === 0
}

/** Wider refcounts are counted anew, which mends lost ones and those that did not fit; nothing else may be wrong. */
async function refuseDamage(host: BlockDevice, { context, report }: CheckState, refcountOrder: number, { signal }: CallOptions): Promise<void> {
  const isWider = refcountOrder > context.header.refcountOrder
  if (isWider && isUndamaged(await runCheck(host, { signal, omitRefcounts: true, refcountOrder }))) return
  const corruptions = report.corruptions + report.checkErrors
  throw new Qcow2Error('ERR_CORRUPT', `amend: the image has ${corruptions} corruptions; repair it first`)
}

function checkOptions(options: AmendOptions, header: Header, version: 2 | 3, refcountOrder: number): void {
  if (!Number.isInteger(refcountOrder) || refcountOrder < 0 || refcountOrder > 6) {
    throw new RangeError(`refcountBits must be 1, 2, 4, 8, 16, 32 or 64, not ${options.refcountBits}`)
  }
  if (version === 2 && (refcountOrder !== 4 || options.lazyRefcounts === true)) {
    throw new TypeError('version 2 has 16-bit refcounts and no lazy refcounts')
  }
  const hasDataFile = (header.incompatibleFeatures & incompatible.dataFile) !== 0n
  if ((options.dataFile !== undefined || options.dataFileRaw !== undefined) && !hasDataFile) {
    throw new TypeError('the image has no external data file')
  }
}

/** The new data file is neither the image itself nor a file below it. */
async function refuseDataFile({ path }: BlockDevice, content: HeaderCluster, { dataFile }: AmendOptions): Promise<void> {
  if (dataFile === undefined || dataFile === '') return
  checkDataFileName(dataFile)
  const { backingFile, backingFormat } = namesOf(content)
  const backing = backingFile === undefined ? undefined : { file: backingFile, format: backingFormat }
  if (path !== undefined) await refuseLoop(path, { backing, dataFile })
}

/** Reads the header anew, changes it and writes it durably. */
async function rewriteHeader(host: BlockDevice, change: (content: HeaderCluster) => HeaderCluster, signal?: AbortSignal): Promise<void> {
  const { cluster0: before } = await CheckContext.open(host, new CheckCollector(0), { signal })
  const after = change(before)
  if (after === before) return
  const bytes = new Uint8Array(2 ** after.header.clusterBits)
  bytes.set(encodeHeaderCluster(after))
  await host.write(0, bytes.subarray(0, Math.max(512, Math.min(bytes.length, host.size))))
  await host.flush()
}

/** Version 3 demands more of the snapshot table, which is therefore replaced first. */
async function upgrade(host: BlockDevice, state: CheckState, options: AmendOptions): Promise<void> {
  if (state.context.header.snapshotCount > 0) await rewriteSnapshots(host, state, options)
  const rename = (content: HeaderCluster): HeaderCluster => {
    const names = encodeFeatureNames(featureNames)
    const extensions = content.header.clusterBits > 12 ? withExtension(content.extensions, extensionType.featureNames, names) : content.extensions
    return { ...content, extensions, header: { ...content.header, version: 3, headerLength: 112 } }
  }
  await rewriteHeader(host, rename, options.signal)
}

async function rewriteSnapshots(host: BlockDevice, state: CheckState, { signal }: CallOptions): Promise<void> {
  if (isUndamaged(state)) {
    const engine = await openMetadata(host)
    await replaceSnapshots(engine, engine.snapshots)
    return settle(engine)
  }
  // counters that are wrong do not tell what is free
  const { context } = await runCheck(host, { signal, omitRefcounts: true, omitSnapshotTable: true })
  await rebuildRefcounts(context, { snapshots: repairedSnapshots(state) })
}

async function changeFields(host: BlockDevice, options: AmendOptions): Promise<void> {
  const { lazyRefcounts, dataFile, dataFileRaw } = options
  if (lazyRefcounts === undefined && dataFile === undefined && dataFileRaw === undefined) return
  await rewriteHeader(
    host,
    (content) => {
      const { header } = content
      const lazy = lazyRefcounts ?? (header.compatibleFeatures & compatible.lazyRefcounts) !== 0n
      const compatibleFeatures = (header.compatibleFeatures & ~compatible.lazyRefcounts) | (lazy ? compatible.lazyRefcounts : 0n)
      const autoclearFeatures = dataFileRaw === false ? header.autoclearFeatures & ~autoclear.rawDataFile : header.autoclearFeatures
      const name = dataFile === undefined || dataFile === '' ? undefined : encodeName(dataFile)
      const extensions: readonly Extension[] = dataFile === undefined ? content.extensions : withExtension(content.extensions, extensionType.dataFile, name)
      if (header.version === 2) return content
      return { ...content, extensions, header: { ...header, compatibleFeatures, autoclearFeatures } }
    },
    options.signal,
  )
}

/** Version 2 has no zero clusters, so they go first; nor bitmaps, whose clusters are free afterwards. */
async function downgrade(host: BlockDevice, state: CheckState, { onProgress, signal }: AmendOptions): Promise<void> {
  const hasLeaks = await removeZeroClusters(host, state, { onProgress, signal })
  await rewriteHeader(
    host,
    (content) => ({
      ...content,
      unknownFields: new Uint8Array(0),
      extensions: content.extensions.filter(({ type }) => type !== extensionType.featureNames && type !== extensionType.bitmaps),
      header: {
        ...content.header,
        version: 2,
        headerLength: 72,
        compressionType: 'zlib',
        incompatibleFeatures: 0n,
        compatibleFeatures: 0n,
        autoclearFeatures: 0n,
      },
    }),
    signal,
  )
  if (hasLeaks || state.context.cluster0.extensions.some(({ type }) => type === extensionType.bitmaps)) {
    await repairImage(host, { repair: 'leaks', signal })
  }
}
