/**
 * Everything one L1 table refers to: its L2 tables and the clusters these map. Snapshot operations
 * raise and lower the counters of whole trees. By the format's convention each L1 table that reaches a
 * cluster, over L2 tables of its own or shared ones, counts once for it.
 *
 * Runs while no guest request is in flight and nothing is dirty; reads tables around the cache, so
 * that a walk over a large image does not empty it.
 */
import { AbortPoints } from '../core/abort-points.ts'
import type { Engine } from './engine.ts'
import { compressedFlag, copiedFlag, decodeCompressed, entryOffset } from './l2-entry.ts'
import type { Piece } from './host-file.ts'
import { maxHostOffset } from './limits.ts'
import type { PointerTable } from './pointer-table.ts'

/** One L2 table, in memory for the moment. */
interface L2Table {
  /** Index of the L1 entry. */
  readonly index: number
  readonly offset: number
  readonly bytes: Uint8Array
  readonly view: DataView
  /** The same bytes in the machine's order: enough to skip empty entries fast. */
  readonly words: Uint32Array
}

/** Bytes of L2 tables read ahead. */
const readAhead = 4 << 20

/**
 * The L2 tables of L1 entries `[0, entries)`, read several at a time. The memory of a table is used
 * again once the next is asked for.
 */
async function* l2Tables(engine: Engine, l1: PointerTable, entries: number): AsyncGenerator<L2Table> {
  const { clusterSize } = engine.geometry
  const depth = Math.min(64, Math.max(2, Math.floor(readAhead / clusterSize)))
  const reading: Promise<L2Table>[] = []
  const spare: Uint8Array[] = []
  let index = 0
  const fill = (): void => {
    while (reading.length < depth && index < entries) {
      const offset = l1.offsetAt(index)
      if (offset !== 0) {
        const next = readTable(engine, l1, index, offset, spare.pop() ?? engine.host.allocate(clusterSize))
        next.catch(() => undefined) // the error surfaces when its turn comes
        reading.push(next)
      }
      index++
    }
  }
  for (;;) {
    fill()
    const next = reading.shift()
    if (next === undefined) return
    const table = await next
    yield table
    spare.push(table.bytes)
  }
}

async function readTable(engine: Engine, l1: PointerTable, index: number, offset: number, bytes: Uint8Array): Promise<L2Table> {
  const { clusterSize } = engine.geometry
  if (offset % clusterSize !== 0 || offset >= maxHostOffset) {
    const location = { structure: 'L1 table', offset: l1.offset + index * 8 }
    throw engine.host.damaged(`entry ${index} is ${offset}, not the offset of a cluster`, location)
  }
  if (engine.metadataMap.overlapsStructure(offset, clusterSize)) {
    throw engine.host.damaged('it lies in a cluster of other metadata', { structure: 'L2 table', offset })
  }
  await engine.host.readInto(offset, bytes)
  const { buffer, byteOffset } = bytes
  return { index, offset, bytes, view: new DataView(buffer, byteOffset, clusterSize), words: new Uint32Array(buffer, byteOffset, clusterSize / 4) }
}

/** Byte position of the first entry from byte `at` on that has a bit set in its first word; the table's end if none. */
function usedEntry(table: L2Table, at: number, entrySize: number): number {
  const { words } = table
  const step = entrySize / 4
  let word = at / 4
  while (word < words.length && (words[word]! | words[word + 1]!) === 0) word += step
  return word * 4
}

/** Host clusters in pairs of first cluster and count, neighbours merged. */
class Runs {
  readonly pairs: number[] = []

  add(cluster: number, count: number): void {
    const { pairs } = this
    const last = pairs.length
    if (last > 0 && pairs[last - 2]! + pairs[last - 1]! === cluster) pairs[last - 1]! += count
    else pairs.push(cluster, count)
  }
}

/** Clusters an L2 table and its entries own a reference to. */
function ownedRuns(engine: Engine, table: L2Table): Runs {
  const { clusterSize, clusterBits, l2EntrySize } = engine.geometry
  const runs = new Runs()
  for (let at = usedEntry(table, 0, l2EntrySize); at < clusterSize; at = usedEntry(table, at + l2EntrySize, l2EntrySize)) {
    const high = table.view.getUint32(at)
    const low = table.view.getUint32(at + 4)
    if ((high & compressedFlag) !== 0) {
      const { offset, length } = decodeCompressed(high, low, clusterBits)
      const first = Math.floor(offset / clusterSize)
      runs.add(first, Math.floor((offset + length - 1) / clusterSize) - first + 1)
    } else {
      const offset = engine.hasDataFile ? 0 : entryOffset(high, low)
      if (offset !== 0) runs.add(offset / clusterSize, 1)
    }
  }
  runs.add(table.offset / clusterSize, 1)
  return runs
}

/**
 * Adds `delta` to the counters of everything `l1` reaches over its first `entries` entries. All or
 * nothing: if a counter overflows or the call is aborted, those already changed are changed back.
 */
