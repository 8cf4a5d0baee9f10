/**
 * What a migration stream consists of, as the parser gives it and the writer takes it. Every byte
 * of a stream belongs to exactly one record, so records written in order give the same bytes.
 *
 * **Lifetime.** A record of a parser refers to its input and (for pages) to arrays that the parser uses
 * again: it is valid until the next record is asked for. Keep pages with {@link retainPages}. Those of
 * `readMigration` belong to the caller.
 */
import type { Command } from './commands.ts'

/** Where a record lies in the stream. */
export interface RecordSpan {
  /** Stream offset of the record's first byte. */
  readonly offset: number
  /** Bytes of the stream that the record covers. */
  readonly length: number
}

/** The eight bytes that begin a stream. */
export interface HeaderRecord extends RecordSpan {
  readonly kind: 'header'
  readonly version: number
}

/** An optional part of the configuration section. */
export type ConfigurationSubsection =
  | { readonly name: 'configuration/target-page-bits'; readonly version: number; readonly pageBits: number }
  | { readonly name: 'configuration/capabilities'; readonly version: number; readonly capabilities: readonly string[] }
  | { readonly name: 'configuration/uuid'; readonly version: number; readonly uuid: Uint8Array }

/** The configuration section: which machine the stream belongs to. */
export interface ConfigurationRecord extends RecordSpan {
  readonly kind: 'configuration'
  /** Machine type, for example `pc-q35-9.0`. */
  readonly machine: string
  readonly subsections: readonly ConfigurationSubsection[]
}

/** How a section begins: `start`, `part` and `end` frame iterated state (RAM); `full` is device state. */
export type SectionType = 'start' | 'part' | 'end' | 'full'

/** The head of a section; its body and {@link FooterRecord} follow. */
export interface SectionRecord extends RecordSpan {
  readonly kind: 'section'
  readonly type: SectionType
  /** Names the section in its parts and footer. */
  readonly id: number
  /** Name of the device, `ram` for memory. */
  readonly idstr: string
  /** Tells devices of one name apart. */
  readonly instanceId: number
  /** Of the device's layout. */
  readonly versionId: number
}

/** Ends a section. Machine types up to 2.3 write none. */
export interface FooterRecord extends RecordSpan {
  readonly kind: 'footer'
  readonly id: number
}

/** Where a `mapped-ram` file keeps a RAM block. Offsets are absolute in the file. */
export interface MappedRamHeader {
  /** 1. */
  readonly version: number
  /** Bytes of a page. */
  readonly pageSize: number
  /** Of the bitmap with a bit for each page that is present. */
  readonly bitmapOffset: number
  /** Of page 0; page n follows n page sizes behind. */
  readonly pagesOffset: number
}

/** A named piece of guest memory. */
export interface RamBlock {
  /** Position in the stream's list of blocks. */
  readonly index: number
  readonly name: string
  /** Bytes, a multiple of the target page size. */
  readonly length: number
  /** Host page size, where the source wrote it (postcopy with huge pages). */
  readonly hostPageSize?: number
  /** Guest physical address, where the source wrote it (capability `x-ignore-shared`). */
  readonly gpa?: number
  /** Where a `mapped-ram` file keeps the pages. */
  readonly mapped?: MappedRamHeader
}

/** Begins the list of RAM blocks. */
export interface RamSizeRecord extends RecordSpan {
  readonly kind: 'ram-size'
  /** Sum of the lengths of all RAM blocks, in bytes. */
  readonly total: number
}

/** One entry of the list of RAM blocks. */
export interface RamBlockRecord extends RecordSpan {
  readonly kind: 'ram-block'
  readonly block: RamBlock
}

/**
 * A run of page records of one RAM block. Entry `i` (`0 <= i < count`; the arrays may be longer):
 * page at byte `pageOffsets[i]` of `block`, of the sort `flags[i]` ({@link ramFlag}), with its
 * content at `bytes[positions[i]]`, `lengths[i]` bytes long: the fill byte of a zero page, a raw
 * page, an XBZRLE delta or a zlib stream.
 */
