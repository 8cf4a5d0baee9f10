/**
 * The header (spec "Header") and the rest of cluster 0: extensions and backing file name. Decodes
 * and encodes bytes and checks each field against its own limits; opening files and judging what
 * the fields mean together is done elsewhere.
 *
 *     0  u32  magic "QFI\xfb"            40  u64  l1_table_offset
 *     4  u32  version                    48  u64  refcount_table_offset
 *     8  u64  backing_file_offset        56  u32  refcount_table_clusters
 *    16  u32  backing_file_size          60  u32  nb_snapshots
 *    20  u32  cluster_bits               64  u64  snapshots_offset
 *    24  u64  size                       -- version 3 only --
 *    32  u32  crypt_method               72  u64  incompatible_features
 *    36  u32  l1_size                    80  u64  compatible_features
 *                                        88  u64  autoclear_features
 *                                        96  u32  refcount_order
 *                                       100  u32  header_length
 *                                       104  u8   compression_type, then padding to 112
 */
import { FormatError, type FormatLocation, UnsupportedError } from '../core/errors.ts'
import { readU64, writeU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'
import { decodeBitmapsExtension, decodeExtensions, encodeExtensions, extensionType, findExtension, type Extension } from './extensions.ts'
import { autoclear, decodeFeatureNames, incompatible, refuseUnknownFeatures } from './features.ts'
import { checkShape } from './geometry.ts'
import { maxBackingFileName, maxBitmapDirectoryBytes, maxBitmaps, maxL1Bytes, maxRefcountTableBytes, maxSnapshots } from './limits.ts'

/** Bytes of the part of the header this library knows. */
const knownHeaderLength = 112
const v2HeaderLength = 72
const magic = 0x5146_49fb

/** How compressed clusters are compressed. */
export type CompressionType = 'zlib' | 'zstd'

/** `crypt_method`: 0, 1 (legacy AES-CBC), 2 (LUKS). */
export type CryptMethod = 'none' | 'aes' | 'luks'

/** The fields of the header. Offsets and sizes are bytes unless the name says otherwise. */
export interface Header {
  readonly version: 2 | 3
  /** Length of a cluster is `1 << clusterBits`. */
  readonly clusterBits: number
  /** Virtual size of the disk. */
  readonly size: number
  readonly cryptMethod: CryptMethod
  /** Entries of the active L1 table. */
  readonly l1Size: number
  readonly l1TableOffset: number
  readonly refcountTableOffset: number
  readonly refcountTableClusters: number
  readonly snapshotCount: number
  readonly snapshotsOffset: number
  readonly incompatibleFeatures: bigint
  readonly compatibleFeatures: bigint
  readonly autoclearFeatures: bigint
  readonly refcountOrder: number
  /** 72 in version 2. */
  readonly headerLength: number
  readonly compressionType: CompressionType
}

/** Everything cluster 0 holds. */
export interface HeaderCluster {
  readonly header: Header
  readonly extensions: readonly Extension[]
  /** The backing file name as stored, or undefined without a backing file. */
  readonly backingFile: Uint8Array | undefined
  /** Header bytes from 112 to `headerLength`, which this library does not know and keeps. */
  readonly unknownFields: Uint8Array
}

/** Exceptions that repairing an image needs. */
export interface DecodeHeaderOptions {
  /** Accept a refcount table of no clusters, more snapshots and larger tables than QEMU allows. */
  readonly lenient?: boolean
}

/**
 * Decodes cluster 0. `bytes` holds the first cluster, or what the file has of it: at least 112 bytes
 * (72 for version 2); what lies past the end of the file reads as zeroes.
 * @throws FormatError `ERR_FORMAT` for anything malformed; UnsupportedError for an unknown version,
 * compression type, crypt method or incompatible feature.
 */
export function decodeHeaderCluster(bytes: Uint8Array, options: DecodeHeaderOptions = {}): HeaderCluster {
  const view = viewOf(bytes)
  const version = decodeVersion(view)
  const clusterBits = view.getUint32(20)
  checkShape({ clusterBits, extendedL2: false, refcountOrder: 0 })
  const clusterSize = 2 ** clusterBits
  const v3 = version === 3 ? decodeV3Fields(view, clusterSize) : v2Defaults
  const backing = decodeBackingName(bytes, clusterSize)
  const end = backing === undefined ? clusterSize : backing.offset
  const extensions = end > v3.headerLength ? decodeExtensions(bytes, v3.headerLength, end) : []
  const header: Header = {
    version,
    clusterBits,
    size: readU64(view, 24, at('size', 24)),
    cryptMethod: decodeCryptMethod(view),
    l1Size: view.getUint32(36),
    l1TableOffset: readU64(view, 40, at('l1_table_offset', 40)),
    refcountTableOffset: readU64(view, 48, at('refcount_table_offset', 48)),
    refcountTableClusters: view.getUint32(56),
    snapshotCount: view.getUint32(60),
    snapshotsOffset: readU64(view, 64, at('snapshots_offset', 64)),
    ...v3,
  }
  checkFeatures(header, extensions)
  checkTables(header, options.lenient === true)
  const unknownFields = bytes.slice(Math.min(knownHeaderLength, v3.headerLength), v3.headerLength)
  return { header, extensions, backingFile: backing?.name, unknownFields }
}

const at = (field: string, offset: number): FormatLocation => ({ structure: 'header', field, offset })

/** True if the bytes begin like a qcow2 image (of any version). */
export function hasMagic(bytes: Uint8Array): boolean {
  return bytes.length >= 4 && viewOf(bytes).getUint32(0) === magic
}

function decodeVersion(view: DataView): 2 | 3 {
  if (view.byteLength < 8 || view.getUint32(0) !== magic) {
    throw new FormatError('not a qcow2 image: the magic "QFI\\xfb" is missing', at('magic', 0))
  }
  const version = view.getUint32(4)
  if (version !== 2 && version !== 3) {
    throw new UnsupportedError(`header: version is ${version}, supported are 2 and 3 (offset 4)`, [`version ${version}`])
  }
  if (view.byteLength < (version === 2 ? v2HeaderLength : 104)) {
    throw new FormatError(`the file ends inside the header, after ${view.byteLength} bytes`, { structure: 'header' })
  }
  return version
}

type V3Fields = Pick<
  Header,
  | 'incompatibleFeatures'
  | 'compatibleFeatures'
  | 'autoclearFeatures'
  | 'refcountOrder'
  | 'headerLength'
  | 'compressionType'
>

const v2Defaults: V3Fields = {
  incompatibleFeatures: 0n,
  compatibleFeatures: 0n,
  autoclearFeatures: 0n,
  refcountOrder: 4,
  headerLength: v2HeaderLength,
  compressionType: 'zlib',
}

function decodeV3Fields(view: DataView, clusterSize: number): V3Fields {
  const headerLength = view.getUint32(100)
  if (headerLength < 104 || headerLength > clusterSize) {
    throw new FormatError(`header_length is ${headerLength}, allowed 104 to ${clusterSize}`, at('header_length', 100))
  }
  const compression = headerLength > 104 && view.byteLength > 104 ? view.getUint8(104) : 0
  return {
    incompatibleFeatures: view.getBigUint64(72),
    compatibleFeatures: view.getBigUint64(80),
    autoclearFeatures: view.getBigUint64(88),
    refcountOrder: view.getUint32(96),
    headerLength,
    compressionType: decodeCompressionType(compression),
  }
}

function decodeCompressionType(value: number): CompressionType {
  if (value === 0) return 'zlib'
  if (value === 1) return 'zstd'
  throw new UnsupportedError(`header: compression_type is ${value}, supported are 0 (zlib) and 1 (zstd) (offset 104)`, [
    `compression type ${value}`,
  ])
}

function decodeCryptMethod(view: DataView): CryptMethod {
  const value = view.getUint32(32)
  const method = (['none', 'aes', 'luks'] as const)[value]
  if (method !== undefined) return method
  throw new UnsupportedError(`header: crypt_method is ${value}, known are 0 to 2 (offset 32)`, [`crypt method ${value}`])
}

function decodeBackingName(bytes: Uint8Array, clusterSize: number): { offset: number; name: Uint8Array } | undefined {
  const view = viewOf(bytes)
  const offset = readU64(view, 8, at('backing_file_offset', 8))
  if (offset === 0) return undefined
  if (offset > clusterSize) {
    throw new FormatError(
      `backing_file_offset is ${offset}, past the first cluster of ${clusterSize} bytes`,
      at('backing_file_offset', 8),
    )
  }
  const length = view.getUint32(16)
  const limit = Math.min(maxBackingFileName, clusterSize - offset)
  if (length > limit) {
    throw new FormatError(`backing_file_size is ${length}, at most ${limit} here`, at('backing_file_size', 16))
  }
  if (length === 0) return undefined
  const name = new Uint8Array(length)
  name.set(bytes.subarray(offset, offset + length))
  return { offset, name }
}

function checkFeatures(header: Header, extensions: readonly Extension[]): void {
  const names = findExtension(extensions, extensionType.featureNames)
  refuseUnknownFeatures(header.incompatibleFeatures, names === undefined ? [] : decodeFeatureNames(names))
  checkCryptoPointer(header, extensions)
  checkBitmaps(header, extensions)
  const typed = (header.incompatibleFeatures & incompatible.compressionType) !== 0n
  if (typed !== (header.compressionType !== 'zlib')) {
    throw new FormatError(
      `compression_type is ${header.compressionType}, but the compression type feature bit is ${typed ? 'set' : 'clear'}`,
      at('compression_type', 104),
    )
  }
  checkShape({
    clusterBits: header.clusterBits,
    extendedL2: (header.incompatibleFeatures & incompatible.extendedL2) !== 0n,
    refcountOrder: header.refcountOrder,
  })
}

function checkCryptoPointer({ cryptMethod }: Header, extensions: readonly Extension[]): void {
  if (cryptMethod === 'luks' || findExtension(extensions, extensionType.encryptionHeader) === undefined) return
  throw new FormatError(`there is an encryption header pointer, but crypt_method is ${cryptMethod}`, at('crypt_method', 32))
}

/** What no QEMU opens. While the autoclear bit is clear the content of the extension is stale, and nobody looks at it. */
function checkBitmaps({ autoclearFeatures, clusterBits }: Header, extensions: readonly Extension[]): void {
  const data = findExtension(extensions, extensionType.bitmaps)
  if (data === undefined) return
  const { count, directorySize, directoryOffset } = decodeBitmapsExtension(data)
  const reserved = viewOf(data).getUint32(4)
  if ((autoclearFeatures & autoclear.bitmaps) === 0n) return
  const fail = (field: string, value: number, allowed: string): FormatError =>
    new FormatError(`${field} is ${value}, ${allowed}`, { structure: 'bitmaps extension', field })
  if (count === 0 || count > maxBitmaps) throw fail('nb_bitmaps', count, `allowed 1 to ${maxBitmaps}`)
  if (reserved !== 0) throw fail('reserved32', reserved, 'must be 0')
  if (directorySize === 0 || directorySize > maxBitmapDirectoryBytes) throw fail('bitmap_directory_size', directorySize, `allowed 1 to ${maxBitmapDirectoryBytes}`)
  if (directoryOffset === 0 || directoryOffset % 2 ** clusterBits !== 0) throw fail('bitmap_directory_offset', directoryOffset, 'must be the offset of a cluster')
}

/**
 * A raw data file without a data file is a contradiction. The facts of such an image can be read; its data cannot.
 * @throws FormatError
 */
export function refuseRawWithoutDataFile({ autoclearFeatures, incompatibleFeatures }: Header): void {
  if ((autoclearFeatures & autoclear.rawDataFile) === 0n || (incompatibleFeatures & incompatible.dataFile) !== 0n) return
  throw new FormatError('the raw data file bit is set, but the image has no data file', at('autoclear_features', 88))
}

function checkTables(header: Header, lenient: boolean): void {
  const clusterSize = 2 ** header.clusterBits
  const refcountBytes = header.refcountTableClusters * clusterSize
  if (header.refcountTableClusters === 0 && !lenient) {
    throw new FormatError('refcount_table_clusters is 0, an image has at least 1', at('refcount_table_clusters', 56))
  }
  bound('refcount_table_clusters', 56, header.refcountTableClusters, Math.max(maxRefcountTableBytes, clusterSize) / clusterSize)
  aligned('refcount_table_offset', 48, header.refcountTableOffset, refcountBytes, clusterSize)
  bound('nb_snapshots', 60, header.snapshotCount, lenient ? 2 ** 32 : maxSnapshots)
  if (header.snapshotCount > 0) aligned('snapshots_offset', 64, header.snapshotsOffset, header.snapshotCount * 40, clusterSize)
  bound('l1_size', 36, header.l1Size, maxL1Bytes / 8)
  aligned('l1_table_offset', 40, header.l1TableOffset, header.l1Size * 8, clusterSize)
  const entries = header.incompatibleFeatures & incompatible.extendedL2 ? clusterSize / 16 : clusterSize / 8
  const needed = Math.ceil(header.size / (entries * clusterSize))
  if (header.l1Size < needed) {
    throw new FormatError(`l1_size is ${header.l1Size}, size ${header.size} needs ${needed}`, at('l1_size', 36))
  }
  if (header.l1Size > 0 && header.l1TableOffset === 0) {
    throw new FormatError('l1_table_offset is 0, that is the header', at('l1_table_offset', 40))
  }
}

function bound(field: string, offset: number, value: number, limit: number): void {
  if (value > limit) throw new FormatError(`${field} is ${value}, at most ${limit}`, at(field, offset))
}

function aligned(field: string, offset: number, value: number, length: number, clusterSize: number): void {
  if (value % clusterSize !== 0) {
    throw new FormatError(`${field} is ${value}, not a multiple of the cluster size ${clusterSize}`, at(field, offset))
  }
  if (value + length > Number.MAX_SAFE_INTEGER) {
    throw new FormatError(`${field} is ${value}, the table would end past 2^53`, at(field, offset))
  }
}

/**
 * Encodes cluster 0 up to the end of its last byte in use; the rest of the cluster is zeroes. A
 * version 3 header is written with `header_length` 112, or as long as it was where it was longer.
 * @throws RangeError if header, extensions and backing file name do not fit into one cluster.
 */
export function encodeHeaderCluster(content: HeaderCluster): Uint8Array {
  const { header, backingFile, unknownFields } = content
  const clusterSize = 2 ** header.clusterBits
  const headerLength = header.version === 2 ? v2HeaderLength : knownHeaderLength + unknownFields.length
  const extensions = encodeExtensions(content.extensions)
  const nameOffset = headerLength + extensions.length
  const length = nameOffset + (backingFile?.length ?? 0)
  if (length > clusterSize || (backingFile?.length ?? 0) > maxBackingFileName) {
    throw new RangeError(
      `header, extensions and backing file name take ${length} bytes; they must fit into one cluster of ${clusterSize} bytes, the name into ${maxBackingFileName}`,
    )
  }
  const bytes = new Uint8Array(length)
  const view = viewOf(bytes)
  encodeCommonFields(view, header)
  if (header.version === 3) encodeV3Fields(view, header, headerLength)
  if (header.version === 3) bytes.set(unknownFields, knownHeaderLength)
  bytes.set(extensions, headerLength)
  if (backingFile !== undefined && backingFile.length > 0) {
    writeU64(view, 8, nameOffset)
    view.setUint32(16, backingFile.length)
    bytes.set(backingFile, nameOffset)
  }
  return bytes
}

function encodeCommonFields(view: DataView, header: Header): void {
  view.setUint32(0, magic)
  view.setUint32(4, header.version)
  view.setUint32(20, header.clusterBits)
  writeU64(view, 24, header.size)
  view.setUint32(32, ['none', 'aes', 'luks'].indexOf(header.cryptMethod))
  view.setUint32(36, header.l1Size)
  writeU64(view, 40, header.l1TableOffset)
  writeU64(view, 48, header.refcountTableOffset)
  view.setUint32(56, header.refcountTableClusters)
  view.setUint32(60, header.snapshotCount)
  writeU64(view, 64, header.snapshotsOffset)
}

function encodeV3Fields(view: DataView, header: Header, headerLength: number): void {
  view.setBigUint64(72, header.incompatibleFeatures)
  view.setBigUint64(80, header.compatibleFeatures)
  view.setBigUint64(88, header.autoclearFeatures)
  view.setUint32(96, header.refcountOrder)
  view.setUint32(100, headerLength)
  view.setUint8(104, header.compressionType === 'zstd' ? 1 : 0)
}
