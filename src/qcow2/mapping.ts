/**
 * Where the bytes of the guest are: one lookup answers for a whole run of clusters or subclusters.
 * Pure over cached tables; moves no data and changes nothing.
 */
import { zeroLength } from '../bytes/zero.ts'
import type { FormatError } from '../core/errors.ts'
import type { Engine, Layer } from './engine.ts'
import type { Geometry } from './geometry.ts'
import { clusterKind, copiedFlag, decodeCompressed, entryOffset, zeroFlag, compressedFlag } from './l2-entry.ts'
import { maxHostOffset } from './limits.ts'
import { subclusterRun, validSubclusters } from './subcluster.ts'
import type { Slice } from './table-cache.ts'

/** How the bytes of a run are had. */
export type RunKind =
  /** They are at a host offset. */
  | 'data'
  /** They are zeroes, whatever the backing file holds. */
  | 'zero'
  /** The backing file has them; zeroes without one. */
  | 'unallocated'
  /** They are in one compressed cluster. */
  | 'compressed'

/** A run of guest bytes that are had the same way. One object is reused for many lookups. */
export interface Run {
  kind: RunKind
  /** Bytes, from the guest offset asked for. */
  length: number
  /**
   * Host offset of the first byte, contiguous for the whole run; -1 without a host cluster. Zero and
   * unallocated runs have one where space is preallocated. For a compressed cluster the offset of
   * its compressed data.
   */
  host: number
  /** The COPIED flag: host clusters of the run may be written in place. */
  copied: boolean
  /** Upper bound of the compressed data's length in bytes; 0 otherwise. */
  compressedLength: number
  /** After a lookup that failed: host offset of the L2 slice that is not in memory. */
  slice: number
}

/** A run to be filled by `lookup`. */
export function newRun(): Run {
  return { kind: 'unallocated', length: 0, host: -1, copied: false, compressedLength: 0, slice: 0 }
}

/**
 * Describes the bytes from `guest` on, at most `limit` of them, in `run`. The run ends at the latest
 * with the L2 slice it lies in.
 * @returns false if the L2 slice, `run.slice`, has to be loaded first.
 * @throws FormatError `ERR_CORRUPT` for an entry the specification forbids.
 */
export function lookup(engine: Engine, layer: Layer, guest: number, limit: number, run: Run): boolean {
  const { geometry, l2Tables } = engine
  const { bytesPerL1Entry, clusterSize, l2EntrySize } = geometry
  const l1Index = Math.floor(guest / bytesPerL1Entry)
  const inTable = guest - l1Index * bytesPerL1Entry
  const table = layer.l1.offsetAt(l1Index)
  run.compressedLength = 0
  if (table === 0) {
    setEmpty(run, Math.min(limit, emptyLength(layer, l1Index, bytesPerL1Entry, limit) - inTable))
    return true
  }
  if (table % clusterSize !== 0 || table >= maxHostOffset) throw badTable(engine, layer, l1Index, table)
  const index = Math.floor(inTable / clusterSize)
  const entryAt = index * l2EntrySize
  const inSlice = entryAt % l2Tables.sliceSize
  const slice = l2Tables.peek(table + entryAt - inSlice)
  if (slice === undefined) {
    run.slice = table + entryAt - inSlice
    return false
  }
  const inCluster = inTable - index * clusterSize
  if (lookupEmpty(geometry, slice, inSlice, inCluster, limit, run)) return true
  if (geometry.extendedL2) lookupExtended(engine, slice.view, inSlice, guest, inCluster, limit, run)
  else lookupStandard(engine, slice.view, inSlice, guest, inCluster, limit, run)
  return true
}

/** As `lookup`, loading what it needs. */
export async function lookupLoading(engine: Engine, layer: Layer, guest: number, limit: number, run: Run): Promise<void> {
  while (!lookup(engine, layer, guest, limit, run)) await engine.l2Tables.load(run.slice)
}

function setEmpty(run: Run, length: number): void {
  run.kind = 'unallocated'
  run.length = length
  run.host = -1
  run.copied = false
}

/** Guest bytes described by L1 entries without a table, from entry `index` on, as far as `limit` asks. */
function emptyLength(layer: Layer, index: number, bytesPerL1Entry: number, limit: number): number {
  let length = bytesPerL1Entry
  for (let next = index + 1; length < limit + bytesPerL1Entry; next++, length += bytesPerL1Entry) {
    if (next >= layer.l1.length) return Number.MAX_SAFE_INTEGER
    if (layer.l1.offsetAt(next) !== 0) break
  }
  return length
}

/** An empty entry, with those behind it: a large disk has little else, so they are skipped at memory speed. */
function lookupEmpty(geometry: Geometry, slice: Slice, first: number, inCluster: number, limit: number, run: Run): boolean {
  const { clusterSize, l2EntrySize } = geometry
  if ((slice.view.getUint32(first) | slice.view.getUint32(first + 4)) !== 0) return false
  const end = Math.min(slice.bytes.length, first + Math.ceil((inCluster + limit) / clusterSize) * l2EntrySize)
  const entries = Math.floor(zeroLength(slice.bytes, first, end) / l2EntrySize)
  if (entries === 0) return false
  setEmpty(run, Math.min(limit, entries * clusterSize - inCluster))
  return true
}

