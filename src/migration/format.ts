/**
 * The numbers of the migration stream, as QEMU's `docs/devel/migration` and its sources define them,
 * and the limits this library enforces before it allocates anything. All integers in a stream are
 * big-endian; nothing is aligned or padded.
 *
 * ```
 * "QEVM" be32 3 | 07 configuration | 01 START … footer | 02 PART … footer | 03 END … footer
 *               | 08 command | 04 FULL … footer … | 00 EOF | 06 be32 length, VM description (JSON)
 * ```
 */
import { FormatError } from '../core/errors.ts'

/** First bytes of a stream: `QEVM`. */
export const streamMagic = 0x5145_564d
/** The only stream version in use. */
export const streamVersion = 3

/** The byte that begins each element of a stream. */
export const sectionByte = {
  eof: 0x00,
  start: 0x01,
  part: 0x02,
  end: 0x03,
  full: 0x04,
  subsection: 0x05,
  vmDescription: 0x06,
  configuration: 0x07,
  command: 0x08,
  footer: 0x7e,
} as const

/**
 * Flags of a record in the `ram` section: the low bits of a be64 whose high bits are the page's
 * byte offset in its RAM block.
 *
 * ```
 *  63                                 12 11                     0
 * +-------------------------------------+------------------------+
 * |  page offset / page size            |  flags                 |   (4 KiB target pages)
 * +-------------------------------------+------------------------+
 * ```
 */
export const ramFlag = {
  /** Obsolete since 2009. */
  full: 0x001,
  /** A page of zeroes; one fill byte follows. */
  zero: 0x002,
  /** The list of RAM blocks follows; the offset part is the total size. */
  memSize: 0x004,
  /** A page, raw. */
  page: 0x008,
  /** End of this section's body. */
  eos: 0x010,
  /** Same RAM block as the record before; no name follows. */
  continue: 0x020,
  /** A delta against the page's content so far. */
  xbzrle: 0x040,
  /** RDMA only. */
  hook: 0x080,
  /** One page as a zlib stream; written by QEMU up to 9.0. */
  compressPage: 0x100,
  /** All multifd channels are drained here. */
  multifdFlush: 0x200,
} as const

/** Commands (section byte 0x08), by their numbers in the stream. */
export const commandNumber = {
  openReturnPath: 1,
  ping: 2,
  postcopyAdvise: 3,
  postcopyListen: 4,
  postcopyRun: 5,
  postcopyRamDiscard: 6,
  packaged: 7,
  enableColo: 8,
  postcopyResume: 9,
  recvBitmap: 10,
  switchoverStart: 11,
} as const

/** Upper bounds of what a stream may claim. */
export const limits = {
  machineName: 1024,
  capabilities: 64,
  ramBlocks: 65_536,
  ramBlockLength: 281_474_976_710_656,
  sections: 65_536,
  vmDescription: 67_108_864,
  vmDescriptionDepth: 64,
  /** Values of one device, decoded. */
  deviceValues: 524_288,
  /** Values of all devices, decoded at once. */
  allValues: 4_194_304,
  /** Deltas of XBZRLE, one on the other, of one page. */
  deltas: 65_536,
  /** Bytes of device state behind the pages, the VM description included: far more than machines have (some MiB). */
  behindPages: 268_435_456,
  pageSizeMin: 256,
  pageSizeMax: 1_048_576,
} as const

/** Longest zlib stream accepted for one compressed page of `pageSize` bytes. */
export function compressedPageLimit(pageSize: number): number {
  return pageSize + Math.ceil(pageSize / 1000) + 64
}

/** A malformed or truncated migration stream: `structure: detail (offset N)`, code `ERR_STREAM`. */
export function streamError(structure: string, field: string, detail: string, offset: number): FormatError {
  return new FormatError(detail, { structure, field, offset }, 'ERR_STREAM')
}

/** `0x` and lower-case hexadecimal digits. */
export function hex(value: number): string {
  return `0x${value.toString(16)}`
}
