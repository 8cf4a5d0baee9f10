import { readFileSync, writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { amendImage } from '../../src/qcow2/amend.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { compactImage } from '../../src/qcow2/compact.ts'
import { convertToQcow2, type ConvertToQcow2Options } from '../../src/qcow2/convert.ts'
import { copyDevice } from '../../src/qcow2/copy.ts'
import type { ConvertProgress } from '../../src/qcow2/convert-progress.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { diskOf, type DiskPiece } from '../support/disk.ts'
import { tempFolder } from '../support/temp.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 1000 : 80

const piece = fc.record({
  length: fc.oneof(fc.integer({ min: 1, max: 3000 }), fc.integer({ min: 1, max: 60_000 }), fc.constantFrom(512, 4096, 65536, 131072)),
  kind: fc.constantFrom('zero', 'text', 'noise'),
})
const disk = fc.array(piece, { maxLength: 12 }).map((pieces) => diskOf(pieces as DiskPiece[]))

const options: fc.Arbitrary<ConvertToQcow2Options> = fc
  .record({
    clusterBits: fc.integer({ min: 9, max: 18 }),
    refcountBits: fc.constantFrom(1, 2, 4, 8, 16, 32, 64),
    extendedL2: fc.boolean(),
    version: fc.constantFrom(2 as const, 3 as const, 3 as const),
    compressed: fc.boolean(),
    sparseSize: fc.constantFrom(0, 4096),
  })
  .map(({ clusterBits, refcountBits, extendedL2, version, compressed, sparseSize }) => ({
    clusterSize: 2 ** (extendedL2 && version === 3 ? Math.max(14, clusterBits) : clusterBits),
    version,
    ...(version === 3 ? { refcountBits, extendedL2 } : {}),
    compressed,
    workers: 1,
    sparseSize,
  }))

async function contentOf(image: Qcow2Image): Promise<Uint8Array> {
  return image.read(0, image.size)
}

test('any disk converts to an image that is sound and reads the same, with any parameters', async () => {
  await fc.assert(
    fc.asyncProperty(disk, options, async (bytes, chosen) => {
      const host = new MemoryDevice(0, { growable: true })
      await convertToQcow2(new MemoryDevice(bytes), host, chosen)
      expect(await checkImage(host)).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0, findings: [] })
      await using image = await Qcow2Image.open(host, { readOnly: true })
      expect(Buffer.compare(await contentOf(image), bytes)).toBe(0)
    }),
    { numRuns },
  )
})

test('an image copies onto any device, and nothing of what was there remains', async () => {
  await fc.assert(
    fc.asyncProperty(disk, fc.boolean(), fc.constantFrom(0, 512, 4096, 65536), async (bytes, growable, sparseSize) => {
      const host = new MemoryDevice(0, { growable: true })
      await convertToQcow2(new MemoryDevice(bytes), host, { clusterSize: 4096 })
      const target = new MemoryDevice(growable ? 0 : new Uint8Array(bytes.length).fill(0xdd), { growable })
      await using image = await Qcow2Image.open(host, { readOnly: true })
      await copyDevice(image, target, { sparseSize })
      expect(Buffer.compare(target.bytes, bytes)).toBe(0)
    }),
    { numRuns },
  )
})

/** Host offsets of the data of an image, in the order of the disk. */
async function placesOf(image: Qcow2Image): Promise<number[]> {
  const places: number[] = []
  for await (const extent of image.map()) if (extent.kind === 'data') places.push(extent.offset!)
  return places
}

test('what is copied into an image lies there in the order of the disk, whichever read ends first', async () => {
  const source = new MemoryDevice(diskOf([{ length: 12 << 20, kind: 'noise' }]))
  const readInto = source.readInto.bind(source)
  let reads = 0
  const uneven = Object.assign(source, {
    readInto: async (offset: number, target: Uint8Array) => {
      await new Promise((resolve) => setTimeout(resolve, reads++ % 4 === 0 ? 6 : 1))
      await readInto(offset, target)
    },
  })
  await using target = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: source.size })
  await copyDevice(uneven, target)
  expect(await placesOf(target)).toHaveLength(1)
  expect(Buffer.compare(await contentOf(target), source.bytes)).toBe(0)
})

