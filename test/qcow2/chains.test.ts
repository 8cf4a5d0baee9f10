/**
 * Whatever walks a backing chain, over chains whose files are all of different lengths: against plain bytes, and a
 * sample against real QEMU. A file that ends early reads as zeroes from there on; nothing below it shows through.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import type { BlockDevice, Extent } from '../../src/block/device.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { commitImage } from '../../src/qcow2/commit.ts'
import { compareDevices } from '../../src/qcow2/compare.ts'
import { convertToQcow2 } from '../../src/qcow2/convert.ts'
import { copyDevice } from '../../src/qcow2/copy.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { measureConversion } from '../../src/qcow2/measure.ts'
import { rebaseImage } from '../../src/qcow2/rebase.ts'
import { expectBytes } from '../support/bytes.ts'
import { describeWithQemu } from '../support/qemu.ts'
import '../support/seed.ts'
import { tempFolder } from '../support/temp.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 1000 : 60
const sector = 512

interface Change {
  readonly kind: 'data' | 'zeroes' | 'zero clusters'
  readonly at: number
  readonly sectors: number
  readonly byte: number
}

interface Layer {
  readonly sectors: number
  readonly clusterSize: number
  readonly version: 2 | 3
  readonly extendedL2: boolean
  readonly raw: boolean
  readonly changes: readonly Change[]
}

const change: fc.Arbitrary<Change> = fc.record({
  kind: fc.constantFrom('data', 'data', 'zeroes', 'zero clusters'),
  at: fc.nat({ max: 2000 }),
  sectors: fc.constantFrom(1, 7, 8, 128, 500),
  byte: fc.integer({ min: 1, max: 255 }),
})

const layer: fc.Arbitrary<Layer> = fc.record({
  sectors: fc.oneof(fc.constantFrom(64, 128, 256, 512), fc.integer({ min: 1, max: 700 })),
  clusterSize: fc.constantFrom(512, 4096, 16384, 65536),
  version: fc.constantFrom(3, 3, 3, 2),
  extendedL2: fc.boolean(),
  raw: fc.boolean(),
  changes: fc.array(change, { maxLength: 4 }),
})

/** The lowest first. */
const chainOf = (minLength: number): fc.Arbitrary<Layer[]> => fc.array(layer, { minLength, maxLength: 4 })

/** The files of a chain, and what each reads as. */
interface Chain {
  readonly layers: readonly Layer[]
  readonly files: readonly MemoryDevice[]
  readonly contents: readonly Uint8Array[]
}

const isRaw = (layers: readonly Layer[], index: number): boolean => index === 0 && layers[0]!.raw
const formatOf = (layers: readonly Layer[], index: number): string => (isRaw(layers, index) ? 'raw' : 'qcow2')

async function makeChain(layers: readonly Layer[]): Promise<Chain> {
  const files: MemoryDevice[] = []
  const contents: Uint8Array[] = []
  for (const [index, { sectors, clusterSize, version, extendedL2, changes }] of layers.entries()) {
    const content = new Uint8Array(sectors * sector)
    content.set((contents[index - 1] ?? content).subarray(0, content.length))
    const file = new MemoryDevice(isRaw(layers, index) ? content.slice() : new Uint8Array(0), { growable: true })
    files.push(file)
    contents.push(content)
    const device = isRaw(layers, index) ? file : await Qcow2Image.create(keepOpen(file), {
      size: content.length,
      clusterSize,
      version,
      extendedL2: extendedL2 && version === 3 && clusterSize >= 16384,
      ...(index === 0 ? {} : { backing: { file: names[index - 1]!, format: formatOf(layers, index - 1) }, references: () => openAt({ layers, files, contents }, index - 1) }),
    })
    for (const { kind, at, sectors: length, byte } of changes) {
      const offset = (at % sectors) * sector
      const part = content.subarray(offset, offset + length * sector)
      part.fill(kind === 'data' ? byte : 0)
      await (kind === 'zero clusters' ? device.writeZeroes(offset, part.length) : device.write(offset, part.slice()))
    }
    if (device !== file) await device.close()
  }
  return { layers, files, contents }
}

