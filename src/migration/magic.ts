/** The first bytes: the header of a migration stream, and what a file is that does not begin with one. */
import { hex, streamError, streamMagic, streamVersion } from './format.ts'
import type { ParserInput } from './input.ts'
import type { HeaderRecord } from './records.ts'

const magics: readonly (readonly [name: string, bytes: readonly number[]])[] = [
  ['a qcow2 image; its VM state is behind a snapshot', [0x51, 0x46, 0x49, 0xfb]],
  ['a multifd channel; read it beside its main channel', [0x11, 0x22, 0x33, 0x44]],
  ['a CPR side channel', [0x51, 0x43, 0x50, 0x52]],
  ['a libvirt save image', [0x4c, 0x69, 0x62, 0x76]],
  ['an ELF core', [0x7f, 0x45, 0x4c, 0x46]],
  ['gzip data', [0x1f, 0x8b]],
  ['zstd data', [0x28, 0xb5, 0x2f, 0xfd]],
  ['xz data', [0xfd, 0x37, 0x7a, 0x58]],
  ['bzip2 data', [0x42, 0x5a, 0x68]],
  ['lzop data', [0x89, 0x4c, 0x5a, 0x4f]],
]

/** `; this is …`, or nothing if the first bytes are not known. */
function describeMagic(bytes: Uint8Array): string {
  const found = magics.find(([, magic]) => magic.every((byte, i) => bytes[i] === byte))
  return found === undefined ? '' : `; this is ${found[0]}`
}

/** Reads the header, `be32 magic, be32 version`. @throws FormatError that names what else it may be. */
export function readHeader(input: ParserInput): HeaderRecord {
  const offset = input.offset
  input.require(8)
  const magic = input.u32()
  if (magic !== streamMagic) {
    const found = describeMagic(input.bytes.subarray(input.at - 4, input.end))
    throw streamError('header', 'magic', `not a QEMU migration stream: the magic is ${hex(magic)}, expected ${hex(streamMagic)}${found}`, offset)
  }
  const version = input.u32()
  if (version !== streamVersion) throw streamError('header', 'version', `version is ${version}, expected ${streamVersion}`, offset + 4)
  return { kind: 'header', offset, length: 8, version }
}
