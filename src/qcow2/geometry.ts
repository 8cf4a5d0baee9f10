/**
 * Address arithmetic: which table entry describes a guest byte, which counter belongs to a host
 * cluster. Pure; knows nothing of table contents or of I/O.
 *
 *   guest offset  = | l1 index | l2 index | offset in cluster |
 *   host cluster  = | refcount table index | index in refcount block |
 */
import { FormatError, Qcow2Error } from '../core/errors.ts'
import { maxClusterBits, maxL1Bytes, minClusterBits, minExtendedClusterBits } from './limits.ts'

/** Subclusters in a cluster with extended L2 entries. */
const subclustersPerCluster = 32

/** What a header says about the shape of an image. */
export interface Shape {
  readonly clusterBits: number
  readonly extendedL2: boolean
  /** Counters are `1 << refcountOrder` bits wide. */
  readonly refcountOrder: number
}

/** All sizes that follow from a {@link Shape}. Sizes are bytes unless the name says entries. */
export interface Geometry extends Shape {
  readonly clusterSize: number
  /** 8, or 16 with extended L2 entries. */
  readonly l2EntrySize: number
  /** Entries of one L2 table. */
  readonly l2Entries: number
  /** Guest bytes one L1 entry describes. */
  readonly bytesPerL1Entry: number
  /** 32 with extended L2 entries, else 1. */
  readonly subclusters: number
  /** Equal to the cluster size without extended L2 entries. */
  readonly subclusterSize: number
  readonly refcountBits: number
  /** Counters of one refcount block. */
  readonly refcountsPerBlock: number
  /** Host bytes whose clusters one refcount block counts. */
  readonly bytesPerRefcountBlock: number
}

/**
 * The geometry of an image.
 * @throws FormatError if the shape is outside what the format and QEMU allow.
 */
export function geometryOf(shape: Shape): Geometry {
  checkShape(shape)
  const { clusterBits, extendedL2, refcountOrder } = shape
  const clusterSize = 2 ** clusterBits
  const l2EntrySize = extendedL2 ? 16 : 8
  const l2Entries = clusterSize / l2EntrySize
  const subclusters = extendedL2 ? subclustersPerCluster : 1
  const refcountBits = 2 ** refcountOrder
  const refcountsPerBlock = (clusterSize * 8) / refcountBits
  return {
    clusterBits,
    extendedL2,
    refcountOrder,
    clusterSize,
    l2EntrySize,
    l2Entries,
    bytesPerL1Entry: clusterSize * l2Entries,
    subclusters,
    subclusterSize: clusterSize / subclusters,
    refcountBits,
    refcountsPerBlock,
    bytesPerRefcountBlock: refcountsPerBlock * clusterSize,
  }
}

/** Throws a FormatError unless the shape is allowed. */
export function checkShape(shape: Shape): void {
  const { clusterBits, extendedL2, refcountOrder } = shape
  const least = extendedL2 ? minExtendedClusterBits : minClusterBits
  if (!(clusterBits >= least && clusterBits <= maxClusterBits)) {
    const reason = extendedL2 ? ' with extended L2 entries' : ''
    throw new FormatError(`cluster_bits is ${clusterBits}, allowed ${least} to ${maxClusterBits}${reason}`, {
      structure: 'header',
      field: 'cluster_bits',
      offset: 20,
    })
  }
  if (!(refcountOrder >= 0 && refcountOrder <= 6)) {
    throw new FormatError(`refcount_order is ${refcountOrder}, allowed 0 to 6`, {
      structure: 'header',
      field: 'refcount_order',
      offset: 96,
    })
  }
}

/** Index of the L1 entry that describes a guest offset. */
export function l1Index(geometry: Geometry, guest: number): number {
  return Math.floor(guest / geometry.bytesPerL1Entry)
}

/** Index of the L2 entry, within its table, that describes a guest offset. */
export function l2Index(geometry: Geometry, guest: number): number {
  return Math.floor((guest - l1Index(geometry, guest) * geometry.bytesPerL1Entry) / geometry.clusterSize)
}

/** Clusters that `bytes` bytes need. */
export function clustersFor(geometry: Geometry, bytes: number): number {
  return Math.ceil(bytes / geometry.clusterSize)
}

/** L1 entries a disk of `size` bytes needs. */
export function requiredL1Size(geometry: Geometry, size: number): number {
  return Math.ceil(size / geometry.bytesPerL1Entry)
}

/** The largest disk the format can address with this geometry, in bytes. */
export function maxDiskSize(geometry: Geometry): number {
  return Math.min((maxL1Bytes / 8) * geometry.bytesPerL1Entry, Number.MAX_SAFE_INTEGER)
}

/** A disk of `size` bytes is more than {@link maxDiskSize}. */
export function tooLarge(size: number, geometry: Geometry): Qcow2Error {
  return new Qcow2Error('ERR_RANGE', `size is ${size} bytes; with clusters of ${geometry.clusterSize} bytes at most ${maxDiskSize(geometry)}, larger clusters allow more`)
}

/**
 * The guest offset at which VM state begins for a disk of `size` bytes: the first byte of the first
 * L1 entry that describes no guest data.
 */
export function vmStateBase(geometry: Geometry, size: number): number {
  return requiredL1Size(geometry, size) * geometry.bytesPerL1Entry
}

/** Clusters of refcount structures. */
export interface RefcountClusters {
  readonly blocks: number
  readonly table: number
}

/**
 * Refcount blocks and refcount table clusters that an image needs whose other clusters number
 * `clusters`: they count themselves too, so this is the least fixed point.
 */
export function refcountClusters(geometry: Geometry, clusters: number): RefcountClusters {
  let blocks = 0
  let table = 0
  for (;;) {
    const neededBlocks = Math.ceil((clusters + table + blocks) / geometry.refcountsPerBlock)
    const neededTable = Math.ceil(neededBlocks / (geometry.clusterSize / 8))
    if (neededBlocks === blocks && neededTable === table) return { blocks, table }
    blocks = neededBlocks
    table = neededTable
  }
}
