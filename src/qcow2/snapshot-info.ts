/** An internal snapshot in the terms of users. */
import type { SnapshotRecord } from './snapshot-table.ts'

/** An internal snapshot as the image lists it. `JSON.stringify` gives `vmClock` and `icount` as decimal strings. */
export interface SnapshotInfo {
  /** Unique within the image; QEMU counts up. */
  readonly id: string
  /** Chosen by the user; the format allows duplicates. */
  readonly name: string
  /** When it was taken, to the millisecond. */
  readonly date: Date
  /** The part of the date below a second, in nanoseconds: a `Date` holds only milliseconds. */
  readonly dateNanoseconds: number
  /** How long the guest had run, in nanoseconds. */
  readonly vmClock: bigint
  /** Bytes of VM state; 0 without. */
  readonly vmStateSize: number
  /** Bytes of the disk at the snapshot. */
  readonly diskSize: number
  /** Instructions executed, where record and replay counted them. */
  readonly icount: bigint | undefined
}

/** The public view of a record. */
export function infoOf(record: SnapshotRecord): SnapshotInfo {
  const info: SnapshotInfo = {
    id: record.id,
    name: record.name,
    date: new Date(record.dateSeconds * 1000 + Math.floor(record.dateNanoseconds / 1e6)),
    dateNanoseconds: record.dateNanoseconds,
    vmClock: record.vmClockNanoseconds,
    vmStateSize: record.vmStateSize,
    diskSize: record.diskSize ?? 0,
    icount: record.icount,
  }
  // JSON has no integers of 64 bits
  const toJSON = (): object => ({ ...info, vmClock: String(info.vmClock), icount: info.icount === undefined ? undefined : String(info.icount) })
  return Object.defineProperty(info, 'toJSON', { value: toJSON })
}
