/**
 * Where a zstd frame ends and how much it declares to hold (RFC 8878, 3.1.1), without decompressing
 * it. A qcow2 descriptor gives the length of compressed data in sectors only, and decoders refuse
 * trailing bytes: the frame must be cut exactly.
 *
 *     magic fd2fb528 | frame header | block | block | ... | last block | checksum (optional, 4 bytes)
 *     frame header descriptor: 7..6 size of content size, 5 single segment, 3 reserved (0),
 *                              2 checksum follows, 1..0 size of the dictionary id
 *     block header, 3 bytes little-endian: 23..3 size, 2..1 type (0 raw, 1 RLE, 2 compressed), 0 last
 */

const frameMagic = 0xfd2fb528
const skippableMagic = 0x184d2a50

/** One frame at the start of some bytes. */
export interface ZstdFrame {
  /** Bytes from the magic to the end of the last block or checksum. */
  readonly length: number
  /** Holds no content. */
  readonly skippable: boolean
  /** Bytes it decompresses to, where the header says so. */
  readonly contentSize: number | undefined
  /** Bytes of history a decoder must keep. */
  readonly windowSize: number
  /** Where the window descriptor is, if the frame has one. */
  readonly windowAt: number | undefined
}

/** Parses the frame at the start of `bytes`; a string says what is wrong with it. */
export function parseZstdFrame(bytes: Uint8Array): ZstdFrame | string {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (bytes.length < 8) return 'the frame is cut short'
  const magic = view.getUint32(0, true)
  if ((magic & 0xfffffff0) >>> 0 === skippableMagic) return skippable(8 + view.getUint32(4, true), bytes.length)
  if (magic !== frameMagic) return `the frame magic is ${magic.toString(16)}, not ${frameMagic.toString(16)}`
  const descriptor = view.getUint8(4)
  if ((descriptor & 8) !== 0) return 'a reserved bit of the frame header is set'
  const single = (descriptor & 0x20) !== 0
  const dictionaryLength = [0, 1, 2, 4][descriptor & 3]!
  const sizeLength = [single ? 1 : 0, 2, 4, 8][descriptor >>> 6]!
  const sizeAt = 5 + (single ? 0 : 1) + dictionaryLength
  const blocksAt = sizeAt + sizeLength
  if (blocksAt > bytes.length) return 'the frame header is cut short'
  for (let i = 0; i < dictionaryLength; i++) {
    if (bytes[sizeAt - dictionaryLength + i] !== 0) return 'the frame needs a dictionary'
  }
  const contentSize = sizeLength === 0 ? undefined : readContentSize(view, sizeAt, sizeLength)
  const end = endOfBlocks(bytes, blocksAt)
  if (end === undefined) return 'the frame is cut short'
  const length = end + ((descriptor & 4) === 0 ? 0 : 4)
  if (length > bytes.length) return 'the frame is cut short'
  const windowSize = single ? contentSize! : windowOf(bytes[5]!)
  return { length, skippable: false, contentSize, windowSize, windowAt: single ? undefined : 5 }
}

function skippable(length: number, available: number): ZstdFrame | string {
  if (length > available) return 'a skippable frame is cut short'
  return { length, skippable: true, contentSize: 0, windowSize: 0, windowAt: undefined }
}

function readContentSize(view: DataView, at: number, length: number): number {
  if (length === 1) return view.getUint8(at)
  if (length === 2) return view.getUint16(at, true) + 256
  if (length === 4) return view.getUint32(at, true)
  return view.getUint32(at + 4, true) * 0x1_0000_0000 + view.getUint32(at, true)
}

function windowOf(descriptor: number): number {
  const base = 2 ** (10 + (descriptor >>> 3))
  return base + (base / 8) * (descriptor & 7)
}

function endOfBlocks(bytes: Uint8Array, start: number): number | undefined {
  for (let at = start; at + 3 <= bytes.length; ) {
    const header = bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16)
    const isRunLength = ((header >>> 1) & 3) === 1
    at += 3 + (isRunLength ? 1 : header >>> 3)
    if ((header & 1) !== 0) return at
  }
  return undefined
}
