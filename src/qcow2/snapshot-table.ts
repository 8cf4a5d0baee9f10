/**
 * The snapshot table (spec "Snapshots"): one record for each internal snapshot, each beginning at a
 * multiple of 8 bytes. Pure; where the table is and how it is replaced is known elsewhere.
 *
 *    0  u64  l1_table_offset            24  u64  guest run time, nanoseconds
 *    8  u32  l1_size                    32  u32  VM state size, 32-bit form
 *   12  u16  id length                  36  u32  extra data length E
 *   14  u16  name length                40       extra data
 *   16  u32  date, seconds            40+E       id, name, zero padding to a multiple of 8
 *   20  u32  date, nanoseconds part
 *
 *   extra data:  0 u64 VM state size   8 u64 disk size   16 u64 icount   24 unknown, kept
 */
import { decodeName, encodeName } from '../bytes/file-name.ts'
import { FormatError } from '../core/errors.ts'
import { readU64, writeU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'
import { maxL1Bytes, maxSnapshotExtraData, maxSnapshotTableBytes } from './limits.ts'

/** One record of the snapshot table. Sizes are bytes unless the name says otherwise. */
export interface SnapshotRecord {
  readonly id: string
  readonly name: string
  readonly l1TableOffset: number
  /** Entries of the snapshot's L1 table. */
  readonly l1Size: number
  /** Seconds since the Unix epoch, UTC, unsigned 32 bits. */
  readonly dateSeconds: number
  readonly dateNanoseconds: number
  /** Guest run time at the snapshot. */
  readonly vmClockNanoseconds: bigint
  readonly vmStateSize: number
  /** Size of the disk at the snapshot; undefined where a version 2 image does not tell. */
  readonly diskSize: number | undefined
  /** Instruction count; undefined if not recorded. */
  readonly icount: bigint | undefined
  /** Extra data from byte 24 on, kept as it is. */
  readonly unknownExtraData: Uint8Array
  /** Length of the extra data as stored; version 3 demands at least 16. Encoding writes 24 or more. */
  readonly extraDataLength: number
}

const noIcount = 0xffff_ffff_ffff_ffffn
const fixedLength = 40

/** A decoded record and where the next one begins. */
export interface DecodedSnapshot {
  readonly record: SnapshotRecord
  /** Offset of the next record, a multiple of 8. */
  readonly next: number
}

/**
 * Decodes the record at byte `at` of the table. `tableOffset` is the table's host offset, for messages.
 * The last record's padding may be missing.
 * @throws FormatError if the record is cut short.
 */
export function decodeSnapshot(table: Uint8Array, at: number, tableOffset: number): DecodedSnapshot {
  const view = viewOf(table)
  const location = { structure: 'snapshot table', offset: tableOffset + at }
  if (at + fixedLength > table.length) throw new FormatError('the table ends inside a record', location)
  const idLength = view.getUint16(at + 12)
  const nameLength = view.getUint16(at + 14)
  const extraDataLength = view.getUint32(at + 36)
  const strings = at + fixedLength + extraDataLength
  const end = strings + idLength + nameLength
  if (end > table.length) throw new FormatError('the table ends inside a record', location)
  const extra = viewOf(table.subarray(at + fixedLength, strings))
  const size32 = view.getUint32(at + 32)
  const size64 = extraDataLength >= 8 ? readU64(extra, 0, { ...location, field: 'vm_state_size' }) : size32
  const icount = extraDataLength >= 24 ? extra.getBigUint64(16) : noIcount
  const record: SnapshotRecord = {
    id: decodeName(table.subarray(strings, strings + idLength)),
    name: decodeName(table.subarray(strings + idLength, end)),
    l1TableOffset: readU64(view, at, { ...location, field: 'l1_table_offset' }),
    l1Size: view.getUint32(at + 8),
    dateSeconds: view.getUint32(at + 16),
    dateNanoseconds: view.getUint32(at + 20),
    vmClockNanoseconds: view.getBigUint64(at + 24),
    vmStateSize: size64,
    diskSize: extraDataLength >= 16 ? readU64(extra, 8, { ...location, field: 'disk_size' }) : undefined,
    icount: icount === noIcount ? undefined : icount,
    unknownExtraData: table.slice(Math.min(at + fixedLength + 24, strings), strings),
    extraDataLength,
  }
  return { record, next: Math.ceil(end / 8) * 8 }
}

/** Length in bytes, without padding, that the record at `at` takes; NaN if its fixed part is cut short. */
export function snapshotRecordLength(table: Uint8Array, at: number): number {
  if (at + fixedLength > table.length) return Number.NaN
  const view = viewOf(table)
  return fixedLength + view.getUint32(at + 36) + view.getUint16(at + 12) + view.getUint16(at + 14)
}

/**
 * Refuses what QEMU refuses in a record when it reads the table.
 * @throws FormatError for too much extra data.
 */
export function checkSnapshot(record: SnapshotRecord): void {
  if (record.extraDataLength <= maxSnapshotExtraData) return
  const detail = `extra data of snapshot ${record.id} is ${record.extraDataLength} bytes, at most ${maxSnapshotExtraData}`
  throw new FormatError(detail, { structure: 'snapshot table', field: record.id })
}

/**
 * Refuses an L1 table that cannot be one. Only what uses the snapshot asks: the rest of the image is sound without it.
 * @throws FormatError if the table is not aligned or too large.
 */
export function checkSnapshotL1(record: SnapshotRecord, clusterSize: number): void {
  if (hasSoundL1(record, clusterSize)) return
  const location = { structure: 'snapshot table', field: record.id }
  if (record.l1Size > maxL1Bytes / 8) {
    throw new FormatError(`l1_size of snapshot ${record.id} is ${record.l1Size}, at most ${maxL1Bytes / 8}`, location)
  }
  throw new FormatError(`l1_table_offset of snapshot ${record.id} is ${record.l1TableOffset}, not a multiple of ${clusterSize}`, location)
}

/** The L1 table of a snapshot is aligned and not too large. */
export function hasSoundL1({ l1TableOffset, l1Size }: SnapshotRecord, clusterSize: number): boolean {
  return l1Size <= maxL1Bytes / 8 && l1TableOffset % clusterSize === 0
}

/**
 * Encodes a snapshot table, each record padded to 8 bytes. The extra data is written in full; a VM
 * state of 4 GiB or more has 0 in the 32-bit field, so that old readers see a snapshot without one.
 * @throws RangeError if an id or name is longer than 65535 bytes or the table longer than 64 MiB.
 */
export function encodeSnapshotTable(records: readonly SnapshotRecord[]): Uint8Array {
  const texts = records.map(({ id, name }) => ({ id: encodeText(id, 'id'), name: encodeText(name, 'name') }))
  const lengths = records.map((record, index) => {
    const { id, name } = texts[index]!
    return Math.ceil((fixedLength + 24 + record.unknownExtraData.length + id.length + name.length) / 8) * 8
  })
  const total = lengths.reduce((sum, length) => sum + length, 0)
  if (total > maxSnapshotTableBytes) {
    throw new RangeError(`the snapshot table would be ${total} bytes, at most ${maxSnapshotTableBytes}`)
  }
  const table = new Uint8Array(total)
  let at = 0
  records.forEach((record, index) => {
    encodeRecord(table.subarray(at, at + lengths[index]!), record, texts[index]!)
    at += lengths[index]!
  })
  return table
}

function encodeRecord(target: Uint8Array, record: SnapshotRecord, text: { id: Uint8Array; name: Uint8Array }): void {
  const view = viewOf(target)
  const extraDataLength = 24 + record.unknownExtraData.length
  writeU64(view, 0, record.l1TableOffset)
  view.setUint32(8, record.l1Size)
  view.setUint16(12, text.id.length)
  view.setUint16(14, text.name.length)
  view.setUint32(16, record.dateSeconds)
  view.setUint32(20, record.dateNanoseconds)
  view.setBigUint64(24, record.vmClockNanoseconds)
  view.setUint32(32, record.vmStateSize < 2 ** 32 ? record.vmStateSize : 0)
  view.setUint32(36, extraDataLength)
  writeU64(view, 40, record.vmStateSize)
  if (record.diskSize === undefined) throw new RangeError(`snapshot ${record.id} has no disk size to write`)
  writeU64(view, 48, record.diskSize)
  view.setBigUint64(56, record.icount ?? noIcount)
  target.set(record.unknownExtraData, 64)
  target.set(text.id, fixedLength + extraDataLength)
  target.set(text.name, fixedLength + extraDataLength + text.id.length)
}

function encodeText(text: string, what: string): Uint8Array {
  const bytes = encodeName(text)
  if (bytes.length > 0xffff) throw new RangeError(`snapshot ${what} is ${bytes.length} bytes, at most 65535`)
  return bytes
}

/**
 * The id a new snapshot gets: the largest number an id begins with plus one, as QEMU counts. Numbers past
 * 64 bits do not count; an id that is there already is passed over.
 */
export function nextSnapshotId(records: readonly SnapshotRecord[]): string {
  const ids = new Set(records.map(({ id }) => id))
  let largest = 0n
  for (const id of ids) {
    const number = BigInt(/^\d{1,20}(?!\d)/.exec(id)?.[0] ?? 0)
    if (number > largest && number < 2n ** 64n) largest = number
  }
  let next = largest + 1n
  while (ids.has(String(next))) next++
  return String(next)
}
