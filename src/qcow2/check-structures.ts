/**
 * The smaller structures a check counts: snapshot table, bitmaps and LUKS header. What is wrong with
 * the tables themselves is reported here; what they refer to is walked elsewhere.
 */
import { decodeName } from '../bytes/file-name.ts'
import { viewOf } from '../bytes/view.ts'
import { maxLuksArea } from '../codec/crypto/luks-header.ts'
import { FormatError, Qcow2Error } from '../core/errors.ts'
import { bitmapLimits, decodeBitmapDirectory, decodeBitmapTableEntry, refuseMissingTables, type BitmapRecord } from './bitmaps-directory.ts'
import { owner } from './check-counters.ts'
import type { CheckContext } from './check-context.ts'
import type { CheckFinding } from './check-report.ts'
import type { L1Location } from './check-mapping.ts'
import { decodeBitmapsExtension, encryptionPointerOf, extensionType, findExtension } from './extensions.ts'
import { autoclear } from './features.ts'
import { maxL1Bytes, maxSnapshotExtraData, maxSnapshots, maxSnapshotTableBytes } from './limits.ts'
import { snapshotRecordLength } from './snapshot-table.ts'

/** What the snapshot table holds. */
export interface CheckedSnapshots {
  /** The table as it is stored, no more than the records QEMU allows. */
  readonly table: Uint8Array
  /** Bytes of the table, without the last record's padding. */
  readonly length: number
  /** Corruptions of records, which rewriting the table repairs. */
  readonly toRewrite: number
  /** Records at the end that are beyond the limits of the table. */
  readonly surplus: number
  /** Snapshots whose L1 table cannot be one: what they hold is not counted. */
  readonly unwalked: number
  /** The L1 tables worth walking. */
  readonly l1Tables: readonly L1Location[]
}

/** Reads the snapshot table and reports what is wrong in it. With `count`, its clusters are counted. */
export async function checkSnapshotTable(context: CheckContext, count: boolean): Promise<CheckedSnapshots> {
  const { header, report } = context
  const records = Math.min(header.snapshotCount, maxSnapshots)
  const tooMany = header.snapshotCount - records
  if (tooMany > 0) {
    const message = `${header.snapshotCount} snapshots, at most ${maxSnapshots}`
    report.corruption({ structure: 'snapshot table', offset: header.snapshotsOffset, message, problem: 'too many snapshots', value: tooMany }, tooMany)
  }
  const walk = await walkTable(context, records)
  if (count) context.reference(header.snapshotsOffset, walk.length, owner.snapshotTable)
  return { ...walk, surplus: walk.surplus + tooMany }
}

/** Goes through the records one by one; what a table holds is known only after decoding what precedes. */
async function walkTable(context: CheckContext, count: number): Promise<CheckedSnapshots> {
  const { table, records } = await readTable(context, count)
  const l1Tables: L1Location[] = []
  let toRewrite = 0
  let next = 0
  let length = 0
  for (let index = 0; index < records; index++) {
    const offset = context.header.snapshotsOffset + next
    const report: Report = (message, more) => context.report.corruption({ structure: 'snapshot table', offset, message, index, ...more })
    length = next + snapshotRecordLength(table, next)
    const record = rawRecord(table, next, context.geometry.clusterSize)
    if (!checkExtraData(context, record, report)) toRewrite++
    const l1Table = checkL1Location(context, record, report)
    if (l1Table !== undefined) l1Tables.push(l1Table)
    next = roundUp8(length)
  }
  const surplus = count - records
  if (surplus > 0) {
    const message = `the last ${surplus} of ${count} snapshots lie past the ${maxSnapshotTableBytes} bytes the table may take`
    const found = { structure: 'snapshot table', offset: context.header.snapshotsOffset + next, message, problem: 'snapshot table too large', value: surplus } as const
    context.report.corruption(found, surplus)
  }
  return { table: table.subarray(0, Math.min(table.length, next)), length, toRewrite, surplus, unwalked: records - l1Tables.length, l1Tables }
}

type Report = (message: string, more?: Pick<CheckFinding, 'problem' | 'value'>) => void

/** The fields a check looks at; the others may hold anything. */
interface RawRecord {
  readonly id: string
  readonly l1TableOffset: number
  /** The offset is a multiple of the cluster size, which a number beyond 2^53 does not tell. */
  readonly isAligned: boolean
  readonly l1Size: number
  readonly extraDataLength: number
}

function rawRecord(table: Uint8Array, at: number, clusterSize: number): RawRecord {
  const view = viewOf(table)
  const extraDataLength = view.getUint32(at + 36)
  const idAt = at + 40 + extraDataLength
  return {
    id: decodeName(table.subarray(idAt, idAt + view.getUint16(at + 12))),
    l1TableOffset: view.getUint32(at) * 0x1_0000_0000 + view.getUint32(at + 4),
    isAligned: view.getUint32(at + 4) % clusterSize === 0,
    l1Size: view.getUint32(at + 8),
    extraDataLength,
  }
}

function checkExtraData(context: CheckContext, record: RawRecord, report: Report): boolean {
  const length = record.extraDataLength
  if (length > maxSnapshotExtraData) {
    report(`snapshot ${record.id} has ${length} bytes of extra data, at most ${maxSnapshotExtraData}`, { problem: 'too much extra data', value: length })
    return false
  }
  if (context.header.version === 3 && length < 16) {
    report(`snapshot ${record.id} has ${length} bytes of extra data, version 3 needs 16`, { problem: 'incomplete snapshot', value: length })
    return false
  }
  return true
}