export async function adjustTree(engine: Engine, l1: PointerTable, entries: number, delta: number, signal?: AbortSignal): Promise<void> {
  let tables = 0
  const points = new AbortPoints(signal)
  try {
    for await (const table of l2Tables(engine, l1, entries)) {
      await points.pass()
      await engine.allocator.adjustAll(ownedRuns(engine, table).pairs, delta)
      if (delta < 0) {
        engine.l2Tables.forget(table.offset, engine.geometry.clusterSize)
        engine.metadataMap.remove(table.offset, engine.geometry.clusterSize)
      }
      tables++
    }
    if (delta < 0) engine.remapTables()
  } catch (error) {
    await undo(engine, l1, entries, delta, tables)
    throw error
  }
}

async function undo(engine: Engine, l1: PointerTable, entries: number, delta: number, tables: number): Promise<void> {
  if (tables === 0) return
  for await (const table of l2Tables(engine, l1, entries)) {
    await engine.allocator.adjustAll(ownedRuns(engine, table).pairs, -delta)
    if (--tables === 0) return
  }
}

/** Decides the COPIED flag of an entry that refers to a host cluster. */
type CopiedRule = (cluster: number) => boolean | Promise<boolean>

/**
 * Sets the COPIED flags in the L2 tables of `l1` by a rule and writes those that change; the L1 entries
 * are the caller's. Nothing is flushed.
 */
async function setCopied(engine: Engine, l1: PointerTable, entries: number, rule: CopiedRule, signal?: AbortSignal): Promise<void> {
  const points = new AbortPoints(signal)
  for await (const table of l2Tables(engine, l1, entries)) {
    await points.pass()
    const changed = await setTableCopied(engine, table, rule)
    if (changed.length === 0) continue
    engine.l2Tables.forget(table.offset, engine.geometry.clusterSize)
    await engine.host.writeAll(changed)
  }
}

const sector = 4096

async function setTableCopied(engine: Engine, table: L2Table, rule: CopiedRule): Promise<Piece[]> {
  const { clusterSize, l2EntrySize } = engine.geometry
  const changed = new Set<number>()
  for (let at = usedEntry(table, 0, l2EntrySize); at < clusterSize; at = usedEntry(table, at + l2EntrySize, l2EntrySize)) {
    const high = table.view.getUint32(at)
    const low = table.view.getUint32(at + 4)
    const offset = (high & compressedFlag) === 0 ? entryOffset(high, low) : 0
    const answer = offset === 0 ? false : rule(offset / clusterSize)
    const wanted = (answer === true || (answer !== false && (await answer)) ? copiedFlag : 0) >>> 0
    if ((high & copiedFlag) >>> 0 === wanted) continue
    table.view.setUint32(at, ((high & ~copiedFlag) | wanted) >>> 0)
    changed.add(Math.floor(at / sector))
  }
  return [...changed].map((index) => ({
    offset: table.offset + index * sector,
    bytes: table.bytes.subarray(index * sector, Math.min(clusterSize, (index + 1) * sector)),
  }))
}

/**
 * Makes a tree shared: raises its counters, durably, then clears the COPIED flags in its L2 tables,
 * durably. A crash between leaves counters that are too high; what fails or is aborted is undone.
 */
export async function shareTree(engine: Engine, l1: PointerTable, entries: number, signal?: AbortSignal): Promise<void> {
  await adjustTree(engine, l1, entries, 1, signal)
  try {
    await engine.flush()
    await setCopied(engine, l1, entries, () => false, signal)
    await engine.host.flush()
  } catch (error) {
    // where this fails too, counters stay too high: leaks
    if (engine.damage === undefined) await unshareTree(engine, l1, entries).catch(() => undefined)
    throw error
  }
}

/** Gives up a shared tree: lowers its counters, durably, then recomputes COPIED. */
export async function unshareTree(engine: Engine, l1: PointerTable, entries: number): Promise<void> {
  await adjustTree(engine, l1, entries, -1)
  await engine.flush()
  await recomputeCopied(engine)
}

/**
 * Recomputes the COPIED flags of the active layer from the counters, which have to be durable: a flag
 * that promises sole ownership must not reach the disk before the counter is 1 there.
 */
export async function recomputeCopied(engine: Engine): Promise<void> {
  const { l1Table: l1, refcounts } = engine
  const { clusterSize } = engine.geometry
  const isSole = (cluster: number): boolean | Promise<boolean> => {
    const known = refcounts.peek(cluster)
    return known === undefined ? refcounts.get(cluster).then((count) => count === 1) : known === 1
  }
  await setCopied(engine, l1, l1.length, isSole)
  await engine.host.flush()
  for (let index = 0; index < l1.length; index++) {
    const offset = l1.offsetAt(index)
    if (offset === 0) continue
    const wanted = (await isSole(offset / clusterSize)) ? copiedFlag : 0
    if ((l1.high(index) & copiedFlag) >>> 0 !== wanted) l1.set(index, offset, wanted)
  }
  await engine.flush()
}