function lookupStandard(
  engine: Engine,
  view: DataView,
  first: number,
  guest: number,
  inCluster: number,
  limit: number,
  run: Run,
): void {
  const { clusterSize, clusterBits } = engine.geometry
  const high = view.getUint32(first)
  const low = view.getUint32(first + 4)
  if ((high & compressedFlag) !== 0) {
    setCompressed(high, low, clusterBits, clusterSize - inCluster, limit, run)
    return
  }
  const kind = clusterKind(high, low, { extendedL2: false, dataFile: engine.hasDataFile })
  if ((low & zeroFlag) !== 0 && engine.header.version === 2) throw badEntry(engine, guest, 'has the ZERO flag in a version 2 image')
  const offset = entryOffset(high, low)
  const owns = kind === 'normal' || kind === 'zero-allocated'
  if (owns) checkHost(engine, guest - inCluster, offset)
  let length = clusterSize - inCluster
  const zero = low & zeroFlag
  const copied = high & copiedFlag
  let expected = offset + clusterSize
  for (let at = first + 8; length < limit && at < view.byteLength; at += 8, expected += clusterSize) {
    const nextHigh = view.getUint32(at)
    const nextLow = view.getUint32(at + 4)
    if ((nextHigh & compressedFlag) !== 0 || (nextLow & zeroFlag) !== zero || (nextHigh & copiedFlag) !== copied) break
    if (entryOffset(nextHigh, nextLow) !== (owns ? expected : 0)) break
    length += clusterSize
  }
  run.kind = kind === 'normal' ? 'data' : kind === 'unallocated' ? 'unallocated' : 'zero'
  run.length = Math.min(length, limit)
  run.host = owns ? offset + inCluster : -1
  run.copied = owns && copied !== 0
}

function lookupExtended(
  engine: Engine,
  view: DataView,
  first: number,
  guest: number,
  inCluster: number,
  limit: number,
  run: Run,
): void {
  const { clusterSize, clusterBits, subclusterSize } = engine.geometry
  const high = view.getUint32(first)
  const low = view.getUint32(first + 4)
  if ((high & compressedFlag) !== 0) {
    setCompressed(high, low, clusterBits, clusterSize - inCluster, limit, run)
    return
  }
  let length = -(inCluster % subclusterSize)
  let index = Math.floor(inCluster / subclusterSize)
  let host = -1
  for (let at = first; at < view.byteLength && length < limit; at += 16, index = 0) {
    const entry = extendedEntry(engine, view, at, guest + length)
    if (entry === undefined) break
    const next = subclusterRun(entry.zero, entry.alloc, index)
    if (at === first) {
      run.kind = next.kind
      run.copied = entry.copied
      host = entry.offset
      run.host = entry.offset < 0 ? -1 : entry.offset + inCluster
    } else if (next.kind !== run.kind || entry.copied !== run.copied || entry.offset !== host) break
    length += next.count * subclusterSize
    if (index + next.count < 32) break
    if (host >= 0) host += clusterSize
  }
  run.length = Math.min(length, limit)
}

interface ExtendedEntry {
  /** Host offset, -1 without one. */
  readonly offset: number
  readonly copied: boolean
  readonly zero: number
  readonly alloc: number
}

/** Decodes an uncompressed extended entry; undefined if it is compressed. */
function extendedEntry(engine: Engine, view: DataView, at: number, guest: number): ExtendedEntry | undefined {
  const high = view.getUint32(at)
  const low = view.getUint32(at + 4)
  if ((high & compressedFlag) !== 0) return undefined
  const owns = clusterKind(high, low, { extendedL2: true, dataFile: engine.hasDataFile }) === 'normal'
  const offset = owns ? entryOffset(high, low) : -1
  const zero = view.getUint32(at + 8)
  const alloc = view.getUint32(at + 12)
  if (owns) checkHost(engine, Math.floor(guest / engine.geometry.clusterSize) * engine.geometry.clusterSize, offset)
  if (!validSubclusters(owns, zero, alloc)) throw badEntry(engine, guest, 'has an invalid subcluster bitmap')
  return { offset, copied: owns && (high & copiedFlag) !== 0, zero, alloc }
}

function setCompressed(high: number, low: number, clusterBits: number, left: number, limit: number, run: Run): void {
  const { offset, length } = decodeCompressed(high, low, clusterBits)
  run.kind = 'compressed'
  run.length = Math.min(left, limit)
  run.host = offset
  run.copied = false
  run.compressedLength = length
}

function checkHost(engine: Engine, guest: number, offset: number): void {
  if (offset % engine.geometry.clusterSize !== 0 || offset >= maxHostOffset) {
    throw badEntry(engine, guest, `holds ${offset}, not the offset of a cluster`)
  }
  if (engine.hasDataFile && offset !== guest) {
    throw badEntry(engine, guest, `holds ${offset}, but in the external data file a cluster is at its guest offset`)
  }
}

/** An L2 entry that the specification forbids. */
export function badEntry({ host }: Engine, guest: number, what: string): FormatError {
  return host.damaged(`the entry for guest offset ${guest} ${what}`, { structure: 'L2 table' })
}

function badTable({ host }: Engine, layer: Layer, index: number, offset: number): FormatError {
  const location = { structure: 'L1 table', offset: layer.l1.offset + index * 8 }
  return host.damaged(`entry ${index} is ${offset}, not the offset of a cluster`, location)
}
