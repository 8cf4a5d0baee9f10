/**
 * Making an image: the whole layout is known beforehand, so everything is written once with its final
 * counters. Owns the layout of a fresh file and the rules between creation options.
 *
 *   | header | refcount table | refcount blocks | L1 table | L2 tables, data (if preallocated) |
 */
import { zeroContent } from '../block/zero-content.ts'
import { encodeName } from '../bytes/file-name.ts'
import type { EngineState } from './engine.ts'
import { encodeExtensions, extensionType, type Extension } from './extensions.ts'
import { autoclear, compatible, encodeFeatureNames, featureNames, incompatible } from './features.ts'
import { clustersFor, geometryOf, maxDiskSize, refcountClusters, requiredL1Size, tooLarge, type Geometry } from './geometry.ts'
import { encodeHeaderCluster, type CompressionType, type Header, type HeaderCluster } from './header.ts'
import type { HostFile, Piece } from './host-file.ts'
import { copiedFlag, offsetHigh, offsetLow } from './l2-entry.ts'
import { maxBackingFormatName, maxL1Bytes, maxRefcountTableBytes } from './limits.ts'
import { PointerTable, tableBytes } from './pointer-table.ts'
import { refcountLayout } from './refcount-layout.ts'

/** How much of a new image's space is arranged beforehand, as `qemu-img create -o preallocation` has it. */
export type Preallocation =
  /** Nothing. */
  | 'off'
  /** All clusters are mapped; the file is sparse. */
  | 'metadata'
  /** As `metadata`: Node cannot reserve file space without writing it, so zeroes are written, as with `full`. */
  | 'falloc'
  /** All clusters are mapped and zeroes are written. */
  | 'full'

/** The shape of a new image. Defaults are QEMU's. */
export interface LayoutOptions {
  /** Virtual size of the disk in bytes; rounded up to a multiple of 512. */
  readonly size: number
  /** Bytes, a power of two from 512 to 2 MiB. Default 65536. */
  readonly clusterSize?: number | undefined
  /** 2 (`compat=0.10`) or 3 (`compat=1.1`). Default 3. */
  readonly version?: 2 | 3 | undefined
  /** Width of a counter: 1, 2, 4, 8, 16, 32 or 64. Default 16, the only width of version 2. */
  readonly refcountBits?: number | undefined
  /** 32 subclusters in each cluster; clusters of at least 16 KiB. Default false. */
  readonly extendedL2?: boolean | undefined
  /** Allows QEMU to postpone refcount updates. This library keeps refcounts valid all the same. */
  readonly lazyRefcounts?: boolean | undefined
  /** How compressed clusters will be compressed. Default `zlib`. */
  readonly compressionType?: CompressionType | undefined
  /** Default `off`. */
  readonly preallocation?: Preallocation | undefined
  /** The backing file of an overlay. Its format must be named: it is never guessed. */
  readonly backing?: { readonly file: string; readonly format: string } | undefined
  /** Name of the external data file, as it is stored in the image. */
  readonly dataFile?: string | undefined
  /** The data file alone, read as raw, has to have the same content. */
  readonly dataFileRaw?: boolean | undefined
}

/** A layout that was checked against the format's limits. */
export interface Layout {
  readonly geometry: Geometry
  readonly content: HeaderCluster
  /** Offsets in bytes; lengths in clusters. */
  readonly refcountBlocks: { readonly offset: number; readonly clusters: number }
  readonly l1Clusters: number
  /** L2 tables and data, empty without preallocation. */
  readonly l2Tables: { readonly offset: number; readonly clusters: number }
  readonly data: { readonly offset: number; readonly clusters: number }
  /** Clusters in use. */
  readonly clusters: number
  readonly preallocation: Preallocation
}

/**
 * Plans a new image.
 * @throws RangeError for a value outside its range, TypeError for options that exclude each other,
 * Qcow2Error `ERR_RANGE` for a disk too large for the cluster size.
 */
