/**
 * Recognising the format of an image by its bytes. Owns the signatures, of the formats that are read and of those that are
 * not: these are never taken for a raw disk, whose bytes they do not have.
 */
import type { BlockDevice } from '../block/device.ts'
import { viewOf } from '../bytes/view.ts'
import { UnsupportedError } from '../core/errors.ts'

/** A format that images are read in. */
export type KnownFormat = 'qcow2' | 'luks' | 'raw'

/** A format that is recognised and not read: its name in QEMU, and what people call it. */
interface ForeignFormat {
  readonly name: string
  readonly title: string
}

const vmdk = { name: 'vmdk', title: 'VMDK' }
const vdi = { name: 'vdi', title: 'VDI' }
const vhdx = { name: 'vhdx', title: 'VHDX' }
const vpc = { name: 'vpc', title: 'VHD' }
const qed = { name: 'qed', title: 'QED' }
const parallels = { name: 'parallels', title: 'Parallels' }
const dmg = { name: 'dmg', title: 'DMG' }
const bochs = { name: 'bochs', title: 'Bochs' }
const cloop = { name: 'cloop', title: 'cloop' }
const foreignFormats: readonly ForeignFormat[] = [vmdk, vdi, vhdx, vpc, qed, parallels, dmg, bochs, cloop]

/** Signatures at the start of a file, or `at` an offset, as Latin-1. */
const signatures: readonly (ForeignFormat & { readonly at?: number; readonly text: string })[] = [
  { ...vmdk, text: 'KDMV' },
  { ...vmdk, text: 'COWD' },
  // an extent of ESXi 6.5 and later, little-endian 0xcafebabe
  { ...vmdk, text: '\xbe\xba\xfe\xca\0\0\0\0' },
  { ...vdi, at: 64, text: '\x7f\x10\xda\xbe' },
  { ...vhdx, text: 'vhdxfile' },
  { ...vpc, text: 'conectix' },
  { ...qed, text: 'QED\0' },
  { ...parallels, text: 'WithoutFreeSpace' },
  { ...parallels, text: 'WithouFreSpacExt' },
  { ...bochs, text: 'Bochs Virtual HD Image\0' },
  { ...cloop, text: '#!/bin/sh\n#V2.0 Format\n' },
]

const headBytes = 512
const footerBytes = 512

/**
 * The format that the first bytes show: `raw` where they show none.
 * @throws UnsupportedError for a format that is not read, by its name: VMDK, VDI, VHDX, VHD (also a fixed one, by its footer), QED, Parallels, DMG, Bochs, cloop
 */
export async function probeFormat(device: BlockDevice): Promise<KnownFormat> {
  const head = await device.read(0, Math.min(headBytes, device.size))
  const text = latin1(head)
  if (text.startsWith('QFI\xfb')) return 'qcow2'
  if (text.startsWith('LUKS\xba\xbe\0\x01')) return 'luks'
  const found = signatures.find((signature) => text.startsWith(signature.text, signature.at ?? 0)) ?? (isVmdkDescriptor(text) ? vmdk : await byFooter(device))
  if (found !== undefined) throw foreign(found)
  return 'raw'
}

/** The error for a format that is asked for by its name, if it is one that is recognised and not read. */
export function foreignFormat(name: string): UnsupportedError | undefined {
  const found = foreignFormats.find((each) => each.name === name)
  return found === undefined ? undefined : foreign(found)
}

function foreign({ name, title }: ForeignFormat): UnsupportedError {
  return new UnsupportedError(`the image is in ${title} format, which is not supported: convert it first (qemu-img convert -f ${name} -O qcow2); as format raw its bytes are taken as they are`, [name])
}

/** A text file that names the extents: comments and empty lines, then the version. */
function isVmdkDescriptor(text: string): boolean {
  return /^(?:#[^\n]*\n|[ \r]*\n)*version=[123] *\r?\n/.test(text)
}

/** Fixed VHDs and DMGs are known by their last sector only. */
async function byFooter(device: BlockDevice): Promise<ForeignFormat | undefined> {
  if (device.size < footerBytes) return undefined
  const footer = await device.read(device.size - footerBytes, footerBytes)
  // that of Virtual PC before 2004 is a byte shorter
  if (isVhdFooter(footer) || isVhdFooter(footer.subarray(1))) return vpc
  const view = viewOf(footer)
  return latin1(footer.subarray(0, 4)) === 'koly' && view.getUint32(4) === 4 && view.getUint32(8) === footerBytes ? dmg : undefined
}

/** With its checksum, so that a disk whose last sector holds the word only is none. */
function isVhdFooter(footer: Uint8Array): boolean {
  if (latin1(footer.subarray(0, 8)) !== 'conectix') return false
  let sum = 0
  for (const [at, byte] of footer.entries()) if (at < 64 || at >= 68) sum += byte
  return viewOf(footer).getUint32(64) === ~sum >>> 0
}

function latin1(bytes: Uint8Array): string {
  return String.fromCharCode(...bytes)
}
