/**
 * L1 and L2 entries (spec "Cluster mapping"). An entry is a be64, handled as its two 32-bit halves
 * `high` and `low`, so that scanning a table neither truncates nor allocates.
 *
 *   L1 entry      63        62..56     55 ................ 9     8..0
 *                 COPIED    reserved   L2 table offset           reserved
 *
 *   L2 entry,     63        62   61..56     55 ............ 9    8..1      0
 *   standard      COPIED    0    reserved   host cluster offset  reserved  ZERO
 *
 *   L2 entry,     63   62   61 ......... x            x-1 ..................... 0
 *   compressed    0    1    additional sectors        host offset, in bytes       x = 70 - cluster_bits
 */

/** COPIED in the high half: the refcount is exactly 1, so the cluster may be written in place. */
export const copiedFlag = 0x8000_0000
/** In the high half of an L2 entry: a compressed cluster descriptor follows. */
export const compressedFlag = 0x4000_0000
/** In the low half of a standard L2 entry: the cluster reads as zeroes. */
export const zeroFlag = 1

/** Bits of the high half that must be 0 in L1 entries and standard L2 entries. */
export const reservedHigh = 0x3f00_0000
/** Bits of the low half that must be 0 in a standard L2 entry; an L1 entry also has no ZERO flag. */
export const reservedLow = 0x1fe

const two32 = 0x1_0000_0000

/** What a guest cluster is according to its L2 entry (for extended L2: before its subclusters are looked at). */
export type ClusterKind =
  /** Nothing here: the backing file decides, or zeroes. */
  | 'unallocated'
  /** Reads as zeroes, owns no host cluster. */
  | 'zero-plain'
  /** Reads as zeroes, owns a host cluster with stale bytes. */
  | 'zero-allocated'
  /** Data at a host offset. */
  | 'normal'
  /** A compressed cluster descriptor. */
  | 'compressed'

/** What decides how an entry is read, besides its bits. */
export interface EntryContext {
  readonly extendedL2: boolean
  /** Guest data is in an external data file, where host offset 0 is valid. */
  readonly dataFile: boolean
}

/** The offset an L1 or standard L2 entry holds; exact up to the format's 2^56. */
export function entryOffset(high: number, low: number): number {
  return (high & 0x00ff_ffff) * two32 + ((low & 0xffff_fe00) >>> 0)
}

/** The high half of an entry that holds `offset`. */
export function offsetHigh(offset: number): number {
  return Math.floor(offset / two32)
}

/** The low half of an entry that holds `offset`. */
export function offsetLow(offset: number): number {
  return offset % two32
}

/** True if the COPIED flag is set. */
export function isCopied(high: number): boolean {
  return (high & copiedFlag) !== 0
}

/** How a cluster with this L2 entry reads. */
export function clusterKind(high: number, low: number, context: EntryContext): ClusterKind {
  if ((high & compressedFlag) !== 0) return 'compressed'
  const hasOffset = (high & 0x00ff_ffff) !== 0 || (low & 0xffff_fe00) !== 0
  if (!context.extendedL2 && (low & zeroFlag) !== 0) return hasOffset ? 'zero-allocated' : 'zero-plain'
  if (hasOffset || (context.dataFile && isCopied(high))) return 'normal'
  return 'unallocated'
}

/** Where the bytes of a compressed cluster are. */
export interface CompressedDescriptor {
  /** Host byte offset, not aligned. */
  readonly offset: number
  /** Upper bound of the compressed length in bytes, up to the end of the last sector. */
  readonly length: number
}

/** Reads a compressed cluster descriptor. The offset may exceed what a valid image holds. */
export function decodeCompressed(high: number, low: number, clusterBits: number): CompressedDescriptor {
  const offsetBits = 70 - clusterBits - 32
  const offset = (high & (2 ** offsetBits - 1)) * two32 + low
  const additional = (high & 0x3fff_ffff) >>> offsetBits
  return { offset, length: (additional + 1) * 512 - (offset % 512) }
}

/** The two halves of an entry. */
export interface EntryHalves {
  readonly high: number
  readonly low: number
}

/**
 * The L2 entry for `length` compressed bytes at a host byte offset.
 * @throws RangeError if the descriptor cannot hold them.
 */
export function encodeCompressed(offset: number, length: number, clusterBits: number): EntryHalves {
  const offsetBits = 70 - clusterBits - 32
  const additional = Math.floor((offset + length - 1) / 512) - Math.floor(offset / 512)
  if (offset >= maxCompressedOffset(clusterBits) || additional >= 2 ** (clusterBits - 8)) {
    throw new RangeError(`a compressed cluster descriptor cannot hold ${length} bytes at offset ${offset}`)
  }
  const high = compressedFlag + additional * 2 ** offsetBits + Math.floor(offset / two32)
  return { high, low: offset % two32 }
}

/** Compressed data must begin below this host offset. */
export function maxCompressedOffset(clusterBits: number): number {
  return Math.min(2 ** (70 - clusterBits), Number.MAX_SAFE_INTEGER)
}
