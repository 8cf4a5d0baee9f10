/** Images made by real QEMU over the matrix of parameters read identically, and ours look the same to it. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { canCompressZstd } from '../../src/codec/zstd.ts'
import type { CreateOptions } from '../../src/qcow2/new-image.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { describeWithQemu, qemus, type Qemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

interface Case {
  name: string
  options: string
  size: number
  backing?: { format: 'raw' | 'qcow2'; size: number }
  noCompression?: boolean
}

const MiB = 1 << 20
const matrix: Case[] = [
  ...[512, 1024, 4096, 16384, 65536, 262144, 2 * MiB].map((size) => ({ name: `clusters of ${size}`, options: `cluster_size=${size}`, size: 5 * MiB })),
  ...[1, 2, 4, 8, 16, 32, 64].map((bits) => ({ name: `${bits}-bit refcounts`, options: `cluster_size=4096,refcount_bits=${bits}`, size: 5 * MiB, noCompression: bits < 4 })),
  ...[512, 65536, 2 * MiB].map((size) => ({ name: `version 2, clusters of ${size}`, options: `compat=0.10,cluster_size=${size}`, size: 5 * MiB })),
  ...[16384, 65536, 2 * MiB].map((size) => ({ name: `extended L2, clusters of ${size}`, options: `extended_l2=on,cluster_size=${size}`, size: 5 * MiB })),
  { name: 'zstd', options: 'compression_type=zstd,cluster_size=65536', size: 5 * MiB },
  { name: 'zstd, extended L2', options: 'compression_type=zstd,extended_l2=on,cluster_size=16384', size: 5 * MiB },
  { name: 'lazy refcounts', options: 'lazy_refcounts=on', size: 5 * MiB },
  { name: 'odd size', options: 'cluster_size=65536', size: 5 * MiB + 1536 },
  { name: 'preallocated', options: 'preallocation=metadata,cluster_size=4096', size: 5 * MiB, noCompression: true },
  { name: 'preallocated, extended L2', options: 'preallocation=metadata,extended_l2=on', size: 5 * MiB, noCompression: true },
  { name: 'over a shorter raw file', options: 'cluster_size=4096', size: 5 * MiB, backing: { format: 'raw', size: 2 * MiB + 700 } },
  { name: 'over a longer qcow2 image', options: 'cluster_size=65536', size: 5 * MiB, backing: { format: 'qcow2', size: 7 * MiB } },
  { name: 'over an image, extended L2', options: 'extended_l2=on,cluster_size=65536', size: 5 * MiB, backing: { format: 'qcow2', size: 3 * MiB } },
  { name: 'version 2 over an image', options: 'compat=0.10', size: 5 * MiB, backing: { format: 'qcow2', size: 3 * MiB } },
  { name: 'external data file', options: 'data_file=DATA,cluster_size=4096', size: 5 * MiB, noCompression: true },
  { name: 'raw external data file', options: 'data_file=DATA,data_file_raw=on', size: 5 * MiB, noCompression: true },
]

const work = (compresses: boolean): string[] => [
  ...(compresses ? ['write -c -P 0x11 1M 2M', 'write -c -P 0x12 4M 64k'] : []),
  'write -P 0xaa 0 100k',
  'write -P 0xbb 300001 511',
  'write -P 0xcc 1200k 300k',
  'write -z 20k 40k',
  'write -z -u 512k 100k',
  'discard 1500k 200k',
  'write -P 0xdd 3000k 1000k',
  'write -z 3100k 3k',
  'discard 3500k 64k',
]

async function make(qemu: Qemu, folder: string, each: Case): Promise<string> {
  const file = join(folder, 'image.qcow2')
  const backing = join(folder, each.backing?.format === 'raw' ? 'base.raw' : 'base.qcow2')
  if (each.backing?.format === 'raw') writeFileSync(backing, new Uint8Array(each.backing.size).fill(0x5a))
  if (each.backing?.format === 'qcow2') {
    await qemu.imgOk('create', '-f', 'qcow2', '-o', 'cluster_size=16384', backing, String(each.backing.size))
    await qemu.io('-c', 'write -P 0x5a 0 2M', '-c', 'write -P 0x6b 2900k 100k', '-c', 'write -P 0x6c 6M 1M', backing)
  }
  const over = each.backing === undefined ? [] : ['-b', backing, '-F', each.backing.format]
  const options = each.options.replace('DATA', join(folder, 'data.raw'))
  await qemu.imgOk('create', '-f', 'qcow2', '-o', options, ...over, file, String(each.size))
  const commands = work(each.noCompression !== true).flatMap((command) => ['-c', command])
  const result = await qemu.io('-d', 'unmap', ...commands, file)
  expect(result.stdout).not.toContain('rror')
  return file
}

interface MapEntry {
  start: number
  length: number
  depth: number
  present: boolean
  zero: boolean
  data: boolean
  compressed?: boolean
  offset?: number
}

/** QEMU also asks the filesystem which data is a hole of the host file; nobody else can know. */
function normalized(entries: readonly MapEntry[], withCompressed: boolean): MapEntry[] {
  const merged: MapEntry[] = []
  for (const { start, length, depth, present, zero, data, compressed, offset } of entries) {
    const last = merged[merged.length - 1]
    const next: MapEntry = { start, length, depth, present, zero: data ? false : zero, data, ...(withCompressed ? { compressed: compressed === true } : {}), ...(offset === undefined ? {} : { offset }) }
    const follows = last?.offset === undefined ? next.offset === undefined : last.offset + last.length === next.offset
    if (last !== undefined && follows && last.depth === next.depth && last.present === next.present && last.zero === next.zero && last.data === next.data && last.compressed === next.compressed) {
      last.length += next.length
    } else merged.push(next)
  }
  return merged
}

