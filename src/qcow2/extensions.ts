/**
 * Header extensions (spec "Header extensions"): a list of typed byte strings behind the header. All
 * of them are kept, unknown ones too, so that rewriting a header loses nothing.
 *
 *   +0  u32  type, 0 ends the list
 *   +4  u32  length
 *   +8       data, then padding to a multiple of 8 (not always zero)
 */
import { FormatError } from '../core/errors.ts'
import { viewOf } from '../bytes/view.ts'
import { readU64, writeU64 } from '../bytes/u64.ts'

/** The types this library knows. */
export const extensionType = {
  end: 0,
  backingFormat: 0xe279_2aca,
  featureNames: 0x6803_f857,
  bitmaps: 0x2385_2875,
  encryptionHeader: 0x0537_be77,
  dataFile: 0x4441_5441,
} as const

/** One extension. */
export interface Extension {
  readonly type: number
  readonly data: Uint8Array
}

/**
 * Decodes the extensions in `bytes[start, end)`, which is the area from the end of the header to the
 * backing file name, or to the end of cluster 0. An area without an end marker is accepted.
 * @throws FormatError if an extension overruns the area.
 */
export function decodeExtensions(bytes: Uint8Array, start: number, end: number): Extension[] {
  const view = viewOf(bytes)
  const extensions: Extension[] = []
  const limit = Math.min(end, bytes.length)
  let at = start
  while (at + 8 <= limit) {
    const type = view.getUint32(at)
    const length = view.getUint32(at + 4)
    if (type === extensionType.end) break
    const location = { structure: 'header extension', field: `0x${type.toString(16).padStart(8, '0')}`, offset: at }
    if (length > end - at - 8) {
      throw new FormatError(`length of ${location.field} is ${length}, ${end - at - 8} bytes are left`, location)
    }
    const data = new Uint8Array(length)
    data.set(bytes.subarray(at + 8, Math.min(at + 8 + length, bytes.length)))
    const before = extensions.findIndex((extension) => extension.type === type)
    // as QEMU does: the last one of a type it knows counts, of others all are kept
    if (before >= 0 && order.includes(type)) extensions[before] = { type, data }
    else extensions.push({ type, data })
    at += 8 + Math.ceil(length / 8) * 8
  }
  return extensions
}

/** Encodes extensions in QEMU's order, unknown ones last in the order given, with the end marker. */
export function encodeExtensions(extensions: readonly Extension[]): Uint8Array {
  const sorted = [...extensions].sort((a, b) => rank(a.type) - rank(b.type))
  const total = sorted.reduce((sum, { data }) => sum + 8 + Math.ceil(data.length / 8) * 8, 8)
  const bytes = new Uint8Array(total)
  const view = viewOf(bytes)
  let at = 0
  for (const { type, data } of sorted) {
    view.setUint32(at, type)
    view.setUint32(at + 4, data.length)
    bytes.set(data, at + 8)
    at += 8 + Math.ceil(data.length / 8) * 8
  }
  return bytes
}

const order: readonly number[] = [
  extensionType.backingFormat,
  extensionType.dataFile,
  extensionType.encryptionHeader,
  extensionType.featureNames,
  extensionType.bitmaps,
]

function rank(type: number): number {
  const index = order.indexOf(type)
  return index < 0 ? order.length : index
}

/** The data of the extension of a type, if the image has it. */
export function findExtension(extensions: readonly Extension[], type: number): Uint8Array | undefined {
  return extensions.find((extension) => extension.type === type)?.data
}

/** The list with the extension of `type` replaced, added, or removed where `data` is undefined. */
export function withExtension(
  extensions: readonly Extension[],
  type: number,
  data: Uint8Array | undefined,
): Extension[] {
  const others = extensions.filter((extension) => extension.type !== type)
  return data === undefined ? others : [...others, { type, data }]
}

/** Where the LUKS header of an encrypted image is (spec "Full disk encryption header pointer"). */
export interface EncryptionPointer {
  /** Host offset in bytes, cluster aligned. */
  readonly offset: number
  /** Length in bytes. */
  readonly length: number
}

/** Decodes the 16-byte encryption header pointer. */
export function decodeEncryptionPointer(data: Uint8Array): EncryptionPointer {
  const location = { structure: 'encryption header pointer' }
  if (data.length !== 16) throw new FormatError(`length is ${data.length}, must be 16`, location)
  const view = viewOf(data)
  return {
    offset: readU64(view, 0, { ...location, field: 'offset' }),
    length: readU64(view, 8, { ...location, field: 'length' }),
  }
}

/** The pointer of an image encrypted with LUKS. @throws FormatError if there is none: then nothing opens the image. */
export function encryptionPointerOf(extensions: readonly Extension[]): EncryptionPointer {
  const data = findExtension(extensions, extensionType.encryptionHeader)
  if (data !== undefined) return decodeEncryptionPointer(data)
  throw new FormatError('crypt_method is luks, but there is no encryption header pointer', { structure: 'header', field: 'crypt_method', offset: 32 })
}

/** Encodes the 16-byte encryption header pointer. */
export function encodeEncryptionPointer(pointer: EncryptionPointer): Uint8Array {
  const data = new Uint8Array(16)
  writeU64(viewOf(data), 0, pointer.offset)
  writeU64(viewOf(data), 8, pointer.length)
  return data
}

/** The bitmaps extension (spec "Bitmaps extension"). */
export interface BitmapsExtension {
  readonly count: number
  /** Length of the bitmap directory in bytes. */
  readonly directorySize: number
  /** Host offset of the bitmap directory, cluster aligned. */
  readonly directoryOffset: number
}

/** Decodes the 24-byte bitmaps extension. */
export function decodeBitmapsExtension(data: Uint8Array): BitmapsExtension {
  const location = { structure: 'bitmaps extension' }
  if (data.length !== 24) throw new FormatError(`length is ${data.length}, must be 24`, location)
  const view = viewOf(data)
  return {
    count: view.getUint32(0),
    directorySize: readU64(view, 8, { ...location, field: 'bitmap_directory_size' }),
    directoryOffset: readU64(view, 16, { ...location, field: 'bitmap_directory_offset' }),
  }
}

/** Encodes the 24-byte bitmaps extension. */
export function encodeBitmapsExtension(extension: BitmapsExtension): Uint8Array {
  const data = new Uint8Array(24)
  const view = viewOf(data)
  view.setUint32(0, extension.count)
  writeU64(view, 8, extension.directorySize)
  writeU64(view, 16, extension.directoryOffset)
  return data
}
