/**
 * What one L2 entry of the active layer says, in the terms a writer thinks in. A standard entry is
 * treated as one subcluster as large as the cluster.
 */
import type { Engine } from './engine.ts'
import { clusterKind, copiedFlag, decodeCompressed, entryOffset, type ClusterKind } from './l2-entry.ts'
import { maxHostOffset } from './limits.ts'
import { badEntry } from './mapping.ts'
import { subclusterMask, validSubclusters } from './subcluster.ts'

/** One L2 entry, decoded. */
export interface ClusterState {
  readonly kind: ClusterKind
  /** Host offset of the cluster, or of its compressed data; -1 without one. */
  readonly host: number
  /** Bytes of host space from `host` on that the entry owns a reference to. */
  readonly hostLength: number
  /** The host cluster is ours alone. */
  readonly copied: boolean
  /** Bits of the subclusters that read as zeroes. */
  readonly zero: number
  /** Bits of the subclusters whose data is in the host cluster. */
  readonly alloc: number
}

/**
 * Decodes the entry at byte `at` of an L2 slice; `guest` lies in the cluster it describes.
 * @throws FormatError `ERR_CORRUPT` for an entry the specification forbids.
 */
export function clusterState(engine: Engine, view: DataView, at: number, guest: number): ClusterState {
  const { geometry, hasDataFile } = engine
  const { clusterSize, extendedL2 } = geometry
  const high = view.getUint32(at)
  const low = view.getUint32(at + 4)
  const kind = clusterKind(high, low, { extendedL2, dataFile: hasDataFile })
  if (kind === 'compressed') {
    const { offset, length } = decodeCompressed(high, low, geometry.clusterBits)
    return { kind, host: offset, hostLength: length, copied: false, zero: 0, alloc: 0 }
  }
  const owns = kind === 'normal' || kind === 'zero-allocated'
  const start = Math.floor(guest / clusterSize) * clusterSize
  const host = owns ? entryOffset(high, low) : hasDataFile ? start : -1
  if (owns) checkOffset(engine, host, start)
  const zero = extendedL2 ? view.getUint32(at + 8) : kind === 'zero-plain' || kind === 'zero-allocated' ? 1 : 0
  const alloc = extendedL2 ? view.getUint32(at + 12) : kind === 'normal' ? 1 : 0
  if (extendedL2 && !validSubclusters(owns, zero, alloc)) throw badEntry(engine, guest, 'has an invalid subcluster bitmap')
  const copied = hasDataFile || (owns && (high & copiedFlag) !== 0)
  return { kind, host, hostLength: owns && !hasDataFile ? clusterSize : 0, copied, zero, alloc }
}

function checkOffset(engine: Engine, host: number, guest: number): void {
  if (host % engine.geometry.clusterSize !== 0 || host >= maxHostOffset || (engine.hasDataFile && host !== guest)) {
    throw badEntry(engine, guest, `holds ${host}, not an offset its cluster can have`)
  }
}

/** Bits of the subclusters that the bytes `[from, to)` of a cluster touch. */
export function touchedSubclusters(engine: Engine, from: number, to: number): number {
  const { subclusterSize } = engine.geometry
  const first = Math.floor(from / subclusterSize)
  return subclusterMask(first, Math.ceil(to / subclusterSize) - first)
}

/** Bits of all subclusters of a cluster. */
export function allSubclusters(engine: Engine): number {
  return subclusterMask(0, engine.geometry.subclusters)
}
