/**
 * How much space an image will need, before it is made: `qemu-img measure`. Pure arithmetic, but for
 * asking a source which of its clusters hold data.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { encodeName } from '../bytes/file-name.ts'
import { bitmapTableSize } from './bitmaps-directory.ts'
import { geometryOf, maxDiskSize, refcountClusters, tooLarge, type Geometry } from './geometry.ts'
import type { BitmapInfo } from './info.ts'

/** The image to be made. Defaults are those of creating one. */
export interface MeasureOptions {
  /** Bytes; default 65536. */
  readonly clusterSize?: number | undefined
  /** Default 16. */
  readonly refcountBits?: number | undefined
  /** 32 subclusters in each cluster. Default false. */
  readonly extendedL2?: boolean | undefined
  /** With `falloc` or `full` all space counts as needed, as it does for an overlay. */
  readonly preallocation?: 'off' | 'metadata' | 'falloc' | 'full' | undefined
  /** The image is an overlay. */
  readonly overlay?: boolean | undefined
  /** It is encrypted with LUKS. */
  readonly luks?: boolean | undefined
  /** Bitmaps that are copied. */
  readonly bitmaps?: readonly BitmapInfo[] | undefined
}

/** Sizes in bytes. */
export interface Measurement {
  /** Upper bound for the file after conversion. */
  readonly required: number
  /** For the file when the guest has written everything. */
  readonly fullyAllocated: number
  /** For bitmaps, besides; 0 without. */
  readonly bitmaps: number
}

/** Bytes of a LUKS1 header with eight slots of 4000 stripes of a 64-byte key. */
export const luksHeaderBytes = 0x1f9000

/**
 * Measures an image of a disk of `size` bytes, of which `dataBytes`, in whole clusters, hold data.
 * @throws Qcow2Error `ERR_RANGE` for a size that clusters of this size cannot address.
 */
export function measureQcow2(size: number, options: MeasureOptions = {}, dataBytes = 0): Measurement {
  const geometry = geometryOf({
    clusterBits: Math.log2(options.clusterSize ?? 65536),
    refcountOrder: Math.log2(options.refcountBits ?? 16),
    extendedL2: options.extendedL2 === true,
  })
  const { clusterSize } = geometry
  if (size > maxDiskSize(geometry)) throw tooLarge(size, geometry)
  const rounded = roundUp(size, clusterSize)
  const luks = options.luks === true ? roundUp(luksHeaderBytes, clusterSize) : 0
  const metadata = metadataBytes(geometry, rounded)
  const everything = options.preallocation === 'falloc' || options.preallocation === 'full' || options.overlay === true
  return {
    required: luks + metadata + (everything ? rounded : dataBytes),
    fullyAllocated: luks + metadata + rounded,
    bitmaps: bitmapsBytes(size, options.bitmaps ?? [], clusterSize),
  }
}

/** Measures the image that converting `source` makes, by the extents of the source. */
export async function measureConversion(source: BlockDevice, options: MeasureOptions & CallOptions = {}): Promise<Measurement> {
  const clusterSize = options.clusterSize ?? 65536
  let data = 0
  let covered = 0
  for await (const extent of source.map({ signal: options.signal })) {
    if (!extent.data || extent.zero) continue
    const start = Math.max(covered, Math.floor(extent.start / clusterSize) * clusterSize)
    const end = roundUp(extent.start + extent.length, clusterSize)
    if (end > start) data += end - start
    covered = Math.max(covered, end)
  }
  return measureQcow2(source.size, options, data)
}

function metadataBytes(geometry: Geometry, size: number): number {
  const { clusterSize, l2Entries, l2EntrySize } = geometry
  const l2Bytes = roundUp(size / clusterSize, l2Entries) * l2EntrySize
  const l1Bytes = roundUp(l2Bytes / clusterSize, clusterSize / 8) * 8
  const others = clusterSize + l2Bytes + l1Bytes
  const { blocks, table } = refcountClusters(geometry, Math.ceil((others + size) / clusterSize))
  return others + (blocks + table) * clusterSize
}

/** Directory, tables and all bits of the bitmaps. */
function bitmapsBytes(size: number, bitmaps: readonly BitmapInfo[], clusterSize: number): number {
  if (bitmaps.length === 0) return 0
  let bytes = 0
  let directory = 0
  for (const { name, granularity } of bitmaps) {
    const clusters = bitmapTableSize(size, Math.log2(granularity), clusterSize)
    bytes += clusters * clusterSize + roundUp(clusters * 8, clusterSize)
    directory += roundUp(24 + encodeName(name).length, 8)
  }
  return bytes + roundUp(directory, clusterSize)
}

function roundUp(value: number, multiple: number): number {
  return Math.ceil(value / multiple) * multiple
}
