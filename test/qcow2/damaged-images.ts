/** Small images of many kinds made by a real QEMU, and ways to damage their metadata. */
import { readFileSync } from 'node:fs'
import fc from 'fast-check'
import { expect } from 'vitest'
import type { Qemu } from '../support/qemu.ts'

/** Makes images that together use every structure a check walks. */
export async function makeImages(qemu: Qemu, folder: string): Promise<Map<string, Uint8Array>> {
  const images = new Map<string, Uint8Array>()
  const make = async (name: string, options: string, size: string, ...steps: (string | string[])[]): Promise<void> => {
    const path = `${folder}/${name}.qcow2`
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', options, path, size)
    for (const step of steps) {
      if (typeof step === 'string') {
        const result = await qemu.io(...step.split(', ').flatMap((command) => ['-c', command]), path)
        expect(result).toMatchObject({ code: 0 })
      } else {
        // the image's path stands where the step says so, else at the end
        await qemu.imgOk(...(step.includes('@') ? step.map((word) => (word === '@' ? path : word)) : [...step, path]))
      }
    }
    images.set(name, readFileSync(path))
  }
  const snapshot = (name: string): string[] => ['snapshot', '-c', name]
  await make(
    '4 KiB clusters, two snapshots',
    'cluster_size=4096',
    '8M',
    'write -P 1 0 40k, write -P 2 3M 12k, write -z 100k 20k',
    snapshot('s1'),
    'write -P 3 4k 8k, write -z 3M 4k, discard 0 4k, write -c -P 7 200k 4k, write -c -P 8 204k 4k',
    snapshot('s2'),
  )
  await make('512-byte clusters, 2-bit refcounts', 'cluster_size=512,refcount_bits=2', '1M', 'write -P 1 0 40k, write -c -P 9 60k 512', snapshot('s1'), 'write -P 3 4k 8k')
  await make('extended L2', 'cluster_size=16k,extended_l2=on', '8M', 'write -P 1 0 40k, write -P 2 3M 1k, write -z 100k 2k, write -c -P 7 208k 16k', snapshot('s1'), 'write -P 3 4k 8k')
  await make('version 2', 'cluster_size=4096,compat=0.10', '8M', 'write -P 1 0 40k, write -c -P 7 204k 4k', snapshot('s1'), 'write -P 3 4k 8k')
  await make('bitmaps', 'cluster_size=4096', '8M', ['bitmap', '--add', '-g', '4k', '@', 'b0'], 'write -P 1 0 40k, write -P 1 5M 40k', ['bitmap', '--add', '@', 'b1'])
  await make('64-bit refcounts', 'refcount_bits=64', '8M', 'write -P 1 0 140k, write -c -P 7 640k 64k', snapshot('s1'))
  return images
}

/** One damage: eight bytes somewhere in the metadata become something else. */
export interface Damage {
  readonly region: number
  readonly position: number
  readonly how: 'zero' | 'flip bit' | 'other cluster' | 'flip COPIED' | 'byte'
  readonly value: number
}

export const damages: fc.Arbitrary<Damage[]> = fc.array(
  fc.record({
    region: fc.nat(),
    position: fc.nat(),
    how: fc.constantFrom('zero', 'flip bit', 'other cluster', 'flip COPIED', 'byte'),
    value: fc.nat(),
  }),
  { minLength: 1, maxLength: 3 },
)

/** The image with the damages done, preferring places that are not empty. */
export function damage(image: Uint8Array, list: readonly Damage[]): Uint8Array {
  const bytes = Buffer.from(image)
  for (const { region, position, how, value } of list) {
    const regions = metadataOf(bytes)
    const [start, length] = regions[region % regions.length]!
    const at = fullPlace(bytes, start, Math.min(length, bytes.length - start), position)
    if (at === undefined) continue
    const clusterSize = 1 << bytes.readUInt32BE(20)
    if (how === 'zero') bytes.fill(0, at, at + 8)
    else if (how === 'byte') bytes[at + (value % 8)] = value >>> 8
    else if (how === 'flip COPIED') bytes[at] = bytes[at]! ^ 0x80
    else if (how === 'flip bit') bytes[at + (value % 8)] = bytes[at + (value % 8)]! ^ (1 << ((value >>> 3) % 8))
    else {
      const cluster = BigInt((value >>> 2) % (Math.ceil(bytes.length / clusterSize) + 3)) * BigInt(clusterSize)
      bytes.writeBigUInt64BE(cluster | ((value & 1) === 0 ? 0n : 1n << 63n) | ((value & 2) === 0 ? 0n : 1n), at)
    }
  }
  return bytes
}

function fullPlace(bytes: Buffer, start: number, length: number, position: number): number | undefined {
  const count = Math.floor(length / 8)
  for (let i = 0; i < count; i++) {
    const at = start + ((position + i) % count) * 8
    if (bytes.readBigUInt64BE(at) !== 0n) return at
  }
  return undefined
}

/** Where L1, L2, refcount and snapshot tables are, as [offset, length]. */
function metadataOf(bytes: Buffer): [number, number][] {
  const clusterSize = 1 << bytes.readUInt32BE(20)
  const pointer = (at: number): number => (at + 8 <= bytes.length ? Number(bytes.readBigUInt64BE(at) & 0xff_ffff_ffff_fe00n) : 0)
  const valid = (offset: number): boolean => offset > 0 && offset + 8 <= bytes.length
  const regions: [number, number][] = []
  const tree = (offset: number, entries: number): void => {
    if (!valid(offset)) return
    regions.push([offset, entries * 8])
    for (let i = 0; i < entries; i++) if (valid(pointer(offset + i * 8))) regions.push([pointer(offset + i * 8), clusterSize])
  }
  tree(pointer(40), bytes.readUInt32BE(36))
  tree(pointer(48), 8)
  if (bytes.readUInt32BE(60) > 0) {
    regions.push([pointer(64), 40])
    tree(pointer(pointer(64)), bytes.readUInt32BE(36))
  }
  return regions
}
