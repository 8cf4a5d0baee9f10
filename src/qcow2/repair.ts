/**
 * Repairing an image: what `check.ts` found is set right, in an order in which a crash leaves nothing
 * worse than it was. Works on the file itself, never through the engine.
 */
import type { BlockDevice } from '../block/device.ts'
import { withSource, type Source } from '../block/source.ts'
import { viewOf } from '../bytes/view.ts'
import { FormatError, Qcow2Error } from '../core/errors.ts'
import { owner } from './check-counters.ts'
import type { CheckContext } from './check-context.ts'
import type { EntryList } from './check-mapping.ts'
import { isCounter, type CheckFinding, type CheckReport } from './check-report.ts'
import { runCheck, type CheckOptions, type CheckState } from './check.ts'
import { extensionType, findExtension } from './extensions.ts'
import { keptAutoclear } from './features.ts'
import { maxSnapshotExtraData } from './limits.ts'
import { NamedClusters } from './named-clusters.ts'
import { rebuildRefcounts } from './repair-rebuild.ts'
import { decodeSnapshot, encodeSnapshotTable, type SnapshotRecord } from './snapshot-table.ts'

/** Options of {@link repairImage}. */
export interface RepairOptions extends CheckOptions {
  /** `leaks` frees what nothing refers to; `all` also repairs corruptions. */
  readonly repair: 'leaks' | 'all'
}

/**
 * Repairs a qcow2 image file and checks it again. The file is opened and closed again; a device given stays open. The report is that of the second check, with
 * the counts of what was fixed. When nothing is left but leaks, the dirty and corrupt bits are cleared.
 *
 * Not every corruption can be repaired: damaged entries stay as they are, and so do counts that do not
 * fit the refcount width. `leaks` changes nothing (one `checkErrors`) if the refcount structures would
 * have to be built anew, or not every snapshot can be gone through: then nothing tells a leak from what is in use.
 * @throws Qcow2Error `ERR_READ_ONLY` if the device cannot be written; FormatError if the image says that its data is in
 * another file and names none; what {@link checkImage} throws.
 */
export function repairImage(source: Source, options: RepairOptions): Promise<CheckReport> {
  return withSource(source, { signal: options.signal }, (host) => repairHost(host, options))
}

async function repairHost(host: BlockDevice, options: RepairOptions): Promise<CheckReport> {
  checkRepair(options.repair)
  if (host.readOnly) throw new Qcow2Error('ERR_READ_ONLY', 'repair: the device is open read-only; open it for writing')
  const before = await runCheck(host, options)
  refuseLostDataFile(before.context)
  const fixed = options.repair === 'leaks' ? await repairLeaks(before) : await repairAll(host, before, options)
  if (fixed === undefined) return { ...before.report, checkErrors: before.report.checkErrors + 1 }
  let after = await runCheck(host, options)
  const found = [...before.report.findings.filter(isStructure), ...fixed.counted.report.findings.filter(isCounter)]
  const repaired = goneFindings(found, after.report)
  const mayFixCopied = options.repair === 'all' || isClean(after)
  // again as long as more are left than a check lists
  for (let left = Infinity; mayFixCopied && after.repairs.copied.count > 0 && after.repairs.copied.count < left; ) {
    left = after.repairs.copied.count
    const flags = after.report.findings.filter(isFlag)
    fixed.corruptions += await repairEntries(after, after.repairs.copied, (bytes, at) => (bytes[at] = bytes[at]! ^ 0x80))
    after = await runCheck(host, options)
    repaired.push(...goneFindings(flags, after.report))
  }
  if (after.report.corruptions === 0 && after.report.checkErrors === 0) await clearStateBits(after.context)
  const { corruptions: corruptionsFixed, leaks: leaksFixed, freedRefcountClusters } = fixed
  return { ...after.report, corruptionsFixed, leaksFixed, repaired, ...(freedRefcountClusters === undefined ? {} : { freedRefcountClusters }) }
}

/** The bit alone may be the damage: the guest's data, in this file after all, would count as leaked and be freed. */
function refuseLostDataFile({ hasDataFile, cluster0 }: CheckContext): void {
  if (!hasDataFile || findExtension(cluster0.extensions, extensionType.dataFile) !== undefined) return
  const detail = 'bit 2 (data file) is set, but the image names none: a repair could free the data of the disk; convert the image with its data file'
  throw new FormatError(detail, { structure: 'header', field: 'incompatible_features', offset: 72 })
}

/** @throws TypeError for anything but the two kinds of repair */
function checkRepair(repair: unknown): void {
  if (repair !== 'leaks' && repair !== 'all') throw new TypeError(`repair must be 'leaks' or 'all', not ${JSON.stringify(repair)}`)
}

