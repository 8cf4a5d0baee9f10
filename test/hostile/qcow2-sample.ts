/** qcow2 images that have every structure, with the places of their fields. */
import { MemoryDevice } from '../../src/block/memory.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import type { Field } from './values.ts'

export interface ImageKind {
  readonly extendedL2?: boolean
  readonly encrypted?: boolean
}

const MiB = 1 << 20
export const passphrase = 'abc'

/** A valid image: data, compressed clusters, zeroes, two snapshots of which one has VM state, two bitmaps. */
export async function imageOf({ extendedL2 = false, encrypted = false }: ImageKind): Promise<Uint8Array> {
  const device = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(device, {
    size: 4 * MiB,
    clusterSize: extendedL2 ? 16_384 : 4096,
    extendedL2,
    ...(encrypted && { encryption: { format: 'luks' as const, passphrase, iterations: 1000 } }),
  })
  await image.write(0, new Uint8Array(65_536).fill(1))
  await image.snapshots.create({ name: 's1' })
  await image.write(4096, new Uint8Array(40_960).fill(2))
  if (!encrypted) await image.writeCompressed(2 * MiB, new Uint8Array(16_384).fill(3))
  await image.writeZeroes(32_768, 8192)
  await using writer = await image.snapshots.begin({ name: 's2' })
  await writer.write(new Uint8Array(20_000).fill(7))
  await writer.finish()
  await image.bitmaps.add({ name: 'b1', granularity: 65_536 })
  await image.bitmaps.add({ name: 'b2' })
  await image.close()
  return device.bytes.slice()
}

/** Where its fields are: header, extensions, tables, their first entries, snapshots, bitmaps, LUKS. */
export function imageFields(bytes: Uint8Array): Field[] {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const u64 = (at: number): number => Number(view.getBigUint64(at))
  const host = (at: number): number => Number(view.getBigUint64(at) & 0x00ff_ffff_ffff_fe00n)
  const fields: Field[] = []
  const add = (structure: string, start: number, list: readonly (readonly [name: string, at: number, bytes: 1 | 2 | 4 | 8])[]): void => {
    for (const [name, at, width] of list) fields.push({ name: `${structure}: ${name}`, at: start + at, bytes: width })
  }
  const entries = (structure: string, start: number, count: number): void => {
    for (let i = 0; i < count; i++) add(structure, start, [[`entry ${i}`, 8 * i, 8]])
  }
  add('header', 0, [
    ['magic', 0, 4], ['version', 4, 4], ['backing_file_offset', 8, 8], ['backing_file_size', 16, 4], ['cluster_bits', 20, 4], ['size', 24, 8], ['crypt_method', 32, 4],
    ['l1_size', 36, 4], ['l1_table_offset', 40, 8], ['refcount_table_offset', 48, 8], ['refcount_table_clusters', 56, 4], ['nb_snapshots', 60, 4], ['snapshots_offset', 64, 8],
    ['incompatible_features', 72, 8], ['compatible_features', 80, 8], ['autoclear_features', 88, 8], ['refcount_order', 96, 4], ['header_length', 100, 4], ['compression_type', 104, 1],
  ])
  for (let at = view.getUint32(100); view.getUint32(at) !== 0; at += 8 + Math.ceil(view.getUint32(at + 4) / 8) * 8) {
    const type = view.getUint32(at)
    add(`extension 0x${type.toString(16)}`, at, [['type', 0, 4], ['length', 4, 4]])
    if (type === 0x2385_2875) {
      add('bitmaps extension', at + 8, [['nb_bitmaps', 0, 4], ['reserved', 4, 4], ['bitmap_directory_size', 8, 8], ['bitmap_directory_offset', 16, 8]])
      bitmapFields(u64(at + 24), view.getUint32(at + 8))
    }
    if (type === 0x0537_be77) {
      add('encryption header pointer', at + 8, [['offset', 0, 8], ['length', 8, 8]])
      fields.push(...luksFields(u64(at + 8)))
    }
  }
  function bitmapFields(start: number, count: number): void {
    for (let i = 0, at = start; i < count; i++) {
      add(`bitmap ${i}`, at, [['table_offset', 0, 8], ['table_size', 8, 4], ['flags', 12, 4], ['type', 16, 1], ['granularity_bits', 17, 1], ['name_size', 18, 2], ['extra_data_size', 20, 4]])
      entries(`bitmap table ${i}`, u64(at), 1)
      at += Math.ceil((24 + view.getUint16(at + 18)) / 8) * 8
    }
  }
  const l1 = u64(40)
  entries('L1 table', l1, 2)
  entries('L2 table', host(l1), 6)
  const refcounts = u64(48)
  entries('refcount table', refcounts, 2)
  entries('refcount block', u64(refcounts), 2)
  for (let i = 0, at = u64(64); i < view.getUint32(60); i++) {
    add(`snapshot ${i}`, at, [
      ['l1_table_offset', 0, 8], ['l1_size', 8, 4], ['id_str_size', 12, 2], ['name_size', 14, 2], ['date_sec', 16, 4], ['date_nsec', 20, 4], ['vm_clock_nsec', 24, 8],
      ['vm_state_size', 32, 4], ['extra_data_size', 36, 4], ['vm_state_size_large', 40, 8], ['disk_size', 48, 8],
    ])
    entries(`L1 table of snapshot ${i}`, u64(at), 2)
    at += Math.ceil((40 + view.getUint32(at + 36) + view.getUint16(at + 12) + view.getUint16(at + 14)) / 8) * 8
  }
  return fields
}

/** The fields of a LUKS1 header at `start`. */
export function luksFields(start: number): Field[] {
  const header: Field[] = [
    { name: 'LUKS: version', at: 6, bytes: 2 }, { name: 'LUKS: cipher-name', at: 8, bytes: 4 }, { name: 'LUKS: cipher-mode', at: 40, bytes: 4 }, { name: 'LUKS: hash-spec', at: 72, bytes: 4 },
    { name: 'LUKS: payload-offset', at: 104, bytes: 4 }, { name: 'LUKS: key-bytes', at: 108, bytes: 4 }, { name: 'LUKS: mk-digest-iter', at: 164, bytes: 4 },
  ]
  const slot = (i: number): Field[] => [
    { name: `LUKS slot ${i}: active`, at: 208 + 48 * i, bytes: 4 }, { name: `LUKS slot ${i}: iterations`, at: 212 + 48 * i, bytes: 4 },
    { name: `LUKS slot ${i}: key-material-offset`, at: 248 + 48 * i, bytes: 4 }, { name: `LUKS slot ${i}: stripes`, at: 252 + 48 * i, bytes: 4 },
  ]
  return [...header, ...slot(0), ...slot(7)].map((field) => ({ ...field, at: field.at + start }))
}