const names = ['base', 'low', 'middle', 'top']

/** The file, not closed with what stands on it. */
function keepOpen(file: MemoryDevice): MemoryDevice {
  file.close = () => Promise.resolve()
  return file
}

/** One layer of a chain over those below it. */
async function openAt({ layers, files }: Pick<Chain, 'layers' | 'files'> & Partial<Chain>, index: number, options: { readonly readOnly?: boolean } = {}): Promise<BlockDevice> {
  const { readOnly = true } = options
  if (isRaw(layers, index)) return keepOpen(new MemoryDevice(files[index]!.bytes, { readOnly }))
  const backing = index === 0 ? undefined : await openAt({ layers, files }, index - 1)
  return Qcow2Image.open(keepOpen(files[index]!), { readOnly, backing })
}

async function openTop(chain: Chain, options: { readonly readOnly?: boolean } = {}): Promise<Qcow2Image> {
  return imageOf(await openAt(chain, chain.layers.length - 1, options))
}

function imageOf(device: BlockDevice | undefined): Qcow2Image {
  if (!(device instanceof Qcow2Image)) throw new TypeError('no image')
  return device
}

async function readAll(device: BlockDevice): Promise<Uint8Array> {
  return device.read(0, device.size)
}

/** Bytes of another length: cut, or with zeroes. */
function resized(content: Uint8Array, length: number): Uint8Array {
  const bytes = new Uint8Array(length)
  bytes.set(content.subarray(0, length))
  return bytes
}

test('map and read agree on every chain', async () => {
  await fc.assert(
    fc.asyncProperty(chainOf(1), async (layers) => {
      const chain = await makeChain(layers)
      await using top = await openAt(chain, layers.length - 1)
      const content = chain.contents.at(-1)!
      expectBytes(await readAll(top), content)
      let at = 0
      for await (const { start, length, zero, depth, present, data } of top.map()) {
        expect(start).toBe(at)
        at += length
        if (zero) expect(content.subarray(start, at).every((byte) => byte === 0)).toBe(true)
        else expect(data).toBe(true)
        if (present) {
          const owner = chain.contents[layers.length - 1 - depth]!
          expectBytes(owner.subarray(start, at), content.subarray(start, at))
        }
      }
      expect(at).toBe(content.length)
    }),
    { numRuns },
  )
})

test('commit, any number of files down, leaves in the target what the overlay reads, and changes nothing above', async () => {
  await fc.assert(
    fc.asyncProperty(chainOf(2), fc.nat(), fc.boolean(), async (layers, down, own) => {
      const chain = await makeChain(layers)
      const depth = 1 + (down % (layers.length - 1))
      const index = layers.length - 1 - depth
      const overlay = await openTop(chain, { readOnly: false })
      let target = await openAt(chain, index, { readOnly: false })
      if (own) {
        // the target is the very device that the overlay stands on
        await target.close()
        target = deviceBelow(overlay, depth)
        if (target.readOnly) return
      }
      const before = chain.contents[index]!
      const content = chain.contents.at(-1)!
      if (isRaw(layers, index) && content.length > before.length) return // of fixed size here
      await commitImage(overlay, target, { depth })
      await target.close()
      await overlay.close()
      const expected = resized(before, Math.max(before.length, content.length))
      expected.set(content)
      await using committed = await openAt(chain, index)
      expectBytes(await readAll(committed), expected)
      await using top = await openTop(chain)
      expectBytes(await readAll(top), content)
      expect(await checkImage(chain.files.at(-1)!)).toMatchObject({ corruptions: 0 })
    }),
    { numRuns: 3 * numRuns },
  )
})