/** Nothing is wrong but COPIED flags, and the form of the snapshot table, which says nothing of any counter. */
function isClean({ report, repairs, snapshots }: CheckState): boolean {
  return report.checkErrors === 0 && report.leaks === 0 && report.corruptions <= repairs.copied.count + repairs.zero.count + snapshots.toRewrite + snapshots.surplus
}

/** A COPIED flag that contradicts a counter: which of the two is wrong shows when the counters are right. */
function isFlag({ flag }: CheckFinding): boolean {
  return flag === 'COPIED'
}

function isStructure(finding: CheckFinding): boolean {
  return !isFlag(finding) && !isCounter(finding)
}

/** What was wrong and no longer is. */
function goneFindings(before: readonly CheckFinding[], after: CheckReport): CheckFinding[] {
  const key = ({ structure, offset }: CheckFinding): string => `${structure} ${offset}`
  const left = new Set(after.findings.map(key))
  return before.filter((finding) => !left.has(key(finding)))
}

interface Fixed {
  corruptions: number
  leaks: number
  /** The check whose counters were repaired: what was patched before is not wrong in it. */
  readonly counted: CheckState
  readonly freedRefcountClusters?: readonly number[]
}

async function repairLeaks(state: CheckState): Promise<Fixed | undefined> {
  const { surplus, unwalked } = state.snapshots
  // what snapshots hold that could not be looked at was not counted, and is no leak
  if (state.rebuild || surplus > 0 || unwalked > 0) return undefined
  return repairCounters(state, 'lower')
}

async function repairAll(host: BlockDevice, before: CheckState, options: RepairOptions): Promise<Fixed> {
  const { extendedL2 } = before.context.geometry
  const zeroes = await repairEntries(before, before.repairs.zero, (bytes, at) => clearOffset(bytes, at, extendedL2))
  const patched = zeroes + (await dropSurplusSnapshots(before))
  // what was patched referred to clusters, so the counting starts over
  const state = patched === 0 ? before : await runCheck(host, options)
  const rebuild = state.rebuild || state.comparison.differences.truncated
  if (!rebuild && state.snapshots.toRewrite === 0) {
    const fixed = await repairCounters(state, 'set')
    return { ...fixed, corruptions: fixed.corruptions + patched }
  }
  const snapshots = state.snapshots.toRewrite > 0 ? repairedSnapshots(state) : undefined
  const counted = await runCheck(host, { ...options, omitRefcounts: true, omitSnapshotTable: snapshots !== undefined })
  await rebuildRefcounts(counted.context, { snapshots, keep: state.context })
  const rebuilt = await runCheck(host, options)
  // a damaged entry may take the header itself for a table, whose references the switch then changed
  await repairCounters(rebuilt, 'set')
  const after = await runCheck(host, options)
  return {
    // flags that contradicted a lost counter were right all the time
    corruptions: patched + Math.max(0, corruptionsButFlags(state) - corruptionsButFlags(after)),
    leaks: Math.max(0, state.report.leaks - after.report.leaks),
    counted: state,
    ...(state.rebuild ? { freedRefcountClusters: freedRefcountClusters(state, after) } : {}),
  }
}

/** Byte offsets of clusters that belonged to the refcount structures and now to nothing. */
function freedRefcountClusters(before: CheckState, after: CheckState): number[] {
  const { expected, geometry } = before.context
  const end = expected.highest + 1
  const freed: number[] = []
  for (let cluster = expected.nextUsed(0, end); cluster < end; cluster = expected.nextUsed(cluster + 1, end)) {
    const owners = expected.owners(cluster)
    if ((owners & (owner.refcountTable | owner.refcountBlock)) !== 0 && after.context.expected.get(cluster) === 0) freed.push(cluster * geometry.clusterSize)
  }
  return freed
}

function corruptionsButFlags({ report, repairs }: CheckState): number {
  return report.corruptions - repairs.copied.count
}

/**
 * Sets stored counters to what was counted; `lower` only those that are too high. A crash between two blocks leaves
 * some repaired and some not. A cluster that something names past the end of the file keeps its counter: a table that
 * was cut off is still there as far as the file reaches. Blocks that something else refers to as well are left alone.
 */