export function planLayout(options: LayoutOptions): Layout {
  const geometry = checkedGeometry(options)
  const size = Math.ceil(options.size / 512) * 512
  const preallocation = options.dataFileRaw === true ? 'metadata' : (options.preallocation ?? 'off')
  checkOptions(options, preallocation)
  const { clusterSize } = geometry
  const l1Size = requiredL1Size(geometry, size)
  const l1Clusters = clustersFor(geometry, l1Size * 8)
  const mapped = preallocation !== 'off'
  const l2Clusters = mapped ? l1Size : 0
  const dataClusters = mapped && options.dataFile === undefined ? clustersFor(geometry, size) : 0
  const others = 1 + l1Clusters + l2Clusters + dataClusters
  const refcounts = refcountClusters(geometry, others)
  if (size > maxDiskSize(geometry) || l1Size * 8 > maxL1Bytes || refcounts.table * clusterSize > maxRefcountTableBytes) {
    throw tooLarge(size, geometry)
  }
  const blocksAt = (1 + refcounts.table) * clusterSize
  const l1At = blocksAt + refcounts.blocks * clusterSize
  const l2At = l1At + l1Clusters * clusterSize
  const header = newHeader(options, geometry, {
    size,
    l1Size,
    l1TableOffset: l1Size > 0 ? l1At : 0,
    refcountTableOffset: clusterSize,
    refcountTableClusters: refcounts.table,
  })
  return {
    geometry,
    content: newContent(options, header),
    refcountBlocks: { offset: blocksAt, clusters: refcounts.blocks },
    l1Clusters,
    l2Tables: { offset: l2At, clusters: l2Clusters },
    data: { offset: l2At + l2Clusters * clusterSize, clusters: dataClusters },
    clusters: others + refcounts.blocks + refcounts.table,
    preallocation,
  }
}

function checkedGeometry(options: LayoutOptions): Geometry {
  const clusterSize = options.clusterSize ?? 65536
  const refcountBits = options.refcountBits ?? 16
  const clusterBits = Math.log2(clusterSize)
  const least = options.extendedL2 === true ? 16384 : 512
  if (!Number.isInteger(clusterBits) || clusterSize < least || clusterSize > 2 << 20) {
    throw new RangeError(`clusterSize must be a power of two from ${least} to 2097152, not ${clusterSize}`)
  }
  const refcountOrder = Math.log2(refcountBits)
  if (!Number.isInteger(refcountOrder) || refcountOrder < 0 || refcountOrder > 6) {
    throw new RangeError(`refcountBits must be 1, 2, 4, 8, 16, 32 or 64, not ${refcountBits}`)
  }
  if (!Number.isSafeInteger(options.size) || options.size < 0) {
    throw new RangeError(`size must be an integer from 0 to 2^53 - 1, not ${options.size}`)
  }
  return geometryOf({ clusterBits, refcountOrder, extendedL2: options.extendedL2 === true })
}

function checkOptions(options: LayoutOptions, preallocation: Preallocation): void {
  const { version = 3, refcountBits = 16, backing, dataFile } = options
  if (backing !== undefined) checkNewBacking(backing)
  if (dataFile !== undefined) checkDataFileName(dataFile)
  const needsV3 = refcountBits !== 16 || options.extendedL2 === true || options.lazyRefcounts === true
  if (version === 2 && (needsV3 || options.compressionType === 'zstd' || options.dataFile !== undefined)) {
    throw new TypeError('version 2 has 16-bit refcounts, standard L2 entries, zlib compression and no data file; use version 3')
  }
  if (options.dataFileRaw === true && options.dataFile === undefined) {
    throw new TypeError('dataFileRaw needs a dataFile')
  }
  if (options.dataFileRaw === true && backing !== undefined) {
    throw new TypeError('a raw data file and a backing file exclude each other')
  }
  if (preallocation !== 'off' && backing !== undefined && options.extendedL2 !== true) {
    throw new TypeError('preallocation would hide the backing file; with extendedL2 it does not')
  }
}

/** @throws TypeError for what cannot be the name of a data file */
export function checkDataFileName(name: string): void {
  if (typeof name !== 'string' || name === '' || name.includes('\0')) throw new TypeError('dataFile must be a name: a string that is not empty and has no NUL')
}

/**
 * Refuses what cannot be the backing file of an image.
 * @throws TypeError, RangeError
 */