test('a cluster with subclusters of several kinds is emptied as a whole', async () => {
  const base = new Uint8Array(65536).fill(1)
  const file = keepOpen(new MemoryDevice(0, { growable: true }))
  const below = (): MemoryDevice => new MemoryDevice(base, { growable: true })
  const overlay = await Qcow2Image.create(file, { size: 65536, clusterSize: 65536, extendedL2: true, backing: { file: 'b', format: 'raw' }, references: below })
  await overlay.writeZeroes(2048, 2048)
  await overlay.write(8192, new Uint8Array(2048).fill(2))
  await overlay.discard(0, 65536)
  expect((await overlay.read(0, 65536)).every((byte) => byte === 0)).toBe(true)
  await overlay.flush()
  expect(await overlay.check()).toMatchObject({ allocatedClusters: 0 })
  await overlay.forget(0, 65536)
  expectBytes(await readAll(overlay), base)
  await overlay.writeZeroes(2048, 2048)
  const target = below()
  await commitImage(overlay, target)
  await overlay.close()
  expect(base.fill(0, 2048, 4096)).toEqual(target.bytes)
  await using again = await Qcow2Image.open(file, { readOnly: true, backing: target })
  expectBytes(await readAll(again), base)
})

function deviceBelow(overlay: Qcow2Image, depth: number): BlockDevice {
  let device: BlockDevice = overlay
  for (let i = 0; i < depth; i++) device = imageOf(device).engine.backing!
  return device
}

test('rebase onto any file, or none, of the chain or another, changes nothing that is read', async () => {
  await fc.assert(
    fc.asyncProperty(chainOf(2), chainOf(1), fc.option(fc.nat()), fc.boolean(), fc.boolean(), async (layers, others, down, inChain, compressed) => {
      const chain = await makeChain(layers)
      const other = inChain ? { ...chain, layers: layers.slice(0, -1) } : await makeChain(others)
      const index = down === null ? -1 : down % other.layers.length
      const image = await openTop(chain, { readOnly: false })
      const below = index < 0 ? undefined : await openAt(other, index)
      const backing = below && { file: 'new', format: formatOf(other.layers, index), device: below }
      await rebaseImage(image, backing, { compressed })
      await image.close()
      const content = chain.contents.at(-1)!
      await using again = await Qcow2Image.open(chain.files.at(-1)!, { readOnly: true, backing: below ?? new MemoryDevice(0) })
      expectBytes(await readAll(again), content)
      expect(await checkImage(chain.files.at(-1)!)).toMatchObject({ corruptions: 0 })
    }),
    { numRuns: 2 * numRuns },
  )
})

test('copies are what the chain reads, whole or over its own backing file', async () => {
  const how = fc.record({ over: fc.boolean(), compressed: fc.boolean(), sparseSize: fc.constantFrom(0, 512, 4096, 65536), clusterSize: fc.constantFrom(512, 4096, 65536), version: fc.constantFrom(2 as const, 3 as const) })
  await fc.assert(
    fc.asyncProperty(chainOf(1), how, async (layers, { over, compressed, sparseSize, clusterSize, version }) => {
      const chain = await makeChain(layers)
      const content = chain.contents.at(-1)!
      const top = await openAt(chain, layers.length - 1)
      const below = over && layers.length > 1 ? await openAt(chain, layers.length - 2) : undefined
      const backing = below && { file: 'base', format: formatOf(layers, layers.length - 2) }
      const converted = keepOpen(new MemoryDevice(0, { growable: true }))
      const options = { clusterSize, version, ...(backing === undefined ? {} : { backing }) }
      await convertToQcow2(top, converted, { ...options, compressed, sparseSize, workers: 1 })
      const copied = keepOpen(new MemoryDevice(0, { growable: true }))
      const target = await Qcow2Image.create(copied, { ...options, size: content.length, references: () => below! })
      await copyDevice(top, target, { skipBacking: below !== undefined, compressed, sparseSize })
      expectBytes(await readAll(target), content)
      if (below === undefined) await target.close()
      const { required } = await measureConversion(top, { clusterSize })
      if (below === undefined && version === 3 && sparseSize === 65536) expect(required).toBeGreaterThanOrEqual(converted.size)
      await using image = await Qcow2Image.open(converted, { readOnly: true, backing: below ?? new MemoryDevice(0) })
      expectBytes(await readAll(image), content)
      for (const file of [converted, copied]) expect(await checkImage(file)).toMatchObject({ corruptions: 0 })
      expect(await compareDevices(top, image, { strict: false })).toMatchObject({ equal: true })
    }),
    { numRuns },
  )
})