async function repairCounters(state: CheckState, how: 'set' | 'lower'): Promise<Fixed> {
  const { context, stored, comparison } = state
  const { host, geometry, layout, expected: references } = context
  const { runs } = comparison.differences
  const named = new NamedClusters(context)
  const fixed: Fixed = { corruptions: 0, leaks: 0, counted: state }
  const changed = new Map<number, Uint8Array>()
  for (let i = 0; i < runs.length; i += 4) {
    const [first, count, found, expected] = [runs[i]!, runs[i + 1]!, runs[i + 2]!, runs[i + 3]!]
    if (found < expected && how === 'lower') continue
    for (let cluster = first; cluster < first + count; cluster++) {
      const block = stored.blockForWriting(cluster)
      if (block === undefined || (found > expected && named.has(cluster))) continue
      const offset = stored.offsets[Math.floor(cluster / geometry.refcountsPerBlock)]!
      if (references.owners(offset / geometry.clusterSize) !== owner.refcountBlock) continue
      layout.set(block, cluster % geometry.refcountsPerBlock, expected)
      changed.set(offset, block)
      if (found < expected) fixed.corruptions++
      else fixed.leaks++
    }
  }
  for (const [offset, block] of changed) await host.write(offset, block)
  await host.flush()
  return fixed
}

/** Entries patched in one go lie within this many bytes of each other. */
const patchWindow = 1 << 16

/**
 * Patches table entries in place. Each is one aligned 8- or 16-byte change, whole at any crash. A cluster that is not
 * only a table is left alone: what a damaged entry takes for an L2 table may be guest data, or other metadata.
 */
async function repairEntries({ context }: CheckState, { offsets }: EntryList, patch: (bytes: Uint8Array, at: number) => void): Promise<number> {
  const { host, geometry, expected } = context
  const sorted = Float64Array.from(offsets).sort()
  const isTable = (at: number): boolean => [owner.l1Table, owner.l2Table].includes(expected.owners(Math.floor(at / geometry.clusterSize)) as 2 | 4)
  // an entry may be reached through several tables
  const chosen = sorted.filter((offset, i) => offset !== sorted[i - 1] && isTable(offset))
  for (let i = 0; i < chosen.length; ) {
    const start = chosen[i]!
    let end = i + 1
    while (end < chosen.length && chosen[end]! < start + patchWindow) end++
    const bytes = await context.read(start, chosen[end - 1]! + geometry.l2EntrySize - start)
    for (; i < end; i++) patch(bytes, chosen[i]! - start)
    await host.write(start, bytes.subarray(0, Math.min(bytes.length, host.size - start)))
  }
  await host.flush()
  return chosen.length
}

/** The entry of a zero cluster loses its offset. */
function clearOffset(bytes: Uint8Array, at: number, extendedL2: boolean): void {
  bytes.fill(0, at, at + 8)
  // with subclusters the bitmap behind it says which are zero; the others stay the backing file's
  if (!extendedL2) bytes[at + 7] = 1
}

/** Takes the snapshots past the limits of the table out of the count in the header; where the table has to be rewritten they go with that. */
async function dropSurplusSnapshots({ context, snapshots: { surplus, toRewrite } }: CheckState): Promise<number> {
  if (surplus === 0 || toRewrite > 0) return 0
  const count = new Uint8Array(4)
  viewOf(count).setUint32(0, context.header.snapshotCount - surplus)
  await context.host.write(60, count)
  await context.host.flush()
  return surplus
}

/** The snapshot table with every record as version 3 demands, and no more than is allowed. */
export function repairedSnapshots(state: CheckState): { table: Uint8Array; count: number } {
  const { header } = state.context
  const records: SnapshotRecord[] = []
  for (let next = 0; next < state.snapshots.table.length; ) {
    const decoded = decodeSnapshot(state.snapshots.table, next, header.snapshotsOffset)
    const { record } = decoded
    const unknownExtraData = record.unknownExtraData.subarray(0, maxSnapshotExtraData - 24)
    records.push({ ...record, unknownExtraData, diskSize: record.diskSize ?? header.size })
    next = decoded.next
  }
  return { table: encodeSnapshotTable(records), count: records.length }
}

/**
 * Clears dirty and corrupt, bits 0 and 1 of the incompatible features, whose refcounts are durable, and the autoclear
 * bits of features that are not known here, as a writer must.
 */
async function clearStateBits(context: CheckContext): Promise<void> {
  const { version, incompatibleFeatures, compatibleFeatures, autoclearFeatures } = context.header
  const words = [incompatibleFeatures & ~3n, compatibleFeatures, keptAutoclear(autoclearFeatures)]
  if (version === 2 || (words[0] === incompatibleFeatures && words[2] === autoclearFeatures)) return
  const bytes = new Uint8Array(24)
  words.forEach((word, at) => viewOf(bytes).setBigUint64(at * 8, word))
  await context.host.write(72, bytes)
  await context.host.flush()
}