function checkL1Location(context: CheckContext, record: RawRecord, report: Report): L1Location | undefined {
  const { clusterSize } = context.geometry
  if (!record.isAligned) {
    report(`snapshot ${record.id}: its L1 table offset ${record.l1TableOffset} is not a multiple of ${clusterSize}`)
    return undefined
  }
  if (record.l1Size > maxL1Bytes / 8) {
    report(`snapshot ${record.id}: its L1 table has ${record.l1Size} entries, at most ${maxL1Bytes / 8}`)
    return undefined
  }
  return { offset: record.l1TableOffset, size: record.l1Size, active: false }
}

/** Bytes of a table that are looked at: extra data that is too long may stretch it past its limit. */
const maxStoredTable = 2 * maxSnapshotTableBytes

/**
 * The bytes of `count` records, or of those among them that a table has room for when their extra data is cut to what is
 * allowed. What is read doubles until they all end within it.
 */
async function readTable(context: CheckContext, count: number): Promise<{ table: Uint8Array; records: number }> {
  const { snapshotsOffset } = context.header
  if (count === 0) return { table: new Uint8Array(0), records: 0 }
  // a record that ends past the cluster in which the file ends has a damaged length
  const present = Math.max(0, context.host.size - snapshotsOffset) + context.geometry.clusterSize
  for (let size = 1 << 16; ; size *= 2) {
    const table = await context.read(snapshotsOffset, size)
    let [next, kept, records] = [0, 0, 0]
    let isDamaged = false
    for (; records < count; records++) {
      const length = snapshotRecordLength(table, next)
      isDamaged = next + length > present && next < present
      if (!(next + length <= size)) break
      const extraData = viewOf(table).getUint32(next + 36)
      kept += roundUp8(length - Math.max(0, extraData - maxSnapshotExtraData))
      if (kept > maxSnapshotTableBytes) return { table, records }
      next += roundUp8(length)
    }
    if (records === count) return { table, records }
    if (isDamaged || size >= maxStoredTable) {
      // a length that is damaged: it says nothing of where the records behind it are
      const where = isDamaged ? 'past the end of the file' : `more than ${maxStoredTable} bytes behind the start of the table`
      const detail = `record ${records} of ${count} ends ${where}`
      throw new FormatError(detail, { structure: 'snapshot table', offset: snapshotsOffset + next })
    }
  }
}

function roundUp8(length: number): number {
  return Math.ceil(length / 8) * 8
}

/** Counts the clusters of the LUKS header. */
export function checkLuksHeader(context: CheckContext): void {
  if (context.header.cryptMethod !== 'luks') return
  const { offset, length } = encryptionPointerOf(context.cluster0.extensions)
  if (length <= maxLuksArea) context.reference(offset, length, owner.luksHeader)
  else unreadable(context, 'LUKS header', offset, `it takes ${length} bytes, at most ${maxLuksArea}`)
}

/** A structure that no program reads, and whose clusters are therefore not counted. */
function unreadable({ report }: CheckContext, structure: string, offset: number, detail: string): void {
  report.corruption({ structure, offset, message: `${structure}: ${detail}` })
  report.checkErrors++
}

/**
 * Counts bitmap directory, tables and data. While the autoclear bit is not set the extension is stale
 * and refers to nothing.
 */
export async function checkBitmaps(context: CheckContext): Promise<void> {
  const data = findExtension(context.cluster0.extensions, extensionType.bitmaps)
  if (data === undefined || (context.header.autoclearFeatures & autoclear.bitmaps) === 0n) return
  const extension = decodeBitmapsExtension(data)
  const { directoryOffset, directorySize } = extension
  if (directorySize > bitmapLimits.directoryBytes) {
    unreadable(context, 'bitmap directory', directoryOffset, `it takes ${directorySize} bytes, at most ${bitmapLimits.directoryBytes}`)
    return
  }
  context.reference(directoryOffset, directorySize, owner.bitmaps)
  let records: BitmapRecord[]
  try {
    records = decodeBitmapDirectory(await context.read(directoryOffset, directorySize), extension, context.geometry.clusterSize)
    refuseMissingTables(records)
  } catch (error) {
    if (!Qcow2Error.is(error, 'ERR_FORMAT')) throw error
    context.report.corruption({ structure: 'bitmap directory', offset: directoryOffset, message: error.message })
    context.report.checkErrors++
    return
  }
  const bytes = records.reduce((sum, { tableSize }) => sum + tableSize * 8, 0)
  if (bytes - context.host.size >= context.geometry.clusterSize) {
    unreadable(context, 'bitmap table', directoryOffset, `all together take ${bytes} bytes of a file of ${context.host.size}: some overlap`)
    return
  }
  for (const record of records) await checkBitmapTable(context, record)
}

async function checkBitmapTable(context: CheckContext, record: BitmapRecord): Promise<void> {
  const { points, geometry, report } = context
  const { clusterSize } = geometry
  const length = record.tableSize * 8
  context.reference(record.tableOffset, length, owner.bitmaps)
  if (record.tableOffset + length - context.host.size >= clusterSize) return
  const table = viewOf(await context.read(record.tableOffset, length))
  for (let index = 0; index < record.tableSize; index++) {
    const turn = index % 1024 === 0 ? points.pass() : undefined
    if (turn !== undefined) await turn
    const entry = decodeBitmapTableEntry(table, index, clusterSize)
    if (typeof entry === 'number') {
      context.reference(entry, clusterSize, owner.bitmaps)
    } else if (entry === 'invalid') {
      report.corruption(() => {
        const message = `entry ${index} of the table of bitmap ${JSON.stringify(record.name)} is invalid`
        return { structure: 'bitmap table', offset: record.tableOffset + index * 8, message }
      })
    }
  }
}