export interface RamPagesRecord extends RecordSpan {
  readonly kind: 'ram-pages'
  readonly block: RamBlock
  /** Target page size in bytes. */
  readonly pageSize: number
  /** Pages of this record. */
  readonly count: number
  /** {@link ramFlag} of each page. */
  readonly flags: Uint16Array
  /** Bytes from the start of `block`. */
  readonly pageOffsets: Float64Array
  /** Where the content begins in `bytes`. */
  readonly positions: Uint32Array
  /** Bytes of the content as stored. */
  readonly lengths: Uint32Array
  /** The input the positions refer to. */
  readonly bytes: Uint8Array
  /** Stream offset of `bytes[0]`. */
  readonly bytesOffset: number
}

/** `eos` ends the body of a `ram` section; `multifd-flush` tells to drain the multifd channels. */
export interface RamMarkRecord extends RecordSpan {
  readonly kind: 'ram-mark'
  readonly mark: 'eos' | 'multifd-flush'
}

/** One chunk of a `dirty-bitmap` section; the bits, if any, follow as a {@link BytesRecord}. */
export interface DirtyBitmapRecord extends RecordSpan {
  readonly kind: 'dirty-bitmap'
  /** Flags as in the stream, with the continuation bits. */
  readonly flags: number
  /** Node name, where the chunk names it. */
  readonly node?: string
  /** Bitmap name, where the chunk names it. */
  readonly bitmap?: string
  /** In a START chunk: bytes of the disk for each bit. */
  readonly granularity?: number
  /** In a START chunk: 1 enabled, 2 persistent. */
  readonly bitmapFlags?: number
  /** In a BITS chunk: first sector (512 bytes). */
  readonly startSector?: number
  /** In a BITS chunk: number of sectors. */
  readonly sectorCount?: number
  /** In a BITS chunk that is not all zeroes: bytes of bits that follow. */
  readonly bitsLength?: number
}

/** A command; of PACKAGED, the package follows as {@link BytesRecord}s. */
export interface CommandRecord extends RecordSpan {
  readonly kind: 'command'
  readonly command: Command
}

/** Ends the part of the stream that QEMU loads. */
export interface EofRecord extends RecordSpan {
  readonly kind: 'eof'
}

/** Begins the VM description; the JSON follows as {@link BytesRecord}s. */
export interface VmDescriptionRecord extends RecordSpan {
  readonly kind: 'vm-description'
  readonly jsonLength: number
}

/**
 * What a {@link BytesRecord} is a piece of.
 * - `device`: the body of a FULL section whose length is known
 * - `tail`: everything from the first FULL section after RAM to the end, of a stream read without its
 *   VM description
 * - `package`: the content of a PACKAGED command
 * - `dirty-bitmap`: bits
 * - `mapped-ram-bitmap`, `mapped-ram-padding`, `mapped-ram-pages`: parts of a mapped-ram block
 * - `vm-description`: JSON
 * - `trailing`: padding behind the end of the stream
 */
export type BytesOf =
  | 'device'
  | 'tail'
  | 'package'
  | 'dirty-bitmap'
  | 'mapped-ram-bitmap'
  | 'mapped-ram-padding'
  | 'mapped-ram-pages'
  | 'vm-description'
  | 'trailing'

/** Bytes passed through as they are. Long data comes in several records, cut at the edges of the input. */
export interface BytesRecord extends RecordSpan {
  readonly kind: 'bytes'
  readonly of: BytesOf
  readonly bytes: Uint8Array
}

/** Any record of a stream. */
export type MigrationRecord =
  | HeaderRecord
  | ConfigurationRecord
  | SectionRecord
  | FooterRecord
  | RamSizeRecord
  | RamBlockRecord
  | RamPagesRecord
  | RamMarkRecord
  | DirtyBitmapRecord
  | CommandRecord
  | EofRecord
  | VmDescriptionRecord
  | BytesRecord

/** A copy of a pages record that stays valid: arrays of exactly `count` entries and only its own bytes. */
export function retainPages(record: RamPagesRecord): RamPagesRecord {
  const { count, offset, length, bytesOffset } = record
  const first = offset - bytesOffset
  return {
    ...record,
    flags: record.flags.slice(0, count),
    pageOffsets: record.pageOffsets.slice(0, count),
    positions: record.positions.slice(0, count).map((position) => position - first),
    lengths: record.lengths.slice(0, count),
    bytes: record.bytes.slice(first, first + length),
    bytesOffset: offset,
  }
}