async function extents(image: Qcow2Image): Promise<MapEntry[]> {
  const entries: MapEntry[] = []
  for await (const entry of image.map()) entries.push(entry)
  return entries
}

const inFull = (qemu: Qemu): boolean => process.env['QCOW2_LONG'] === '1' || qemu === qemus[qemus.length - 1]

describeWithQemu('images made by QEMU', (qemu) => {
  // every QEMU writes the same format; an old one takes part in full only in the long run
  for (const each of inFull(qemu) ? matrix : matrix.slice(0, 5)) {
    test(each.name, async () => {
      const folder = tempFolder()
      const file = await make(qemu, folder, each)
      const raw = join(folder, 'expected.raw')
      await qemu.imgOk('convert', '-f', 'qcow2', '-O', 'raw', file, raw)
      const expected = readFileSync(raw)
      await using image = await Qcow2Image.open(file, { readOnly: true, references: 'any' })
      expect(image.size).toBe(expected.length)
      expect(Buffer.compare(await image.read(0, image.size), expected)).toBe(0)
      for (let at = 0; at < image.size; at += 77_777) {
        const length = Math.min(33_333, image.size - at)
        expect(Buffer.compare(await image.read(at, length), expected.subarray(at, at + length))).toBe(0)
      }
      const listed = JSON.parse(await qemu.imgOk('map', '--output=json', '-f', 'qcow2', file)) as MapEntry[]
      const compressed = qemu.major >= 9
      expect(normalized(await extents(image), compressed)).toEqual(normalized(listed, compressed))
    })
  }

  test.each(['cluster_size=65536', 'cluster_size=4096', 'cluster_size=512,compat=0.10', 'extended_l2=on'])('VM state behind the active disk goes into a snapshot and comes back with it: %s', async (options) => {
    const path = join(tempFolder(), 'disk.qcow2')
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', options, path, '8M')
    const io = async (...commands: string[]): Promise<void> => {
      const { code, stdout } = await qemu.io(...commands.flatMap((command) => ['-c', command]), path)
      expect({ code, failed: stdout.includes('failed') }, stdout).toEqual({ code: 0, failed: false })
    }
    const ours = async (work: (image: Qcow2Image) => Promise<unknown>): Promise<void> => {
      await using image = await Qcow2Image.open(path)
      await work(image)
      await image.close()
      expect(await qemu.imgOk('check', path)).toContain('No errors were found')
    }
    await io('write -P 1 0 64k', 'write -b -P 5 0 300k')
    await ours((image) => image.snapshots.create({ name: 'a' }))
    await io('write -P 2 0 64k', 'write -b -P 6 0 300k', 'read -P 2 0 64k')
    await ours((image) => image.snapshots.create({ name: 'with its own', vmState: [new Uint8Array(200_000).fill(8)] }))
    await ours((image) => image.snapshots.apply('a'))
    await io('read -P 1 0 64k', 'read -b -P 5 0 300k')
    await ours((image) => image.snapshots.delete('a'))
    await io('read -P 1 0 64k', 'read -b -P 5 0 300k')
    await ours((image) => image.snapshots.apply('with its own'))
    await ours(async (image) => {
      const snapshot = await image.snapshots.open('with its own')
      expect(new Set(await snapshot.vmState.read(0, 200_000))).toEqual(new Set([8]))
      await snapshot.close()
    })
    await io('read -P 2 0 64k')
    if (options.includes('compat=0.10')) return
    await ours((image) => image.resize(600 * MiB))
    await io('read -P 2 0 64k', 'read -P 0 64k 599M')
  })

  test('a snapshot of qemu-img reads as it was', async () => {
    const folder = tempFolder()
    const file = join(folder, 'image.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', file, '4M')
    await qemu.io('-c', 'write -P 1 0 1M', file)
    await qemu.imgOk('snapshot', '-c', 'one', file)
    await qemu.io('-c', 'write -P 2 0 1M', '-c', 'write -P 3 2M 64k', file)
    await using image = await Qcow2Image.open(file)
    expect([...image.snapshots].map(({ id, name, diskSize, vmStateSize }) => ({ id, name, diskSize, vmStateSize }))).toEqual([
      { id: '1', name: 'one', diskSize: 4 * MiB, vmStateSize: 0 },
    ])
    await using snapshot = await image.snapshots.open('one')
    expect((await snapshot.read(MiB - 1, 2)).join()).toBe('1,0')
    expect((await image.read(0, 1))[0]).toBe(2)
  })
})