export function checkNewBacking(backing: { readonly file: string; readonly format: string }): void {
  const { file, format } = backing as { readonly file?: unknown; readonly format?: unknown }
  if (typeof file !== 'string' || file === '') throw new TypeError("backing must be { file: 'name', format: 'qcow2' or 'raw' }; file is missing")
  if (typeof format !== 'string' || format === '') throw new TypeError(`backing must name the format of ${file}: { file, format: 'qcow2' or 'raw' }; it is never guessed`)
  if (file.includes('\0') || format.includes('\0')) throw new TypeError('a NUL ends a name: neither the backing file nor its format may contain one')
  if (encodeName(format).length > maxBackingFormatName) {
    throw new RangeError(`backing format names have at most ${maxBackingFormatName} bytes: ${format}`)
  }
}

type Placement = Pick<Header, 'size' | 'l1Size' | 'l1TableOffset' | 'refcountTableOffset' | 'refcountTableClusters'>

function newHeader(options: LayoutOptions, geometry: Geometry, placement: Placement): Header {
  const version = options.version ?? 3
  const compressionType = options.compressionType ?? 'zlib'
  return {
    version,
    clusterBits: geometry.clusterBits,
    cryptMethod: 'none',
    snapshotCount: 0,
    snapshotsOffset: 0,
    incompatibleFeatures:
      (options.dataFile === undefined ? 0n : incompatible.dataFile) |
      (compressionType === 'zlib' ? 0n : incompatible.compressionType) |
      (geometry.extendedL2 ? incompatible.extendedL2 : 0n),
    compatibleFeatures: options.lazyRefcounts === true ? compatible.lazyRefcounts : 0n,
    autoclearFeatures: options.dataFileRaw === true ? autoclear.rawDataFile : 0n,
    refcountOrder: geometry.refcountOrder,
    headerLength: version === 2 ? 72 : 112,
    compressionType,
    ...placement,
  }
}

function newContent(options: LayoutOptions, header: Header): HeaderCluster {
  const extensions: Extension[] = []
  const { backing, dataFile } = options
  if (backing !== undefined) extensions.push({ type: extensionType.backingFormat, data: encodeName(backing.format) })
  if (dataFile !== undefined) extensions.push({ type: extensionType.dataFile, data: encodeName(dataFile) })
  if (header.version === 3 && header.clusterBits > 12) {
    extensions.push({ type: extensionType.featureNames, data: encodeFeatureNames(featureNames) })
  }
  const backingFile = backing === undefined ? undefined : encodeName(backing.file)
  const content = { header, extensions, backingFile, unknownFields: new Uint8Array(0) }
  encodeExtensions(extensions)
  encodeHeaderCluster(content) // refuses what does not fit, before anything is written
  return content
}

const pieceBytes = 1 << 20

/** Bytes of the file that a layout takes: to the end of its last structure. */
export function layoutEnd({ geometry, content: { header }, clusters, l1Clusters, l2Tables }: Layout): number {
  const lastIsL1 = l2Tables.clusters === 0
  return lastIsL1 && l1Clusters > 0 ? header.l1TableOffset + header.l1Size * 8 : clusters * geometry.clusterSize
}

/**
 * Makes a place that has content, a device or a file that the caller opened, read as zeroes wherever the layout will lie. The
 * header of an image that was there goes first, and durably: after a crash no old header refers to what is half overwritten.
 */
export async function makeBlank(host: HostFile, layout: Layout): Promise<void> {
  const { device } = host
  if (device.size === 0) return
  if (device.growable) {
    await device.resize(0)
    await device.flush()
    return
  }
  const { clusterSize } = layout.geometry
  const end = Math.min(layout.clusters * clusterSize, device.size)
  // one sector, which goes whole: more could reach into tables of the old image while its header still stands
  await zeroContent(device, 0, Math.min(512, end))
  await device.flush()
  await zeroContent(device, 0, end)
}

/**
 * Writes a planned image where all reads as zeroes: what is left out does. The header comes last, when the rest is
 * durable: before it is written the file is not an image. It is not flushed.
 */
