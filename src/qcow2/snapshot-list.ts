/**
 * Reading and replacing the snapshot table of an open image.
 */
import type { Header } from './header.ts'
import type { HostFile } from './host-file.ts'
import { maxSnapshotTableBytes } from './limits.ts'
import { PointerTable } from './pointer-table.ts'
import { checkSnapshot, checkSnapshotL1, decodeSnapshot, snapshotRecordLength, type SnapshotRecord } from './snapshot-table.ts'

/** A snapshot table and how long it is. */
export interface SnapshotTable {
  readonly records: readonly SnapshotRecord[]
  /** Bytes from the first record to the end of the last one's padding. */
  readonly length: number
}

const firstRead = 8192

/**
 * Reads the snapshot table a header names.
 * @throws FormatError if a record is malformed or beyond QEMU's limits; its L1 table is looked at when it is read.
 */
export async function readSnapshotTable(host: HostFile, header: Header): Promise<SnapshotTable> {
  const { snapshotCount, snapshotsOffset } = header
  const records: SnapshotRecord[] = []
  if (snapshotCount === 0) return { records, length: 0 }
  const room = Math.min(maxSnapshotTableBytes, Math.max(0, host.size - snapshotsOffset))
  let bytes = await readTable(host, snapshotsOffset, Math.min(room, firstRead))
  let at = 0
  while (records.length < snapshotCount) {
    const length = snapshotRecordLength(bytes, at)
    if (!(at + length <= bytes.length) && bytes.length < room) {
      bytes = await readTable(host, snapshotsOffset, Math.min(room, bytes.length * 4))
      continue
    }
    const { record, next } = decodeSnapshot(bytes, at, snapshotsOffset)
    checkSnapshot(record)
    records.push(record.diskSize === undefined ? { ...record, diskSize: header.size } : record)
    at = next
  }
  return { records, length: at }
}

/**
 * Reads the L1 table of a snapshot.
 * @throws FormatError if it cannot be one.
 */
export async function readSnapshotL1(host: HostFile, record: SnapshotRecord, clusterSize: number): Promise<PointerTable> {
  checkSnapshotL1(record, clusterSize)
  return PointerTable.read(host, record.l1TableOffset, record.l1Size)
}

async function readTable(host: HostFile, offset: number, length: number): Promise<Uint8Array> {
  const bytes = host.allocate(length)
  await host.readInto(offset, bytes)
  return bytes
}