test('zeroes that version 2 stores over a backing file lie in the order of the disk', async () => {
  const backing = { file: 'base.raw', format: 'raw' }
  const size = (8 << 20) + 70_144
  const references = (): MemoryDevice => new MemoryDevice(new Uint8Array(size).fill(0xbb))
  await using target = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size, version: 2, backing, references })
  await copyDevice(new MemoryDevice(size), target)
  expect(await placesOf(target)).toHaveLength(1)
  expect((await contentOf(target)).every((byte) => byte === 0)).toBe(true)
})

test('an overlay holds only what its source holds itself, zeroes included', async () => {
  await fc.assert(
    fc.asyncProperty(disk, fc.array(fc.record({ at: fc.oneof(fc.nat(), fc.nat({ max: 600 }).map((sectors) => sectors * 512)), length: fc.oneof(fc.integer({ min: 1, max: 40_000 }), fc.constantFrom(512, 4096, 16384)), kind: fc.constantFrom('data', 'zeroes', 'zero clusters') }), { maxLength: 5 }), fc.constantFrom(512, 4096, 65536), fc.constantFrom(512, 4096, 16384), fc.constantFrom('all', 'a part', 'nothing'), async (bytes, writes, clusterSize, sourceClusters, below) => {
      if (bytes.length === 0) return
      const backing = { file: 'base.raw', format: 'raw' }
      const sourceHost = new MemoryDevice(0, { growable: true })
      const reach = below === 'all' ? bytes.length : below === 'a part' ? Math.ceil(bytes.length / 1024) * 512 : 0
      const isOver = reach > 0 ? { backing, references: () => new MemoryDevice(bytes.subarray(0, reach)) } : {}
      await using source = await Qcow2Image.create(sourceHost, { size: bytes.length, clusterSize: sourceClusters, ...isOver })
      const model = bytes.slice().fill(0, reach)
      for (const { at, length, kind } of writes) {
        const offset = at % bytes.length
        const part = model.subarray(offset, Math.min(bytes.length, offset + length))
        part.fill(kind === 'data' ? 0x5a : 0)
        await (kind === 'zero clusters' ? source.writeZeroes(offset, part.length) : source.write(offset, part.slice()))
      }
      const host = new MemoryDevice(0, { growable: true })
      await convertToQcow2(source, host, { clusterSize, backing, ...(below === 'a part' ? { backingSize: bytes.length } : {}) })
      expect(await checkImage(host)).toMatchObject({ corruptions: 0, leaks: 0 })
      await using image = await Qcow2Image.open(host, { readOnly: true, references: () => new MemoryDevice(bytes) })
      expect(Buffer.compare(await contentOf(image), model)).toBe(0)
      if (below !== 'all') return
      let allocated = 0
      for await (const extent of image.map()) if (extent.depth === 0 && extent.present) allocated += extent.length
      const touched = writes.reduce((sum, { length }) => sum + length + 2 * clusterSize + 2 * sourceClusters, 0)
      expect(allocated).toBeLessThanOrEqual(touched)
    }),
    { numRuns: Math.ceil(numRuns / 2) },
  )
})

test('a large disk over a small backing file stores nothing for what reads as zeroes by itself', async () => {
  const backing = { file: 'base.raw', format: 'raw' }
  const over = { backing, references: () => new MemoryDevice(new Uint8Array(100_352).fill(3)) }
  await using source = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 2 ** 40, ...over })
  await source.write(1 << 20, new Uint8Array(512).fill(4))
  const host = new MemoryDevice(0, { growable: true })
  await convertToQcow2(source, host, { backing })
  expect(host.size).toBeLessThan(1 << 20)
  await using image = await Qcow2Image.open(host, { readOnly: true, references: over.references })
  expect([(await image.read(0, 1))[0], (await image.read(100_352, 1))[0], (await image.read(1 << 20, 1))[0]]).toEqual([3, 0, 4])
})

