/**
 * Writing the active layer: in place where the host cluster is ours alone, else to a new cluster
 * together with what has to be copied around the payload.
 *
 * Order within one request: payload and copied bytes are written first, then the L2 entry changes in
 * memory. So a reader sees the old bytes or the new, and `write-back.ts`, which flushes data before
 * it writes L2 tables, never makes an entry durable before its data.
 */
import { AbortPoints } from '../core/abort-points.ts'
import type { Release } from '../core/lock.ts'
import { clusterState, touchedSubclusters, type ClusterState } from './cluster-state.ts'
import { writeEncrypted } from './encrypted.ts'
import type { Engine } from './engine.ts'
import { InFlight } from '../core/in-flight.ts'
import { withEntry, type EntryPlace } from './l2-tables.ts'
import { linkClusters } from './link.ts'
import { lookup, lookupLoading, newRun } from './mapping.ts'
import { readLayer } from './read.ts'

const scratch = newRun()
const maxPieces = 16
/** Up to this size payload and copied bytes are joined into one request. */
const joinLimit = 1 << 20

/** Stores `source` in the active layer; aborted, a part of it. */
export function writeActive(engine: Engine, guest: number, source: Uint8Array, signal?: AbortSignal): Promise<void> {
  try {
    engine.assertSound()
    if (!engine.untouched && lookup(engine, engine.active, guest, source.length, scratch)) {
      const { kind, copied, length, host } = scratch
      if (kind === 'data' && copied && length === source.length) {
        // what is encrypted may take the rest of a sector along, and in a raw data file zeroes are written as well
        const alone = engine.cipher !== undefined || engine.rawDataFile
        if (!alone) return writeData(engine, guest, host, source)
        const release = tryLockClusters(engine, guest, source.length)
        if (release !== undefined) return writeData(engine, guest, host, source).finally(release)
      }
    }
  } catch (error) {
    return Promise.reject(error)
  }
  return writeSlow(engine, guest, source, signal)
}

async function writeSlow(engine: Engine, guest: number, source: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
  if (engine.untouched) await engine.touch()
  await lockClusters(engine, guest, source.length, () => writeLocked(engine, guest, source, signal))
}

function tryLockClusters(engine: Engine, guest: number, length: number): Release | undefined {
  const { clusterSize } = engine.geometry
  return engine.clusterLocks.tryAcquire(Math.floor(guest / clusterSize), Math.ceil((guest + length) / clusterSize))
}

/** Runs `task` while nothing else changes the mapping of the clusters of a guest range. */
export async function lockClusters(engine: Engine, guest: number, length: number, task: () => Promise<void>): Promise<void> {
  const { clusterSize } = engine.geometry
  const release = await engine.clusterLocks.acquire(Math.floor(guest / clusterSize), Math.ceil((guest + length) / clusterSize))
  try {
    await task()
  } finally {
    release()
  }
}

/** Stores `source`; the caller holds the locks of its clusters. */
export async function writeLocked(engine: Engine, guest: number, source: Uint8Array, signal?: AbortSignal): Promise<void> {
  const pieces = new InFlight()
  const points = new AbortPoints(signal)
  try {
    for (let at = 0; at < source.length; ) {
      const turn = points.pass()
      if (turn !== undefined) await turn
      at += await startPiece(engine, guest + at, source.subarray(at), pieces)
      if (pieces.count >= maxPieces) await pieces.settle(maxPieces / 2)
    }
  } finally {
    await pieces.settle()
  }
}

/** Starts writing the longest start of `source` that can be written in one way; returns its length. */
async function startPiece(engine: Engine, guest: number, source: Uint8Array, pieces: InFlight): Promise<number> {
  const { clusterSize } = engine.geometry
  const plan = await withEntry(engine, guest, (place) => planPiece(engine, place, guest, source.length))
  const inCluster = guest % clusterSize
  if (plan.action === 'in place') {
    pieces.add(writeData(engine, guest, plan.host + inCluster, source.subarray(0, plan.length)))
    return plan.length
  }
  const run = plan.action === 'reuse' ? undefined : await engine.allocator.allocate(plan.clusters)
  const length = run === undefined ? plan.length : Math.min(plan.length, run.clusters * clusterSize - inCluster)
  const host = run === undefined ? plan.host : run.offset
  const spanEnd = length === plan.length ? plan.spanEnd : guest + length
  const piece = { guest, source: source.subarray(0, length), host, spanStart: plan.spanStart, spanEnd }
  // what was never written reads as zeroes from the file, but not through a cipher
  const writing = writeAndLink(engine, piece, run?.pristine === true && engine.cipher === undefined)
  pieces.add(run === undefined ? writing : writing.catch((error: unknown) => {
    // nothing refers to the new clusters
    engine.allocator.free(run.offset, run.clusters * clusterSize)
    throw error
  }))
  return length
}

