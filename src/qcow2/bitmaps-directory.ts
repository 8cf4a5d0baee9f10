/**
 * The bitmap directory and bitmap tables (spec "Bitmaps"): decode and encode. Pure; knows nothing of
 * where they are stored or of the bits themselves.
 *
 *   directory entry, padded to a multiple of 8:
 *    0  u64  bitmap table offset           16  u8   type, 1: dirty tracking
 *    8  u32  bitmap table size, entries    17  u8   granularity bits
 *   12  u32  flags: 0 in_use, 1 auto,      18  u16  name length
 *            2 extra data compatible       20  u32  extra data length
 *   24       extra data, then name
 *
 *   table entry:  63..56 reserved  |  55..9 host cluster offset  |  8..1 reserved  |  0: all ones, if offset is 0
 */
import { decodeName, encodeName } from '../bytes/file-name.ts'
import { readU64, writeU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'
import { FormatError } from '../core/errors.ts'
import type { BitmapsExtension } from './extensions.ts'
import { maxBitmapDirectoryBytes, maxBitmaps } from './limits.ts'

const fixedLength = 24
const inUseFlag = 1
const autoFlag = 2
const dirtyTracking = 1

/** The limits QEMU enforces. */
export const bitmapLimits: Readonly<
  Record<'count' | 'directoryBytes' | 'tableEntries' | 'bitmapBytes' | 'minGranularityBits' | 'maxGranularityBits' | 'nameBytes', number>
> = {
  count: maxBitmaps,
  directoryBytes: maxBitmapDirectoryBytes,
  tableEntries: 0x800_0000,
  /** Bytes of one bitmap. */
  bitmapBytes: 512 * 1024 * 1024,
  minGranularityBits: 9,
  maxGranularityBits: 31,
  nameBytes: 1023,
}

/** One entry of the bitmap directory. */
export interface BitmapRecord {
  readonly name: string
  /** Host offset of the bitmap table, in bytes. */
  readonly tableOffset: number
  /** Entries of the bitmap table. */
  readonly tableSize: number
  /** Not saved properly: the content must not be used. */
  readonly inUse: boolean
  /** Tracks every change of guest data. */
  readonly auto: boolean
  /** One bit covers `1 << granularityBits` bytes. */
  readonly granularityBits: number
}

/**
 * Decodes a whole directory.
 * @throws FormatError if it is malformed, or uses what QEMU refuses (extra data, unknown flags or types).
 */
export function decodeBitmapDirectory(directory: Uint8Array, extension: BitmapsExtension, clusterSize: number): BitmapRecord[] {
  const view = viewOf(directory)
  const records: BitmapRecord[] = []
  const names = new Set<string>()
  const most = Math.min(extension.count, bitmapLimits.count)
  let at = 0
  while (at < directory.length) {
    const fail = (detail: string, field: string): FormatError =>
      new FormatError(`${field} ${detail}`, { structure: 'bitmap directory', field, offset: extension.directoryOffset + at })
    if (at + fixedLength > directory.length) throw fail('is cut short', 'entry')
    if (records.length >= most) throw fail(`is one more than the ${extension.count} of the header, or than ${bitmapLimits.count}`, 'entry')
    const flags = view.getUint32(at + 12)
    const type = view.getUint8(at + 16)
    const granularityBits = view.getUint8(at + 17)
    const nameLength = view.getUint16(at + 18)
    const extraLength = view.getUint32(at + 20)
    const end = at + fixedLength + extraLength + nameLength
    if (end > directory.length) throw fail('is cut short', 'entry')
    if ((flags & ~(inUseFlag | autoFlag)) !== 0) throw fail(`is 0x${flags.toString(16)}, bits 2 to 31 are not supported`, 'flags')
    if (extraLength !== 0) throw fail(`is ${extraLength}, extra data is not supported`, 'extra_data_size')
    if (type !== dirtyTracking) throw fail(`is ${type}, only 1 (dirty tracking) is known`, 'type')
    if (nameLength < 1 || nameLength > bitmapLimits.nameBytes) throw fail(`is ${nameLength}, allowed 1 to 1023`, 'name_size')
    if (granularityBits < bitmapLimits.minGranularityBits || granularityBits > bitmapLimits.maxGranularityBits) {
      throw fail(`is ${granularityBits}, allowed 9 to 31`, 'granularity_bits')
    }
    const tableOffset = readU64(view, at, { structure: 'bitmap directory', field: 'bitmap_table_offset' })
    if (tableOffset % clusterSize !== 0) throw fail(`is ${tableOffset}, not a multiple of ${clusterSize}`, 'bitmap_table_offset')
    const tableSize = view.getUint32(at + 8)
    const mostEntries = Math.min(bitmapLimits.tableEntries, bitmapLimits.bitmapBytes / clusterSize)
    if (tableSize > mostEntries) throw fail(`is ${tableSize}, at most ${mostEntries}`, 'bitmap_table_size')
    const name = decodeName(directory.subarray(end - nameLength, end))
    if (names.has(name)) throw fail(`${JSON.stringify(name)} occurs twice`, 'name')
    names.add(name)
    records.push({ name, tableOffset, tableSize, inUse: (flags & inUseFlag) !== 0, auto: (flags & autoFlag) !== 0, granularityBits })
    at = Math.ceil(end / 8) * 8
  }
  if (records.length !== extension.count) {
    throw new FormatError(`holds ${records.length} bitmaps, the header says ${extension.count}`, {
      structure: 'bitmap directory',
      offset: extension.directoryOffset,
    })
  }
  return records
}

/**
 * A bitmap has a table, and it is not in the header: nothing opens an image that says otherwise.
 * @throws FormatError
 */
export function refuseMissingTables(records: readonly BitmapRecord[]): void {
  const bad = records.find(({ tableSize, tableOffset }) => tableSize === 0 || tableOffset === 0)
  if (bad === undefined) return
  const field = bad.tableSize === 0 ? 'bitmap_table_size' : 'bitmap_table_offset'
  throw new FormatError(`${field} of bitmap ${JSON.stringify(bad.name)} is 0`, { structure: 'bitmap directory', field })
}

/** Encodes a directory. */
export function encodeBitmapDirectory(records: readonly BitmapRecord[]): Uint8Array {
  const names = records.map((record) => encodeName(record.name))
  const lengths = names.map((name) => Math.ceil((fixedLength + name.length) / 8) * 8)
  const directory = new Uint8Array(lengths.reduce((sum, length) => sum + length, 0))
  const view = viewOf(directory)
  let at = 0
  records.forEach((record, index) => {
    writeU64(view, at, record.tableOffset)
    view.setUint32(at + 8, record.tableSize)
    view.setUint32(at + 12, (record.inUse ? inUseFlag : 0) | (record.auto ? autoFlag : 0))
    view.setUint8(at + 16, dirtyTracking)
    view.setUint8(at + 17, record.granularityBits)
    view.setUint16(at + 18, names[index]!.length)
    directory.set(names[index]!, at + fixedLength)
    at += lengths[index]!
  })
  return directory
}

/** What one entry of a bitmap table says of its part of the bitmap. */
export type BitmapTableEntry = number | 'zeroes' | 'ones' | 'invalid'

/** Decodes table entry `index`: the host offset of a cluster of bits, or what all its bits are. */
export function decodeBitmapTableEntry(table: DataView, index: number, clusterSize: number): BitmapTableEntry {
  const high = table.getUint32(index * 8)
  const low = table.getUint32(index * 8 + 4)
  const offset = (high & 0x00ff_ffff) * 0x1_0000_0000 + ((low & 0xffff_fe00) >>> 0)
  const ones = (low & 1) !== 0
  const valid = (high & 0xff00_0000) === 0 && (low & 0x1fe) === 0 && offset % clusterSize === 0 && (offset === 0 || !ones)
  if (!valid) return 'invalid'
  return offset !== 0 ? offset : ones ? 'ones' : 'zeroes'
}

/** Table entries that a bitmap of a disk of `size` bytes needs. */
export function bitmapTableSize(size: number, granularityBits: number, clusterSize: number): number {
  return Math.ceil(bitmapBytes(size, granularityBits) / clusterSize)
}

/** Bytes of the bits of a bitmap. */
export function bitmapBytes(size: number, granularityBits: number): number {
  return Math.ceil(Math.ceil(size / 2 ** granularityBits) / 8)
}
