/**
 * Records to bytes. Every record is encoded from its fields, not copied from where it was parsed, so
 * what the parser understood is what is written; parsed records written in order give the same bytes.
 */
import { ByteWriter } from './byte-writer.ts'
import { encodeCommand } from './commands.ts'
import { dirtyBitmapFlag } from './dirty-bitmap.ts'
import { ramFlag, sectionByte, streamMagic } from './format.ts'
import type {
  ConfigurationRecord,
  DirtyBitmapRecord,
  MigrationRecord,
  RamBlock,
  RamPagesRecord,
  SectionRecord,
} from './records.ts'

/** A record without its place in a stream: what the writer needs. */
export type WritableRecord = MigrationRecord extends infer R ? (R extends MigrationRecord ? Omit<R, 'offset' | 'length'> : never) : never

const sectionTypeByte = {
  start: sectionByte.start,
  part: sectionByte.part,
  end: sectionByte.end,
  full: sectionByte.full,
} as const

/**
 * The bytes of one record. `bytes` records give their own bytes, not copied; all others a new array.
 *
 * ```ts
 * for await (const record of readMigration(source)) sink.write(encodeRecord(record))
 * ```
 */
export function encodeRecord(record: WritableRecord): Uint8Array {
  switch (record.kind) {
    case 'bytes':
      return record.bytes
    case 'ram-pages':
      return encodePages(record)
  }
  const out = new ByteWriter()
  switch (record.kind) {
    case 'header':
      return out.u32(streamMagic).u32(record.version).bytes
    case 'configuration':
      return encodeConfiguration(out, record)
    case 'section':
      return encodeSection(out, record)
    case 'footer':
      return out.u8(sectionByte.footer).u32(record.id).bytes
    case 'ram-size':
      return out.u64(record.total + ramFlag.memSize).bytes
    case 'ram-block':
      return encodeBlock(out, record.block)
    case 'ram-mark':
      return out.u64(record.mark === 'eos' ? ramFlag.eos : ramFlag.multifdFlush).bytes
    case 'dirty-bitmap':
      return encodeDirtyBitmap(out, record)
    case 'command':
      return encodeCommand(record.command)
    case 'eof':
      return out.u8(sectionByte.eof).bytes
    case 'vm-description':
      return out.u8(sectionByte.vmDescription).u32(record.jsonLength).bytes
  }
}

function encodeConfiguration(out: ByteWriter, record: Pick<ConfigurationRecord, 'machine' | 'subsections'>): Uint8Array {
  const machine = new TextEncoder().encode(record.machine)
  out.u8(sectionByte.configuration).u32(machine.length).raw(machine)
  for (const part of record.subsections) {
    out.u8(sectionByte.subsection).counted(part.name).u32(part.version)
    switch (part.name) {
      case 'configuration/target-page-bits':
        out.u32(part.pageBits)
        break
      case 'configuration/capabilities':
        out.u32(part.capabilities.length)
        for (const capability of part.capabilities) out.counted(capability)
        break
      case 'configuration/uuid':
        out.raw(part.uuid)
    }
  }
  return out.bytes
}

function encodeSection(out: ByteWriter, record: Omit<SectionRecord, 'offset' | 'length'>): Uint8Array {
  out.u8(sectionTypeByte[record.type]).u32(record.id)
  if (record.type === 'start' || record.type === 'full') {
    out.counted(record.idstr).u32(record.instanceId).u32(record.versionId)
  }
  return out.bytes
}

function encodeBlock(out: ByteWriter, block: RamBlock): Uint8Array {
  out.counted(block.name).u64(block.length)
  if (block.hostPageSize !== undefined) out.u64(block.hostPageSize)
  if (block.gpa !== undefined) out.u64(block.gpa)
  const { mapped } = block
  if (mapped !== undefined) out.u32(mapped.version).u64(mapped.pageSize).u64(mapped.bitmapOffset).u64(mapped.pagesOffset)
  return out.bytes
}

function encodeDirtyBitmap(out: ByteWriter, record: Omit<DirtyBitmapRecord, 'offset' | 'length'>): Uint8Array {
  const { flags } = record
  out.u8(flags)
  if (record.node !== undefined) out.counted(record.node)
  if (record.bitmap !== undefined) out.counted(record.bitmap)
  if ((flags & dirtyBitmapFlag.start) !== 0) out.u32(record.granularity ?? 0).u8(record.bitmapFlags ?? 0)
  if ((flags & dirtyBitmapFlag.bits) !== 0) out.u64(record.startSector ?? 0).u32(record.sectorCount ?? 0)
  if (record.bitsLength !== undefined) out.u64(record.bitsLength)
  return out.bytes
}

/** A batch of page records, in one new array. */
function encodePages(record: Omit<RamPagesRecord, 'offset' | 'length'>): Uint8Array {
  const { count, flags, pageOffsets, positions, lengths, bytes } = record
  const name = new TextEncoder().encode(record.block.name)
  let size = 0
  for (let i = 0; i < count; i++) {
    size += 8 + ((flags[i]! & ramFlag.continue) === 0 ? 1 + name.length : 0) + headLength(flags[i]!) + lengths[i]!
  }
  const out = new ByteWriter(size)
  for (let i = 0; i < count; i++) {
    const flag = flags[i]!
    const length = lengths[i]!
    out.u64(pageOffsets[i]! + flag)
    if ((flag & ramFlag.continue) === 0) out.u8(name.length).raw(name)
    if ((flag & ramFlag.xbzrle) !== 0) out.u8(1).u16(length)
    if ((flag & ramFlag.compressPage) !== 0) out.u32(length)
    out.raw(bytes.subarray(positions[i], positions[i]! + length))
  }
  return out.bytes
}

function headLength(flags: number): number {
  if ((flags & ramFlag.xbzrle) !== 0) return 3
  return (flags & ramFlag.compressPage) !== 0 ? 4 : 0
}