export async function writeLayout(host: HostFile, layout: Layout, order: 'flushed' | 'any'): Promise<void> {
  const { geometry, content, data } = layout
  const pieces = refcountPieces(layout)
  if (layout.preallocation !== 'off') await writeMapping(host, layout)
  await Promise.all([host.writeAll(pieces), host.ensureSize(layoutEnd(layout))])
  if (layout.preallocation === 'falloc' || layout.preallocation === 'full') {
    const zeroes = host.allocate(Math.min(pieceBytes, data.clusters * geometry.clusterSize)).fill(0)
    const stop = data.offset + data.clusters * geometry.clusterSize
    for (let at = data.offset; at < stop; at += zeroes.length) {
      await host.write(at, zeroes.subarray(0, Math.min(zeroes.length, stop - at)))
    }
  }
  if (order === 'flushed') await host.flush()
  await host.write(0, encodeHeaderCluster(content))
}

/** The refcount table, and blocks that count every cluster of the layout once. */
function refcountPieces(layout: Layout): Piece[] {
  const { geometry, refcountBlocks, clusters, content } = layout
  const { clusterSize, refcountsPerBlock } = geometry
  const counters = refcountLayout(geometry.refcountOrder)
  const pieces: Piece[] = [{ offset: content.header.refcountTableOffset, bytes: refcountEntries(layout) }]
  for (let block = 0; block < refcountBlocks.clusters; block++) {
    const used = Math.min(refcountsPerBlock, clusters - block * refcountsPerBlock)
    const bytes = new Uint8Array(Math.ceil((used * counters.bits) / 8))
    for (let i = 0; i < used; i++) counters.set(bytes, i, 1)
    pieces.push({ offset: refcountBlocks.offset + block * clusterSize, bytes })
  }
  return pieces
}

/** The entries in use of the refcount table. */
function refcountEntries(layout: Layout): Uint8Array {
  const { geometry, refcountBlocks } = layout
  const bytes = new Uint8Array(refcountBlocks.clusters * 8)
  const view = new DataView(bytes.buffer)
  for (let block = 0; block < refcountBlocks.clusters; block++) {
    const offset = refcountBlocks.offset + block * geometry.clusterSize
    view.setUint32(block * 8, offsetHigh(offset))
    view.setUint32(block * 8 + 4, offsetLow(offset))
  }
  return bytes
}

/** What opening a fresh image without preallocation would read. */
export function freshState(layout: Layout): EngineState {
  const { content, geometry } = layout
  const { header } = content
  const refcounts = (header.refcountTableClusters * geometry.clusterSize) / 8
  const table = tableBytes(refcounts)
  table.set(refcountEntries(layout))
  return {
    content,
    l1Table: new PointerTable(header.l1TableOffset, header.l1Size),
    refcountTable: new PointerTable(header.refcountTableOffset, refcounts, table),
    snapshots: [],
    snapshotTableLength: 0,
  }
}

/** Maps every cluster to its preallocated place: L1, then one L2 table behind the other. */
async function writeMapping(host: HostFile, layout: Layout): Promise<void> {
  const { geometry, content, l2Tables, data } = layout
  const { clusterSize, l2EntrySize } = geometry
  const hasDataFile = data.clusters === 0
  const guestClusters = clustersFor(geometry, content.header.size)
  const l1 = new Uint8Array(content.header.l1Size * 8)
  const l1View = new DataView(l1.buffer)
  const table = new Uint8Array(clusterSize)
  const view = new DataView(table.buffer)
  for (let index = 0; index < l2Tables.clusters; index++) {
    const offset = l2Tables.offset + index * clusterSize
    l1View.setUint32(index * 8, offsetHigh(offset) + copiedFlag)
    l1View.setUint32(index * 8 + 4, offsetLow(offset))
    table.fill(0)
    for (let entry = 0; entry < geometry.l2Entries; entry++) {
      const cluster = index * geometry.l2Entries + entry
      if (cluster >= guestClusters) break
      const target = (hasDataFile ? 0 : data.offset) + cluster * clusterSize
      view.setUint32(entry * l2EntrySize, offsetHigh(target) + copiedFlag)
      view.setUint32(entry * l2EntrySize + 4, offsetLow(target))
    }
    await host.write(offset, table)
  }
  await host.write(content.header.l1TableOffset, l1)
}