test('a failing source fails the conversion, ends what is under way and leaves no image', async () => {
  const source = new MemoryDevice(diskOf([{ length: 8 << 20, kind: 'text' }]))
  let reads = 0
  const readInto = source.readInto.bind(source)
  const failing = Object.assign(source, {
    readInto: (offset: number, target: Uint8Array) => (++reads === 5 ? Promise.reject(new Error('no more')) : readInto(offset, target)),
  })
  for (const compressed of [false, true]) {
    reads = 0
    const host = new MemoryDevice(0, { growable: true })
    await expect(convertToQcow2(failing, host, { compressed, workers: 2 })).rejects.toThrow('no more')
    await expect(checkImage(host)).rejects.toMatchObject({ code: 'ERR_FORMAT' })
  }
})

test('progress counts what is copied, a MiB at a time, not the holes', async () => {
  const source = new MemoryDevice(0, { growable: true })
  await using image = await Qcow2Image.create(source, { size: 1 << 30 })
  for (const at of [0, 2 << 20, 512 << 20]) await image.write(at, new Uint8Array(1 << 20).fill(7))
  const done = [1 << 20, 2 << 20, 3 << 20, 3 << 20]
  const seen: ConvertProgress[] = []
  const onProgress = (progress: ConvertProgress): void => void seen.push(progress)
  await convertToQcow2(image, new MemoryDevice(0, { growable: true }), { onProgress })
  expect(seen).toEqual(done.map((bytes) => ({ done: bytes, total: 3 << 20 })))
  seen.length = 0
  await using target = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 1 << 30 })
  await copyDevice(image, target, { targetIsZero: true, onProgress })
  expect(seen).toEqual(done.map((bytes) => ({ done: bytes, total: 3 << 20 })))
})

test('it can be aborted, and tells how far it is', async () => {
  const source = new MemoryDevice(diskOf([{ length: 8 << 20, kind: 'text' }]))
  const controller = new AbortController()
  const seen: number[] = []
  const converting = convertToQcow2(source, new MemoryDevice(0, { growable: true }), {
    signal: controller.signal,
    onProgress: ({ done }) => {
      seen.push(done)
      if (seen.length === 2) controller.abort(new Error('enough'))
    },
  })
  await expect(converting).rejects.toThrow('enough')
  expect(seen.length).toBeGreaterThanOrEqual(2)
  expect(seen.length).toBeLessThan(8)
})

