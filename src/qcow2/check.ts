/**
 * The check of a whole image: every structure is read from the file, independent of the engine and
 * its caches, every reference counted, and every stored refcount compared (spec "Host cluster
 * management"; the counts are those of `qemu-img check`). Repairing is `repair.ts`.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { withSource, type Source } from '../block/source.ts'
import { owner } from './check-counters.ts'
import { CheckContext } from './check-context.ts'
import { checkMapping, type MappingRepairs } from './check-mapping.ts'
import { compareRefcounts, StoredRefcounts, type RefcountComparison } from './check-refcounts.ts'
import { CheckCollector, type CheckFinding, type CheckReport } from './check-report.ts'
import { checkBitmaps, checkLuksHeader, checkSnapshotTable, type CheckedSnapshots } from './check-structures.ts'
import type { HeldSpace } from './snapshot-holds.ts'

/** Options of {@link checkImage}. */
export interface CheckOptions extends CallOptions {
  /** Findings listed in the report; the counts are always complete. Default 1000. */
  readonly maxFindings?: number | undefined
  /**
   * Bytes of memory that the check may keep, at most; default 4 GiB. It takes 6 bytes for each cluster of the file that is
   * in use, up to 100 where these lie far apart. An image that needs more is refused with `ERR_UNSUPPORTED`.
   */
  readonly maxMemory?: number | undefined
}

/** Everything a check learned, for a repair to work with. */
export interface CheckState {
  readonly context: CheckContext
  readonly stored: StoredRefcounts
  readonly snapshots: CheckedSnapshots
  readonly repairs: MappingRepairs
  readonly comparison: RefcountComparison
  /** The refcount structures must be built anew. */
  readonly rebuild: boolean
  readonly report: CheckReport
}

/**
 * Checks a qcow2 image file without changing it. The file is opened and closed again; a device given stays open. No
 * guest data is read and neither backing nor data file is opened. The image must not be written meanwhile.
 *
 * An image with the dirty bit set reports the refcounts it postponed as corruptions; opening it for
 * writing, or a repair, sets them right.
 * @throws FormatError, UnsupportedError if the header or the snapshot table cannot be understood;
 * what `openSource` throws.
 */
export function checkImage(source: Source, options: CheckOptions = {}): Promise<CheckReport> {
  return withSource(source, { readOnly: true, signal: options.signal }, async (host) => (await runCheck(host, options)).report)
}

/** Structures about to be replaced, which are then not counted as owners of clusters. */
export interface CheckOmissions {
  readonly omitRefcounts?: boolean
  readonly omitSnapshotTable?: boolean
  /** Counters to come are so wide, see {@link CountOptions}; only with `omitRefcounts`. */
  readonly refcountOrder?: number | undefined
}

/** The check with all it learned. */
export async function runCheck(host: BlockDevice, options: CheckOptions & CheckOmissions & { readonly held?: readonly HeldSpace[] } = {}): Promise<CheckState> {
  const collector = new CheckCollector(options.maxFindings ?? 1000)
  const context = await CheckContext.open(host, collector, { signal: options.signal, refcountOrder: options.refcountOrder, maxMemory: options.maxMemory })
  const { header, geometry } = context
  const stored = new StoredRefcounts(context)
  if (options.omitRefcounts !== true) await stored.load()
  context.reference(0, geometry.clusterSize, owner.header)
  const snapshots = await checkSnapshotTable(context, options.omitSnapshotTable !== true)
  const active = { offset: header.l1TableOffset, size: header.l1Size, active: true }
  const { held = [] } = options
  const heldTables = held.map(({ l1 }) => ({ offset: 0, size: l1.length / 8, active: false, entries: l1 }))
  const repairs = await checkMapping(context, [active, ...snapshots.l1Tables, ...heldTables], stored)
  for (const space of held) countHeld(context, space)
  checkLuksHeader(context)
  await checkBitmaps(context)
  const structures = options.omitRefcounts !== true && stored.reference()
  const comparison = await compareRefcounts(context, stored)
  return {
    context,
    stored,
    snapshots,
    repairs,
    comparison,
    rebuild: structures || comparison.rebuild,
    report: reportOf(context, comparison),
  }
}

/** What is wrong with the snapshot table alone: enough to say why an image does not open, in time that its size bounds. */
export async function findSnapshotTableDamage(host: BlockDevice, options: CheckOptions = {}): Promise<readonly CheckFinding[]> {
  const collector = new CheckCollector(options.maxFindings ?? 1000)
  await checkSnapshotTable(await CheckContext.open(host, collector, { signal: options.signal }), false)
  return collector.findings
}

/** What is reserved may lie past the end of the file, where no counter is compared. */
function countHeld(context: CheckContext, { tables, data }: HeldSpace): void {
  const { geometry, host } = context
  for (const offset of tables) context.reference(offset, geometry.clusterSize, owner.l2Table)
  for (const { offset, length } of data) context.reference(offset, Math.min(length, host.size - offset), owner.data)
}

function reportOf(context: CheckContext, comparison: RefcountComparison): CheckReport {
  const { report, header, geometry } = context
  return {
    imageEndOffset: (comparison.highestCluster + 1) * geometry.clusterSize,
    checkErrors: report.checkErrors,
    corruptions: report.corruptions,
    leaks: report.leaks,
    corruptionsFixed: 0,
    leaksFixed: 0,
    totalClusters: Math.ceil((Math.floor(header.size / 512) * 512) / geometry.clusterSize),
    allocatedClusters: report.allocatedClusters,
    fragmentedClusters: report.fragmentedClusters,
    compressedClusters: report.compressedClusters,
    overlaps: report.overlaps,
    findings: report.findings.sort((a, b) => a.offset - b.offset),
  }
}