describeWithQemu('images made by us', (qemu) => {
  const cases: { name: string; ours: Partial<CreateOptions>; theirs: string; size?: number }[] = [
    ...[512, 4096, 65536, 2 * MiB].map((clusterSize) => ({ name: `clusters of ${clusterSize}`, ours: { clusterSize }, theirs: `cluster_size=${clusterSize}` })),
    ...[1, 2, 4, 8, 32, 64].map((refcountBits) => ({ name: `${refcountBits}-bit refcounts`, ours: { refcountBits }, theirs: `refcount_bits=${refcountBits}` })),
    { name: 'version 2', ours: { version: 2 }, theirs: 'compat=0.10' },
    { name: 'extended L2', ours: { extendedL2: true }, theirs: 'extended_l2=on' },
    { name: 'lazy refcounts', ours: { lazyRefcounts: true }, theirs: 'lazy_refcounts=on' },
    { name: 'zstd', ours: { compressionType: 'zstd' }, theirs: 'compression_type=zstd' },
    { name: 'preallocated metadata', ours: { preallocation: 'metadata' }, theirs: 'preallocation=metadata' },
    { name: 'preallocated in full', ours: { preallocation: 'full' }, theirs: 'preallocation=full' },
    { name: 'a large disk', ours: { clusterSize: 65536 }, theirs: 'cluster_size=65536', size: 2 ** 44 },
    { name: 'no disk', ours: {}, theirs: 'cluster_size=65536', size: 0 },
    { name: 'an odd size', ours: {}, theirs: 'cluster_size=65536', size: 1000 },
  ]
  for (const { name, ours, theirs, size = 8 * MiB } of inFull(qemu) ? cases : cases.slice(0, 3)) {
    test(name, async () => {
      const folder = tempFolder()
      const [mine, reference] = [join(folder, 'mine.qcow2'), join(folder, 'reference.qcow2')]
      await (await Qcow2Image.create(mine, { size, ...ours })).close()
      await qemu.imgOk('create', '-f', 'qcow2', '-o', theirs, reference, String(size))
      expect(await qemu.img('check', mine)).toMatchObject({ code: 0 })
      const info = async (file: string): Promise<unknown> => {
        const { filename: _, 'actual-size': __, children: ___, ...rest } = JSON.parse(await qemu.imgOk('info', '--output=json', file)) as Record<string, unknown>
        return rest
      }
      expect(await info(mine)).toEqual(await info(reference))
      const measured = async (file: string): Promise<string> => qemu.imgOk('measure', '--output=json', '-O', 'qcow2', file)
      expect(await measured(mine)).toBe(await measured(reference))
      if (ours.preallocation === undefined) expect(Buffer.compare(readFileSync(mine), readFileSync(reference))).toBe(0)
    })
  }

  test('an overlay', async () => {
    const folder = tempFolder()
    const base = join(folder, 'base.qcow2')
    const overlay = join(folder, 'overlay.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', base, '4M')
    await qemu.io('-c', 'write -P 9 1M 1M', base)
    await (await Qcow2Image.create(overlay, { size: 4 * MiB, backing: { file: 'base.qcow2', format: 'qcow2' } })).close()
    expect(JSON.parse(await qemu.imgOk('info', '--output=json', overlay))).toMatchObject({ 'backing-filename': 'base.qcow2', 'backing-filename-format': 'qcow2', 'full-backing-filename': base })
    expect(await qemu.io('-c', 'read -P 9 1M 1M', '-c', 'read -P 0 0 1M', overlay)).toMatchObject({ code: 0 })
  })

  test.skipIf(!canCompressZstd)('zstd clusters', async () => {
    const file = join(tempFolder(), 'image.qcow2')
    const image = await Qcow2Image.create(file, { size: 4 * MiB, compressionType: 'zstd' })
    await image.writeCompressed(0, new Uint8Array(2 * MiB).fill(7))
    await image.close()
    expect(await qemu.io('-c', 'read -P 7 0 2M', file)).toMatchObject({ code: 0 })
    expect(await qemu.img('check', file)).toMatchObject({ code: 0 })
  })

  test('external data files', async () => {
    for (const dataFileRaw of [false, true]) {
      const folder = tempFolder()
      const file = join(folder, 'image.qcow2')
      const data = join(folder, 'data.raw')
      const image = await Qcow2Image.create(file, { size: 4 * MiB, dataFile: data, dataFileRaw, references: 'any' })
      await image.write(MiB + 5, new Uint8Array(200_000).fill(3))
      await image.writeZeroes(MiB + 65536, 65536)
      await image.discard(MiB, 65536)
      const content = await image.read(0, image.size)
      await image.close()
      expect(await qemu.img('check', file)).toMatchObject({ code: 0 })
      const raw = join(folder, 'out.raw')
      await qemu.imgOk('convert', '-O', 'raw', file, raw)
      expect(Buffer.compare(readFileSync(raw), content)).toBe(0)
      if (dataFileRaw) expect(Buffer.compare(readFileSync(data), content)).toBe(0)
    }
  })
})

describe('VM state saved by QEMU', () => {
  const fixture = (name: string): Uint8Array => gunzipSync(readFileSync(join(import.meta.dirname, '../fixtures/captures', name)))
  for (const version of ['72', '100']) {
    test(`savevm of QEMU ${version}`, async () => {
      await using image = await Qcow2Image.open(new MemoryDevice(fixture(`qemu${version}-savevm.qcow2.gz`), { readOnly: true }))
      const expected = fixture(`qemu${version}-savevm.vmstate.gz`)
      const withState = [...image.snapshots].filter(({ vmStateSize }) => vmStateSize > 0)
      expect(withState.length).toBeGreaterThan(0)
      await using snapshot = await image.snapshots.open(withState[0]!.id)
      expect(snapshot.vmState.size).toBe(withState[0]!.vmStateSize)
      expect(Buffer.compare(await snapshot.vmState.read(0, snapshot.vmState.size), expected.subarray(0, snapshot.vmState.size))).toBe(0)
    })
  }
})
