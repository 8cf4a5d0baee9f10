/**
 * What a file that holds a migration stream begins with: the stream itself, or libvirt's save image
 * around it. Owns finding the stream; knows nothing of what is in it.
 *
 * ```
 *  0 "LibvirtQemudSave" | 16 u32 version | 20 u32 data length | 24 u32 was running | 28 u32 format
 * 32 u32 cookie offset | 36 u32 unused[14] | 92 domain XML, NUL, cookie XML, NUL, zeroes | stream
 * ```
 * Integers are in the byte order of the machine that wrote the file.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { FormatError, UnsupportedError } from '../core/errors.ts'
import { viewOf } from '../bytes/view.ts'

/** How libvirt compressed the stream; the position is the number in the file. */
export const saveFormats = ['raw', 'gzip', 'bzip2', 'xz', 'lzop', 'zstd', 'sparse'] as const

/** One of {@link saveFormats}. */
export type SaveFormat = (typeof saveFormats)[number]

/** What libvirt says about a saved VM. */
export interface LibvirtSaveHeader {
  readonly version: number
  /** The VM was running when it was saved. */
  readonly wasRunning: boolean
  readonly format: SaveFormat
  /** The domain's definition. */
  readonly domainXml: string
  /** More state of libvirt's own. */
  readonly cookieXml?: string
  /** Where the stream begins in the file. */
  readonly streamOffset: number
}

const headerLength = 92
const structure = 'libvirt save header'
const dataLimit = 64 << 20

/**
 * Reads libvirt's header.
 * @returns `undefined` if the file does not begin with one.
 * @throws FormatError for a damaged header or one of an unfinished save.
 */
export async function readLibvirtHeader(device: BlockDevice, options?: CallOptions): Promise<LibvirtSaveHeader | undefined> {
  if (device.size < headerLength) return undefined
  const bytes = await device.read(0, headerLength, options)
  const magic = String.fromCharCode(...bytes.subarray(0, 16))
  if (magic === 'LibvirtQemudPart') {
    throw new FormatError('the save was interrupted: the file is not complete', { structure, field: 'magic', offset: 0 }, 'ERR_STREAM')
  }
  if (magic !== 'LibvirtQemudSave') return undefined
  const view = viewOf(bytes)
  const little = view.getUint32(16, true) <= 0xffff
  const word = (at: number): number => view.getUint32(at, little)
  const version = word(16)
  if (version < 1 || version > 2) throw headerError('version', `version is ${version}, allowed 1 to 2`, 16)
  const dataLength = word(20)
  if (dataLength > dataLimit || headerLength + dataLength > device.size) {
    throw headerError('data length', `${dataLength} bytes of XML, allowed up to ${Math.min(dataLimit, device.size - headerLength)}`, 20)
  }
  // Version 1 has the same layout; the format was a later use of a field that it left zero.
  const format = saveFormats[word(28)]
  if (format === undefined) throw new UnsupportedError(`${structure}: format is ${word(28)}, known are 0 to ${saveFormats.length - 1} (offset 28)`, [`format ${word(28)}`])
  const cookieOffset = word(32)
  if (cookieOffset >= dataLength && cookieOffset !== 0) throw headerError('cookie offset', `cookie at ${cookieOffset}, allowed up to ${dataLength}`, 32)
  const data = await device.read(headerLength, dataLength, options)
  const cookie = cookieOffset === 0 ? {} : { cookieXml: textUntilNul(data.subarray(cookieOffset)) }
  const wasRunning = word(24) !== 0
  return { version, wasRunning, format, domainXml: textUntilNul(data), ...cookie, streamOffset: headerLength + dataLength }
}

function headerError(field: string, detail: string, offset: number): FormatError {
  return new FormatError(detail, { structure, field, offset }, 'ERR_STREAM')
}

function textUntilNul(bytes: Uint8Array): string {
  const end = bytes.indexOf(0)
  return new TextDecoder().decode(end === -1 ? bytes : bytes.subarray(0, end))
}