describeWithQemu('convert', (qemu) => {
  const bytes = diskOf([
    { length: 300_000, kind: 'text' },
    { length: 5_000_000, kind: 'zero' },
    { length: 400_000, kind: 'noise' },
    { length: 2_000_000, kind: 'text' },
    { length: 70_000, kind: 'zero' },
    { length: 1024, kind: 'text' },
  ])
  const shapes: ConvertToQcow2Options[] = [
    {},
    { compressed: true },
    { clusterSize: 512, refcountBits: 1, compressed: true },
    { clusterSize: 512, refcountBits: 64 },
    { clusterSize: 2 << 20, compressed: true },
    { clusterSize: 16384, extendedL2: true, compressed: true },
    { version: 2, clusterSize: 4096, compressed: true },
    { clusterSize: 4096, sparseSize: 0 },
  ]

  test.each(shapes)('qemu-img agrees with an image converted here: %o', async (shape) => {
    const folder = tempFolder()
    writeFileSync(`${folder}/source.raw`, bytes)
    {
      await using source = await openFile(`${folder}/source.raw`, { readOnly: true })
      await using host = await openFile(`${folder}/ours.qcow2`, { create: 'w' })
      await convertToQcow2(source, host, shape)
    }
    expect(await qemu.img('check', '-f', 'qcow2', `${folder}/ours.qcow2`)).toMatchObject({ code: 0 })
    expect(await qemu.img('compare', '-f', 'raw', '-F', 'qcow2', `${folder}/source.raw`, `${folder}/ours.qcow2`)).toMatchObject({ code: 0 })
  })

  test.each([0, 512, 4096, 8192, 65536, 1 << 20])('zeroes of %i bytes and more are left out where qemu-img leaves them out', async (sparseSize) => {
    const folder = tempFolder()
    const source = Buffer.alloc(4 << 20)
    for (const [at, length] of [[0, 1024], [8192, 1024], [17 << 10, 1024], [60_000, 9000], [300 << 10, 512], [(1 << 20) - 512, 512], [3 << 20, 4096]] as const) {
      source.fill(1 + (at % 251), at, at + length)
    }
    writeFileSync(`${folder}/source.raw`, source)
    await qemu.imgOk('convert', '-f', 'raw', '-O', 'qcow2', '-S', `${sparseSize}`, '-o', 'cluster_size=512', `${folder}/source.raw`, `${folder}/theirs.qcow2`)
    await convertToQcow2(new MemoryDevice(source), `${folder}/ours.qcow2`, { clusterSize: 512, sparseSize })
    const dataOf = async (name: string): Promise<unknown[]> => {
      const extents = JSON.parse(await qemu.imgOk('map', '--output=json', '-f', 'qcow2', `${folder}/${name}.qcow2`)) as { start: number; length: number; data: boolean }[]
      const merged: { start: number; end: number }[] = []
      for (const { start, length, data } of extents) {
        if (!data) continue
        if (merged.at(-1)?.end === start) merged.at(-1)!.end += length
        else merged.push({ start, end: start + length })
      }
      return merged
    }
    expect(await dataOf('ours')).toEqual(await dataOf('theirs'))
    expect(await qemu.img('compare', '-f', 'raw', '-F', 'qcow2', `${folder}/source.raw`, `${folder}/ours.qcow2`)).toMatchObject({ code: 0 })
  })

  test.each(['zlib', 'zstd'])('images compressed by qemu-img (%s) read the same', async (type) => {
    const folder = tempFolder()
    writeFileSync(`${folder}/source.raw`, bytes)
    await qemu.imgOk('convert', '-f', 'raw', '-O', 'qcow2', '-c', '-o', `compression_type=${type}`, `${folder}/source.raw`, `${folder}/theirs.qcow2`)
    await using image = await Qcow2Image.open(`${folder}/theirs.qcow2`, { readOnly: true })
    await using target = await openFile(`${folder}/out.raw`, { create: 'w' })
    await copyDevice(image, target)
    expect(Buffer.compare(readFileSync(`${folder}/out.raw`), bytes)).toBe(0)
  })
})

test('the path of a target is a file that does not exist yet', async () => {
  const path = `${tempFolder()}/copy.qcow2`
  const content = new Uint8Array(100_352).fill(7)
  await convertToQcow2(new MemoryDevice(content), path)
  await using image = await Qcow2Image.open(path, { readOnly: true })
  expect(Buffer.compare(await contentOf(image), content)).toBe(0)
  // it could be the source itself
  await expect(convertToQcow2(image, path)).rejects.toMatchObject({ code: 'ERR_EXISTS' })
  expect(await checkImage(path)).toMatchObject({ corruptions: 0, leaks: 0 })
})

test('amend and compact take a path', async () => {
  const path = `${tempFolder()}/disk.qcow2`
  await convertToQcow2(new MemoryDevice(1 << 20), path)
  await amendImage(path, { refcountBits: 8 })
  expect(await readImageInfo(path)).toMatchObject({ refcountBits: 8 })
  expect(await compactImage(path)).toBe(0)
})
