/**
 * What `qemu-img info` tells of an image: the facts of its header, its snapshots and bitmaps. Reads
 * only metadata, opens no other file and needs no key.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { withSource, type Source } from '../block/source.ts'
import { decodeLuksHeader, maxLuksArea, type LuksHeader } from '../codec/crypto/luks-header.ts'
import { FormatError } from '../core/errors.ts'
import { decodeBitmapDirectory, refuseMissingTables, bitmapLimits, type BitmapRecord } from './bitmaps-directory.ts'
import { decodeBitmapsExtension, encryptionPointerOf, extensionType, findExtension } from './extensions.ts'
import { autoclear, compatible, incompatible } from './features.ts'
import type { CompressionType, CryptMethod, HeaderCluster } from './header.ts'
import type { HostFile } from './host-file.ts'
import { namesOf } from './names.ts'
import { hostFile, readHeaderCluster } from './open.ts'
import { infoOf, type SnapshotInfo } from './snapshot-info.ts'
import { readSnapshotTable } from './snapshot-list.ts'

/** A dirty bitmap as the image lists it. */
export interface BitmapInfo {
  readonly name: string
  /** Bytes that one bit covers. */
  readonly granularity: number
  /** It was not saved properly; its content must not be used. */
  readonly inUse: boolean
  /** It tracks every change of guest data: enabled. */
  readonly auto: boolean
}

/** The facts about an image. Sizes are bytes. */
export interface ImageInfo {
  /** Of the format. */
  readonly version: 2 | 3
  /** Of the disk, as in the header. */
  readonly virtualSize: number
  readonly clusterSize: number
  /** Width of a reference count. */
  readonly refcountBits: number
  /** How compressed clusters are compressed. */
  readonly compressionType: CompressionType
  /** 32 subclusters in each cluster. */
  readonly extendedL2: boolean
  /** Refcounts are not up to date. */
  readonly dirty: boolean
  /** The image is marked as damaged. */
  readonly corrupt: boolean
  /** QEMU may postpone refcount updates. */
  readonly lazyRefcounts: boolean
  readonly encryption: CryptMethod
  /** The LUKS header, where `encryption` is `luks`. */
  readonly luks: LuksHeader | undefined
  /** Name as stored; bytes that are no UTF-8 are lone surrogates, U+DC80 to U+DCFF. */
  readonly backingFile: string | undefined
  /** As stored. */
  readonly backingFormat: string | undefined
  /** Guest data is in another file. */
  readonly externalData: boolean
  /** Name of that file, where it is stored. */
  readonly dataFile: string | undefined
  /** The data file alone reads as the disk does. */
  readonly dataFileRaw: boolean
  /** Oldest first. */
  readonly snapshots: readonly SnapshotInfo[]
  /** Empty where they are invalid. */
  readonly bitmaps: readonly BitmapInfo[]
  /** The image has bitmaps, and a program that does not know them has changed it since: none can be used any more, and their clusters are leaked. */
  readonly bitmapsInvalid: boolean
}

/**
 * Reads the facts of an image file, which is opened and closed again; a device given stays open.
 * @throws FormatError, UnsupportedError if the header or a table cannot be understood; what `openSource` throws.
 */
export function readImageInfo(source: Source, options: CallOptions & { readonly forceShare?: boolean | undefined } = {}): Promise<ImageInfo> {
  return withSource(source, { ...options, readOnly: true }, infoOfHost)
}

async function infoOfHost(host: BlockDevice): Promise<ImageInfo> {
  const file = hostFile(host)
  const content = await readHeaderCluster(file)
  const { header } = content
  const has = (bit: bigint): boolean => (header.incompatibleFeatures & bit) !== 0n
  const { records } = await readSnapshotTable(file, header)
  return {
    version: header.version,
    virtualSize: header.size,
    clusterSize: 2 ** header.clusterBits,
    refcountBits: 2 ** header.refcountOrder,
    compressionType: header.compressionType,
    extendedL2: has(incompatible.extendedL2),
    dirty: has(incompatible.dirty),
    corrupt: has(incompatible.corrupt),
    lazyRefcounts: (header.compatibleFeatures & compatible.lazyRefcounts) !== 0n,
    encryption: header.cryptMethod,
    luks: header.cryptMethod === 'luks' ? await readLuksHeader(file, content) : undefined,
    ...namesOf(content),
    externalData: has(incompatible.dataFile),
    dataFileRaw: has(incompatible.dataFile) && (header.autoclearFeatures & autoclear.rawDataFile) !== 0n,
    snapshots: records.map(infoOf),
    bitmaps: (await readBitmapRecords(file, content)).map(bitmapInfo),
    bitmapsInvalid: hasInvalidBitmaps(content),
  }
}

async function readLuksHeader(file: HostFile, content: HeaderCluster): Promise<LuksHeader> {
  const [area, offset] = await readLuksArea(file, content)
  return decodeLuksHeader(area, offset)
}

/** The public view of a bitmap's directory entry. */
export function bitmapInfo(record: BitmapRecord): BitmapInfo {
  return { name: record.name, granularity: 2 ** record.granularityBits, inUse: record.inUse, auto: record.auto }
}

/** A program that does not know bitmaps clears their autoclear bit when it opens the image for writing. */
export function hasInvalidBitmaps({ header, extensions }: HeaderCluster): boolean {
  return findExtension(extensions, extensionType.bitmaps) !== undefined && (header.autoclearFeatures & autoclear.bitmaps) === 0n
}

/** The bitmap directory; empty while the autoclear bit says that it is stale. */
export async function readBitmapRecords(file: HostFile, content: HeaderCluster): Promise<BitmapRecord[]> {
  const data = findExtension(content.extensions, extensionType.bitmaps)
  if (data === undefined || (content.header.autoclearFeatures & autoclear.bitmaps) === 0n) return []
  const extension = decodeBitmapsExtension(data)
  const { directorySize, directoryOffset } = extension
  if (directorySize > bitmapLimits.directoryBytes) {
    throw new FormatError(`bitmap_directory_size is ${directorySize}, at most ${bitmapLimits.directoryBytes}`, {
      structure: 'bitmaps extension',
      field: 'bitmap_directory_size',
    })
  }
  const directory = new Uint8Array(directorySize)
  await file.readInto(directoryOffset, directory)
  const records = decodeBitmapDirectory(directory, extension, 2 ** content.header.clusterBits)
  refuseMissingTables(records)
  return records
}

/** The LUKS header and key material, and where they are. */
export async function readLuksArea(file: HostFile, content: HeaderCluster): Promise<[area: Uint8Array, offset: number]> {
  const { offset, length } = encryptionPointerOf(content.extensions)
  if (length > maxLuksArea || offset % 2 ** content.header.clusterBits !== 0) {
    const detail = `${length} bytes at ${offset}: at most ${maxLuksArea}, at the start of a cluster`
    throw new FormatError(detail, { structure: 'encryption header pointer' })
  }
  const area = new Uint8Array(length)
  await file.readInto(offset, area)
  return [area, offset]
}
