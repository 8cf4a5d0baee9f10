/**
 * New refcount structures from nothing but the references that were found. Owns where they go, and the
 * one write that puts them in place of the old.
 */
import { writeU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'
import type { CheckContext } from './check-context.ts'
import type { ClusterCounters } from './check-counters.ts'
import { maxRefcountTableBytes } from './limits.ts'
import { NamedClusters } from './named-clusters.ts'
import { Qcow2Error } from '../core/errors.ts'
import { refcountLayout } from './refcount-layout.ts'

/** What is to change along with the refcount structures. */
export interface RebuildOptions {
  /** Counters become `1 << refcountOrder` bits wide; default as they are. */
  readonly refcountOrder?: number
  /** A new snapshot table of so many snapshots; its old clusters must not have been counted. */
  readonly snapshots?: { readonly table: Uint8Array; readonly count: number } | undefined
  /**
   * The image as it was checked: its old structures, and others that must keep their bytes. The new structures then go
   * into the first gap between these that takes them: a file that grows would bring damaged references past its end to
   * life. Without it they go after the end.
   */
  readonly keep?: CheckContext
  /** Of a sound image: the cluster after the last one in use, where the new structures go; a device may be much longer. */
  readonly start?: number | undefined
}

interface Plan {
  /** First cluster of the new structures. */
  readonly start: number
  readonly snapshotClusters: number
  /** Refcount table indices that need a block, ascending. */
  readonly blocks: readonly number[]
  readonly tableClusters: number
  /** Behind the last cluster of the new structures. */
  readonly end: number
}

/**
 * Writes refcount structures that count what `context.expected` holds, which must not include the old
 * ones, and switches the image over to them.
 *
 * Order: everything new goes where nothing refers to; flush; then one write of the header's first sector
 * names the new structures; flush. A crash before that write leaves the image as it was, perhaps with a
 * longer file; after it the new structures are in force. The clusters of the old ones are free because
 * nothing counts them any more.
 * @throws Qcow2Error `ERR_RANGE` if a count does not fit into counters of the new width.
 */
export async function rebuildRefcounts(context: CheckContext, options: RebuildOptions = {}): Promise<void> {
  const order = options.refcountOrder ?? context.header.refcountOrder
  const plan = planRebuild(context, order, options)
  await writeBlocks(context, plan, order)
  await writeTable(context, plan)
  if (options.snapshots !== undefined) await context.host.write(plan.start * context.geometry.clusterSize, options.snapshots.table)
  const size = plan.end * context.geometry.clusterSize
  if (context.host.size < size && !context.host.growable) await context.host.resize(size)
  await context.host.flush()
  await switchHeader(context, plan, order, options)
  await context.host.flush()
}

/** The first place that takes the new structures. */
function planRebuild(context: CheckContext, order: number, options: RebuildOptions): Plan {
  const perBlock = (context.geometry.clusterSize * 8) / 2 ** order
  // what is in use may end up to a cluster after the file
  const end = Math.max(context.fileClusters, context.expected.highest + 1)
  const { keep = context } = options
  const named = new NamedClusters(keep)
  // a table that the end of the file cuts stays in use as far as it is there
  if (keep !== context) for (const cluster of named.below(context.fileClusters)) if (context.expected.get(cluster) === 0) context.expected.add(cluster, 1)
  const counted = usedBlocks(context, perBlock)
  for (const gap of gaps(context.expected, keep.expected, named, { from: options.start ?? (keep === context ? end : 0), end })) {
    const plan = planAt(gap.start, context, perBlock, counted, options)
    if (plan.end <= gap.end) return plan
  }
  throw new Error('the last gap has no end')
}

/** The new structures count themselves, so their size is a fixed point. */
function planAt(start: number, context: CheckContext, perBlock: number, counted: readonly number[], options: RebuildOptions): Plan {
  const { clusterSize } = context.geometry
  const snapshotClusters = Math.ceil((options.snapshots?.table.length ?? 0) / clusterSize)
  for (let blocks = counted, tableClusters = 1; ; ) {
    const end = start + snapshotClusters + blocks.length + tableClusters
    const needed = new Set(counted)
    for (let index = Math.floor(start / perBlock); index <= Math.floor((end - 1) / perBlock); index++) needed.add(index)
    const neededTable = Math.ceil(((largest(needed) + 1) * 8) / clusterSize)
    if (neededTable * clusterSize > Math.max(maxRefcountTableBytes, clusterSize)) {
      throw new Qcow2Error('ERR_RANGE', `the refcount table would need ${neededTable} clusters, more than the format allows`)
    }
    if (needed.size === blocks.length && neededTable === tableClusters) return { start, snapshotClusters, blocks, tableClusters, end }
    blocks = [...needed].sort((a, b) => a - b)
    tableClusters = neededTable
  }
}

/** Runs of clusters that nothing refers to; nothing is counted from `end` on. The last one has no end. */
function* gaps(
  first: ClusterCounters,
  second: ClusterCounters,
  named: NamedClusters,
  { from, end }: { readonly from: number; readonly end: number },
): Generator<{ start: number; end: number }, void, undefined> {
  const counted = (cluster: number): number => {
    const used = cluster < end ? Math.min(first.nextUsed(cluster, end), second.nextUsed(cluster, end)) : end
    return used < end ? used : Infinity
  }
  for (let start = from; start < Infinity; ) {
    const used = Math.min(counted(start), named.next(start))
    if (used > start) yield { start, end: used }
    start = named.has(used) ? named.nextFree(used) : used + 1
  }
}

function largest(values: Iterable<number>): number {
  let most = 0
  for (const value of values) most = Math.max(most, value)
  return most
}

function usedBlocks(context: CheckContext, perBlock: number): number[] {
  const end = context.expected.highest + 1
  const blocks: number[] = []
  for (let cluster = context.expected.nextUsed(0, end); cluster < end; ) {
    const index = Math.floor(cluster / perBlock)
    blocks.push(index)
    cluster = context.expected.nextUsed((index + 1) * perBlock, end)
  }
  return blocks
}

async function writeBlocks(context: CheckContext, plan: Plan, order: number): Promise<void> {
  const { expected, geometry, host, call } = context
  const layout = refcountLayout(order)
  const perBlock = (geometry.clusterSize * 8) / 2 ** order
  const block = new Uint8Array(geometry.clusterSize)
  for (let i = 0; i < plan.blocks.length; i++) {
    call.signal?.throwIfAborted()
    const first = plan.blocks[i]! * perBlock
    block.fill(0)
    const end = Math.min(first + perBlock, expected.highest + 1)
    for (let cluster = expected.nextUsed(first, end); cluster < end; cluster = expected.nextUsed(cluster + 1, end)) {
      const count = expected.get(cluster)
      if (count > layout.max) {
        throw new Qcow2Error('ERR_RANGE', `the cluster at offset ${cluster * geometry.clusterSize} has ${count} references; refcounts of ${layout.bits} bits count to ${layout.max}`)
      }
      layout.set(block, cluster - first, count)
    }
    for (let cluster = Math.max(plan.start, first); cluster < Math.min(plan.end, first + perBlock); cluster++) layout.set(block, cluster - first, 1)
    await host.write((plan.start + plan.snapshotClusters + i) * geometry.clusterSize, block)
  }
}

async function writeTable(context: CheckContext, plan: Plan): Promise<void> {
  const { clusterSize } = context.geometry
  const table = new Uint8Array(plan.tableClusters * clusterSize)
  const view = viewOf(table)
  plan.blocks.forEach((index, i) => writeU64(view, index * 8, (plan.start + plan.snapshotClusters + i) * clusterSize))
  await context.host.write((plan.start + plan.snapshotClusters + plan.blocks.length) * clusterSize, table)
}

/** All fields concerned lie in the first sector, so one write of it changes them together. */
async function switchHeader(context: CheckContext, plan: Plan, order: number, options: RebuildOptions): Promise<void> {
  const { clusterSize } = context.geometry
  const bytes = await context.read(0, context.header.version === 2 ? 72 : 104)
  const view = viewOf(bytes)
  writeU64(view, 48, (plan.start + plan.snapshotClusters + plan.blocks.length) * clusterSize)
  view.setUint32(56, plan.tableClusters)
  if (options.snapshots !== undefined) {
    view.setUint32(60, options.snapshots.count)
    writeU64(view, 64, options.snapshots.count === 0 ? 0 : plan.start * clusterSize)
  }
  if (context.header.version === 3) view.setUint32(96, order)
  await context.host.write(0, bytes)
}