/** How a piece can be written. */
type Action =
  /** The mapping stays as it is. */
  | 'in place'
  /** The host clusters stay, their entries change. */
  | 'reuse'
  /** To new host clusters. */
  | 'allocate'

/** A stretch of the payload that is written in one way, and what has to be copied around it. */
interface Plan {
  readonly action: Action
  /** Bytes of the payload. */
  readonly length: number
  readonly clusters: number
  /** Host offset of the first cluster, unless it is still to be allocated. */
  readonly host: number
  /** Guest bytes `[spanStart, spanEnd)` have to be valid in the host clusters afterwards. */
  readonly spanStart: number
  readonly spanEnd: number
}

function planPiece(engine: Engine, place: EntryPlace, guest: number, length: number): Plan {
  const { clusterSize, l2EntrySize } = engine.geometry
  const { view } = place.slice
  const inCluster = guest % clusterSize
  const first = clusterState(engine, view, place.at, guest)
  const firstEnd = Math.min(clusterSize, inCluster + length)
  const action = actionFor(engine, first, inCluster, firstEnd)
  let planned = firstEnd - inCluster
  let clusters = 1
  let last = first
  for (let at = place.at + l2EntrySize; planned < length && at < view.byteLength; at += l2EntrySize) {
    const next = clusterState(engine, view, at, guest + planned)
    const end = Math.min(clusterSize, length - planned)
    if (actionFor(engine, next, 0, end) !== action) break
    if (action !== 'allocate' && next.host !== first.host + clusters * clusterSize) break
    planned += end
    clusters++
    last = next
  }
  const start = guest - inCluster
  const lastStart = start + (clusters - 1) * clusterSize
  const spanStart = start + span(engine, first, action, inCluster, firstEnd).from
  const spanEnd = lastStart + span(engine, last, action, Math.max(0, guest - lastStart), guest + planned - lastStart).to
  return { action, length: planned, clusters, host: first.host, spanStart, spanEnd }
}

function actionFor(engine: Engine, state: ClusterState, from: number, to: number): Action {
  if (!state.copied || state.host < 0) return 'allocate'
  return (touchedSubclusters(engine, from, to) & ~state.alloc) === 0 ? 'in place' : 'reuse'
}

/**
 * The bytes of a cluster that must be written if the payload is `[from, to)` of it. Subclusters that
 * stay where they are are not written around the payload: other requests may be writing them.
 */
function span(engine: Engine, state: ClusterState, action: Action, from: number, to: number): { from: number; to: number } {
  const { clusterSize, subclusterSize } = engine.geometry
  if (state.kind === 'compressed') return { from: 0, to: clusterSize }
  let first = Math.floor(from / subclusterSize)
  let end = Math.ceil(to / subclusterSize)
  if (action === 'reuse') {
    const keeps = (index: number): boolean => ((state.alloc >>> index) & 1) !== 0
    return { from: keeps(first) ? from : first * subclusterSize, to: keeps(end - 1) ? to : end * subclusterSize }
  }
  if (state.alloc !== 0) {
    first = Math.min(first, 31 - Math.clz32(state.alloc & -state.alloc))
    end = Math.max(end, 32 - Math.clz32(state.alloc))
  }
  return { from: first * subclusterSize, to: end * subclusterSize }
}

/** A piece with its place. */
interface Piece {
  readonly guest: number
  readonly source: Uint8Array
  /** Host offset of the cluster that holds `guest`. */
  readonly host: number
  readonly spanStart: number
  readonly spanEnd: number
}