test('compare finds the first difference between any two chains', async () => {
  await fc.assert(
    fc.asyncProperty(chainOf(1), chainOf(1), fc.boolean(), async (layers, others, same) => {
      const [a, b] = [await makeChain(layers), await makeChain(same ? [...layers, ...others].slice(0, 4) : others)]
      await using left = await openAt(a, a.layers.length - 1)
      await using right = await openAt(b, b.layers.length - 1)
      const length = Math.max(left.size, right.size)
      const [one, two] = [resized(a.contents.at(-1)!, length), resized(b.contents.at(-1)!, length)]
      const offset = one.findIndex((byte, at) => byte !== two[at])
      expect(await compareDevices(left, right)).toEqual(offset < 0 ? { equal: true, sizesDiffer: left.size !== right.size } : { equal: false, offset, reason: 'content' })
    }),
    { numRuns },
  )
})

describeWithQemu('chains of files of any length', (qemu) => {
  test('commit to any file, and the map, equal qemu-img', { timeout: 120_000 }, async () => {
    await fc.assert(
      fc.asyncProperty(chainOf(2), fc.nat(), async (layers, down) => {
        const chain = await makeChain(layers)
        const depth = 1 + (down % (layers.length - 1))
        const index = layers.length - 1 - depth
        const folder = tempFolder()
        const paths = names.map((name) => `${folder}/${name}`)
        const top = paths[layers.length - 1]!
        const write = (): void => chain.files.forEach((file, at) => writeFileSync(paths[at]!, file.bytes.subarray(0, file.size)))
        write()
        const flags = (extents: readonly Pick<Extent, 'start' | 'length' | 'depth' | 'present' | 'zero' | 'data'>[]): unknown[] => extents.map(({ start, length, depth: at, present, zero, data }) => [start, length, at, present, zero, data])
        const theirs = JSON.parse(await qemu.imgOk('map', '--output=json', '-f', 'qcow2', top)) as Extent[]
        const ours: Extent[] = []
        const image = await Qcow2Image.open(top)
        for await (const extent of image.map()) ours.push(extent)
        if (!isRaw(layers, 0)) expect(merged(flags(ours))).toEqual(merged(flags(theirs)))
        const target = isRaw(layers, index) ? new MemoryDevice(readFileSync(paths[index]!), { growable: true }) : await Qcow2Image.open(paths[index]!)
        await commitImage(image, target, { depth })
        const result = await readAll(target)
        await target.close()
        await image.close()
        write()
        const committing = await qemu.img('commit', '-q', '-f', 'qcow2', ...(depth === 1 ? [] : ['-b', paths[index]!]), top)
        // it cannot make an overlay of version 2 longer
        if (index > 0 && layers[index]!.version === 2 && committing.code !== 0) return
        expect(committing).toMatchObject({ code: 0 })
        if (isRaw(layers, index)) {
          const bytes = readFileSync(paths[index]!)
          expectBytes(resized(result, bytes.length), bytes)
          return
        }
        await using committed = await Qcow2Image.open(paths[index]!, { readOnly: true })
        expectBytes(result, await readAll(committed))
      }),
      { numRuns: process.env['QCOW2_LONG'] === '1' ? 200 : 8 },
    )
  })
})

/** Neighbours that differ in nothing but where they are, as one. */
function merged(extents: readonly unknown[]): unknown[] {
  const result: number[][] = []
  for (const extent of extents as number[][]) {
    const last = result.at(-1)
    if (last !== undefined && last.slice(2).every((flag, at) => flag === extent[at + 2])) last[1]! += extent[1]!
    else result.push([...extent])
  }
  return result
}