/** Writes payload and copied bytes, then changes the entries. */
async function writeAndLink(engine: Engine, piece: Piece, pristine: boolean): Promise<void> {
  const { guest, source, host, spanStart, spanEnd } = piece
  const { clusterSize } = engine.geometry
  const end = guest + source.length
  const start = guest - (guest % clusterSize)
  const copies = spanStart < guest || end < spanEnd
  if (!copies || (pristine && (await readsZero(engine, spanStart, guest)) && (await readsZero(engine, end, spanEnd)))) {
    await writeData(engine, guest, host + guest - start, source)
  } else {
    await writeSpan(engine, piece)
  }
  await linkClusters(engine, { from: guest, to: end, host })
}

/** Writes `[spanStart, spanEnd)`: the payload, and around it what the guest reads there now. */
async function writeSpan(engine: Engine, piece: Piece): Promise<void> {
  const { guest, source, host, spanStart, spanEnd } = piece
  const { clusterSize } = engine.geometry
  const end = guest + source.length
  const start = guest - (guest % clusterSize)
  // a long payload is not copied: only its first and last cluster are joined with what is around them
  const long = spanEnd - spanStart > joinLimit
  const headEnd = long && spanStart < guest ? start + clusterSize : long ? guest : spanEnd
  const tailStart = !long ? spanEnd : end < spanEnd ? end - (end % clusterSize) : end
  const writes = new InFlight()
  if (headEnd > spanStart) writes.add(writeJoined(engine, piece, spanStart, headEnd))
  if (tailStart > headEnd) {
    const middle = source.subarray(headEnd - guest, tailStart - guest)
    writes.add(writeData(engine, headEnd, host + headEnd - start, middle))
  }
  if (spanEnd > tailStart) writes.add(writeJoined(engine, piece, tailStart, spanEnd))
  await writes.settle()
}

/** Writes the guest bytes `[from, to)`, of which the payload covers a part. */
async function writeJoined(engine: Engine, piece: Piece, from: number, to: number): Promise<void> {
  const { guest, source, host } = piece
  const end = guest + source.length
  const bytes = engine.host.allocate(to - from)
  const reads = new InFlight()
  if (from < guest) reads.add(readCurrent(engine, from, bytes.subarray(0, guest - from)))
  if (end < to) reads.add(readCurrent(engine, end, bytes.subarray(end - from)))
  await reads.settle()
  const first = Math.max(from, guest)
  bytes.set(source.subarray(first - guest, Math.min(to, end) - guest), first - from)
  await writeData(engine, from, host + from - (guest - (guest % engine.geometry.clusterSize)), bytes)
}

/** What the guest reads now; past the end of the disk there are zeroes, whatever a backing file has there. */
function readCurrent(engine: Engine, guest: number, target: Uint8Array): Promise<void> {
  const inside = Math.max(0, Math.min(target.length, engine.header.size - guest))
  target.fill(0, inside)
  return inside === 0 ? Promise.resolve() : readLayer(engine, engine.active, guest, target.subarray(0, inside))
}

/** True if the guest bytes `[from, to)` are known to be zeroes without reading data. */
export async function readsZero(engine: Engine, from: number, to: number): Promise<boolean> {
  const run = newRun()
  const end = Math.min(to, engine.header.size)
  for (let at = from; at < end; at += run.length) {
    await lookupLoading(engine, engine.active, at, end - at, run)
    if (run.kind === 'data' || run.kind === 'compressed') return false
    if (run.kind === 'unallocated' && engine.backing !== undefined && at < engine.backing.size) return false
  }
  return true
}

/** Stores bytes at a host offset, unless metadata is there. */
export function writeData(engine: Engine, guest: number, host: number, source: Uint8Array): Promise<void> {
  if (!engine.hasDataFile && engine.metadataMap.overlaps(host, source.length)) {
    const where = { structure: 'L2 table', offset: host }
    const detail = `the entry for guest offset ${guest} points at metadata; the write was stopped`
    return engine.corrupt(engine.host.damaged(detail, where))
  }
  const { cipher } = engine
  return cipher === undefined ? engine.data.write(host, source) : writeEncrypted(engine, cipher, guest, host, source)
}
