/** Measure, info, compare, commit, rebase, amend, compact: against models, and against real QEMU. */
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { amendImage } from '../../src/qcow2/amend.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { commitImage } from '../../src/qcow2/commit.ts'
import { compactImage } from '../../src/qcow2/compact.ts'
import { compareDevices } from '../../src/qcow2/compare.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { measureConversion, measureQcow2 } from '../../src/qcow2/measure.ts'
import { rebaseImage, setBackingFile } from '../../src/qcow2/rebase.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 500 : 40

interface Change {
  at: number
  length: number
  /** 0 writes zeroes as metadata. */
  value: number
}

const change: fc.Arbitrary<Change> = fc.record({ at: fc.nat(), length: fc.integer({ min: 1, max: 70_000 }), value: fc.nat(3) })
const changes = fc.array(change, { maxLength: 6 })
const size = fc.integer({ min: 1, max: 400 }).map((sectors) => sectors * 512)

/** Does the changes to a device, and to plain bytes. */
async function apply(device: Qcow2Image, model: Uint8Array, list: readonly Change[]): Promise<void> {
  for (const { at, length, value } of list) {
    const offset = at % model.length
    const part = model.subarray(offset, Math.min(model.length, offset + length))
    part.fill(value)
    if (value === 0) await device.writeZeroes(offset, part.length, { unmap: length % 2 === 0 })
    else await device.write(offset, part.slice())
  }
}

function diskOf(length: number, list: readonly Change[]): Uint8Array {
  const disk = new Uint8Array(length)
  for (const { at, length: run, value } of list) disk.fill(value + 100, at % length, (at % length) + run)
  return disk
}

/** The bytes of a device in a new one: what is closed with an image is only the copy. */
const copyOf = (device: MemoryDevice): MemoryDevice => new MemoryDevice(device.bytes.slice(), { growable: true })

async function contentOf(host: MemoryDevice, backing?: Uint8Array): Promise<Uint8Array> {
  await using image = await Qcow2Image.open(copyOf(host), { readOnly: true, ...(backing === undefined ? {} : { references: () => new MemoryDevice(backing) }) })
  return await image.read(0, image.size)
}

const sound = { corruptions: 0, leaks: 0, checkErrors: 0, findings: [] }

test('commit: the backing file then reads as the overlay did, and the overlay is empty', async () => {
  await fc.assert(
    fc.asyncProperty(size, size, changes, changes, fc.constantFrom(512, 4096, 65536), async (length, baseLength, baseChanges, list, clusterSize) => {
      const base = diskOf(baseLength, baseChanges)
      const host = new MemoryDevice(0, { growable: true })
      const references = (): MemoryDevice => new MemoryDevice(base.slice(), { readOnly: true })
      const overlay = await Qcow2Image.create(host, { size: length, clusterSize, backing: { file: 'b', format: 'raw' }, references })
      const model = new Uint8Array(length)
      model.set(base.subarray(0, length))
      await apply(overlay, model, list)
      const target = new MemoryDevice(base.slice(), { growable: true })
      await commitImage(overlay, target)
      const expected = Buffer.alloc(Math.max(length, baseLength))
      expected.set(base)
      expected.set(model)
      expect(Buffer.compare(target.bytes, expected)).toBe(0)
      for await (const extent of overlay.map()) expect([extent.depth === 0 && extent.present, extent.start]).toEqual([false, extent.start])
      await overlay.flush()
      expect(await checkImage(host)).toMatchObject({ corruptions: 0 })
      expect(Buffer.compare(await contentOf(host, target.bytes), model)).toBe(0)
    }),
    { numRuns },
  )
})

describe('after a commit', () => {
  /** An overlay of 4 MiB over a base of 2 MiB that reads 1 at 0; the overlay has 2 at 1 MiB and 3 at 3 MiB. */
  const chain = async (): Promise<{ folder: string; overlay: Qcow2Image }> => {
    const folder = tempFolder()
    const base = await Qcow2Image.create(`${folder}/base.qcow2`, { size: 2 << 20 })
    await base.write(0, new Uint8Array(65536).fill(1))
    await base.close()
    const overlay = await Qcow2Image.create(`${folder}/top.qcow2`, { size: 4 << 20, backing: { file: 'base.qcow2', format: 'qcow2' } })
    await overlay.read(0, 1)
    await overlay.write(1 << 20, new Uint8Array(65536).fill(2))
    await overlay.write(3 << 20, new Uint8Array(65536).fill(3))
    return { folder, overlay }
  }
  const firstBytes = async (image: Qcow2Image): Promise<number[]> => {
    const values = []
    for (const at of [0, 1 << 20, 3 << 20]) values.push((await image.read(at, 1))[0]!)
    return values
  }

  test('the open overlay reads and writes on top of what the backing file holds now', async () => {
    const { folder, overlay } = await chain()
    const target = await Qcow2Image.open(`${folder}/base.qcow2`)
    await commitImage(overlay, target)
    await target.close()
    expect(await firstBytes(overlay)).toEqual([1, 2, 3])
    await overlay.write((1 << 20) + 512, new Uint8Array(512).fill(4))
    await overlay.close()
    await using again = await Qcow2Image.open(`${folder}/top.qcow2`)
    expect(await firstBytes(again)).toEqual([1, 2, 3])
  })

  test('a backing file given as a device is closed, unless it is the target', async () => {
    const { folder, overlay } = await chain()
    await overlay.close()
    const base = `${folder}/base.qcow2`
    const given = await Qcow2Image.open(`${folder}/top.qcow2`, { backing: await Qcow2Image.open(base, { readOnly: true }) })
    const target = await Qcow2Image.open(base)
    await commitImage(given, target)
    await target.close()
    await expect(given.read(1 << 20, 1)).rejects.toMatchObject({ code: 'ERR_CLOSED' })
    await given.close()
    const backing = await Qcow2Image.open(base)
    await using same = await Qcow2Image.open(`${folder}/top.qcow2`, { backing })
    await same.write(0, new Uint8Array(65536).fill(5))
    await commitImage(same, backing)
    expect(await firstBytes(same)).toEqual([5, 2, 3])
  })

  test('whose backing file cannot be opened again the commit is done, and nothing stale is read', async () => {
    const { folder, overlay } = await chain()
    await overlay.close()
    const [base, top] = [`${folder}/base.qcow2`, `${folder}/top.qcow2`]
    let opens = 0
    const references = (): Promise<Qcow2Image> => {
      return ++opens === 1 ? Qcow2Image.open(base, { readOnly: true }) : Promise.reject(new Error('no more descriptors'))
    }
    const lost = await Qcow2Image.open(top, { references })
    expect(await firstBytes(lost)).toEqual([1, 2, 3])
    const target = await Qcow2Image.open(base)
    await commitImage(lost, target)
    await target.close()
    expect(opens).toBe(2)
    for (const at of [0, 1 << 20, 3 << 20]) {
      await expect(lost.read(at, 1)).rejects.toMatchObject({ code: 'ERR_CLOSED', cause: { message: 'no more descriptors' } })
    }
    await lost.close()
    await using again = await Qcow2Image.open(top)
    expect(await firstBytes(again)).toEqual([1, 2, 3])
    for await (const { depth, present } of again.map()) expect(depth === 0 && present).toBe(false)
    expect(await again.check()).toMatchObject(sound)
  })

  test('that failed the overlay reads what it has itself, and nothing stale', async () => {
    const { folder, overlay } = await chain()
    const target = await Qcow2Image.open(`${folder}/base.qcow2`)
    const stop = new AbortController()
    const onProgress = (): void => stop.abort()
    await expect(commitImage(overlay, target, { signal: stop.signal, onProgress })).rejects.toThrow()
    await target.close()
    expect((await overlay.read(1 << 20, 1))[0]).toBe(2)
    await expect(overlay.read(0, 1)).rejects.toMatchObject({ code: 'ERR_CLOSED' })
    await overlay.close()
  })
})

test('rebase: the image reads the same over its new backing file, or over none', async () => {
  await fc.assert(
    fc.asyncProperty(size, changes, changes, changes, size, fc.record({ flatten: fc.boolean(), alone: fc.boolean(), compressed: fc.boolean(), version: fc.constantFrom(2 as const, 3 as const) }), fc.constantFrom(512, 4096, 65536), async (length, oldChanges, newChanges, list, newLength, { flatten, alone, compressed, version }, clusterSize) => {
      const [oldBase, newBase] = [alone ? new Uint8Array(length) : diskOf(length, oldChanges), diskOf(newLength, newChanges)]
      const host = new MemoryDevice(0, { growable: true })
      const references = (): MemoryDevice => new MemoryDevice(oldBase, { readOnly: true })
      const overlay = await Qcow2Image.create(host, { size: length, clusterSize, version, ...(alone ? {} : { backing: { file: 'old', format: 'raw' }, references }) })
      const model = oldBase.slice()
      await apply(overlay, model, list)
      await rebaseImage(overlay, flatten ? undefined : { file: 'new', format: 'raw', device: new MemoryDevice(newBase) }, { compressed })
      await overlay.flush()
      expect(await readImageInfo(host)).toMatchObject({ backingFile: flatten ? undefined : 'new', backingFormat: flatten ? undefined : 'raw' })
      expect(Buffer.compare(await contentOf(host, flatten ? undefined : newBase), model)).toBe(0)
      expect(await checkImage(host)).toMatchObject({ corruptions: 0 })
    }),
    { numRuns },
  )
})

test('compare: finds the first difference of any two disks', async () => {
  await fc.assert(
    fc.asyncProperty(size, changes, fc.option(fc.nat()), size, async (length, list, different, otherLength) => {
      const a = diskOf(length, list)
      const b = Buffer.alloc(otherLength)
      b.set(a.subarray(0, otherLength))
      if (different !== null) b[different % otherLength]! ^= 1
      const [longA, longB] = [Buffer.alloc(Math.max(length, otherLength)), Buffer.alloc(Math.max(length, otherLength))]
      longA.set(a)
      longB.set(b)
      const expected = longA.findIndex((byte, i) => byte !== longB[i])
      const result = await compareDevices(new MemoryDevice(a), new MemoryDevice(b))
      expect(result).toEqual(expected < 0 ? { equal: true, sizesDiffer: length !== otherLength } : { equal: false, offset: expected, reason: 'content' })
      if (length !== otherLength) expect(await compareDevices(new MemoryDevice(a), new MemoryDevice(b), { strict: true })).toMatchObject({ reason: 'size' })
    }),
    { numRuns },
  )
})

describe('amend', () => {
  const makeImage = async (options: { version?: 2 | 3; refcountBits?: number; clusterSize?: number }): Promise<[MemoryDevice, Uint8Array]> => {
    const host = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(host, { size: 300_032, clusterSize: 4096, ...options })
    const model = new Uint8Array(300_032)
    await apply(image, model, [{ at: 0, length: 20_000, value: 1 }, { at: 100_000, length: 40_000, value: 2 }])
    await image.snapshots.create({ name: 's' })
    await apply(image, model, [{ at: 5_000, length: 20_000, value: 3 }, { at: 100_000, length: 9_000, value: 0 }])
    await image.close()
    return [new MemoryDevice(host.bytes.slice(), { growable: true }), model]
  }

  test.each([2, 4, 8, 16, 32, 64])('refcounts of %d bits, from any other width', async (refcountBits) => {
    for (const before of [2, 16, 64]) {
      const [host, model] = await makeImage({ refcountBits: before })
      await amendImage(host, { refcountBits })
      expect(await checkImage(host)).toMatchObject(sound)
      expect(await readImageInfo(host)).toMatchObject({ refcountBits })
      expect(Buffer.compare(await contentOf(host), model)).toBe(0)
    }
  })

  test.each([1, 3])('new refcounts lie after the last cluster in use, however long the device is (%d MiB more)', async (length) => {
    const [host, model] = await makeImage({ version: 2 })
    const { imageEndOffset } = await checkImage(host)
    const device = new MemoryDevice(host.bytes.slice(), { growable: true })
    // old content of the device
    await device.write(host.size, new Uint8Array(length << 20).fill(0xee))
    await amendImage(device, { version: 3, refcountBits: 64 })
    expect(await checkImage(device)).toMatchObject(sound)
    expect((await checkImage(device)).imageEndOffset).toBeLessThan(imageEndOffset + 16 * 4096)
    expect(Buffer.compare(await contentOf(device), model)).toBe(0)
  })

  test('a width that cannot hold a count changes nothing', async () => {
    const [host, model] = await makeImage({})
    await expect(amendImage(host, { refcountBits: 1 })).rejects.toMatchObject({ code: 'ERR_RANGE' })
    expect(await checkImage(host)).toMatchObject(sound)
    expect(Buffer.compare(await contentOf(host), model)).toBe(0)
  })

  /** Two guest clusters that share a host cluster, which refcounts of 1 bit cannot say. */
  const makeOverflown = async (): Promise<MemoryDevice> => {
    const host = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(host, { size: 1 << 20, clusterSize: 4096, refcountBits: 1 })
    await image.write(0, new Uint8Array(4096).fill(5))
    await image.close()
    const view = new DataView(host.bytes.buffer, host.bytes.byteOffset)
    const l2 = view.getUint32(Number(view.getBigUint64(40)) + 4)
    view.setBigUint64(l2 + 8, view.getBigUint64(l2))
    return new MemoryDevice(host.bytes.slice(), { growable: true })
  }

  test('more references than the refcounts can count: wider ones make the image sound', async () => {
    const host = await makeOverflown()
    const before = await checkImage(host)
    expect(before.corruptions).toBeGreaterThan(0)
    expect(before.findings[0]!.message).toContain('amend the image to wider ones')
    const damaged = host.bytes.slice()
    await expect(amendImage(host, { lazyRefcounts: true })).rejects.toMatchObject({ code: 'ERR_CORRUPT' })
    expect(Buffer.compare(host.bytes, damaged)).toBe(0)
    await amendImage(host, { refcountBits: 2 })
    expect(await checkImage(host)).toMatchObject(sound)
    await using image = await Qcow2Image.open(host)
    await image.write(0, new Uint8Array(4096).fill(6))
    expect([(await image.read(0, 1))[0], (await image.read(4096, 1))[0]]).toEqual([6, 5])
  })

  test('a downgrade after that knows which clusters are shared', async () => {
    const host = await makeOverflown()
    const view = new DataView(host.bytes.buffer, host.bytes.byteOffset)
    const l2 = view.getUint32(Number(view.getBigUint64(40)) + 4)
    // the second entry reads as zeroes and keeps the host cluster, which the first has as data
    view.setBigUint64(l2 + 8, view.getBigUint64(l2) | 1n)
    await amendImage(host, { version: 2, refcountBits: 16 })
    expect(await checkImage(host)).toMatchObject(sound)
    await using image = await Qcow2Image.open(host, { readOnly: true })
    expect([(await image.read(0, 1))[0], (await image.read(4096, 1))[0]]).toEqual([5, 0])
  })

  test('wider refcounts mend no other damage', async () => {
    const host = await makeOverflown()
    const view = new DataView(host.bytes.buffer, host.bytes.byteOffset)
    const l2 = view.getUint32(Number(view.getBigUint64(40)) + 4)
    view.setBigUint64(l2 + 16, 0x8000_0000_0001_0200n)
    const damaged = host.bytes.slice()
    await expect(amendImage(host, { refcountBits: 64 })).rejects.toMatchObject({ code: 'ERR_CORRUPT' })
    expect(Buffer.compare(host.bytes, damaged)).toBe(0)
  })

  test('version 2 to 3 and back: zero clusters and snapshots read the same', async () => {
    const [host, model] = await makeImage({ version: 2 })
    await amendImage(host, { version: 3, lazyRefcounts: true, refcountBits: 8 })
    expect(await readImageInfo(host)).toMatchObject({ version: 3, lazyRefcounts: true, refcountBits: 8, snapshots: [{ name: 's' }] })
    expect(await checkImage(host)).toMatchObject(sound)
    const image = await Qcow2Image.open(copyOf(host))
    await image.writeZeroes(0, 8192)
    await image.close()
    await amendImage(host, { version: 2, lazyRefcounts: false, refcountBits: 16 })
    expect(await readImageInfo(host)).toMatchObject({ version: 2, refcountBits: 16 })
    expect(await checkImage(host)).toMatchObject(sound)
    expect(Buffer.compare(await contentOf(host), model)).toBe(0)
  })

  test('version 2 over a backing file: what zero clusters hid stays hidden, in the disk and in snapshots', async () => {
    const clusterSize = 512
    const base = new Uint8Array(80_000).fill(0xb)
    const over = (host: MemoryDevice): Promise<Qcow2Image> => Qcow2Image.open(copyOf(host), { backing: new MemoryDevice(base) })
    const change = fc.record({ at: fc.integer({ min: 0, max: 155 }), clusters: fc.integer({ min: 1, max: 90 }), kind: fc.constantFrom('write', 'zero', 'keep', 'snapshot') })
    await fc.assert(
      fc.asyncProperty(fc.array(change, { maxLength: 12 }), async (changes) => {
        const file = new MemoryDevice(0, { growable: true })
        const image = await Qcow2Image.create(file, { size: base.length, clusterSize, backing: { file: 'base', format: 'raw' }, references: () => new MemoryDevice(base) })
        const snapshots: string[] = []
        for (const { at, clusters, kind } of changes) {
          const start = at * clusterSize
          const length = Math.min(base.length - start, clusters * clusterSize)
          if (kind === 'write') await image.write(start, new Uint8Array(length).fill(snapshots.length + 1))
          else if (kind === 'snapshot') snapshots.push((await image.snapshots.create({ name: `s${snapshots.length}` })).id)
          else await image.writeZeroes(start, length, { unmap: kind === 'zero' })
        }
        await image.close()
        const host = copyOf(file)
        const read = async (): Promise<Uint8Array[]> => {
          await using opened = await over(host)
          const layers = [await opened.read(0, base.length)]
          for (const id of snapshots) {
            await opened.snapshots.apply(id)
            layers.push(await opened.read(0, base.length))
          }
          return layers
        }
        const before = await read()
        await amendImage(host, { version: 2 })
        expect(await checkImage(host)).toMatchObject(sound)
        expect(await readImageInfo(host)).toMatchObject({ version: 2 })
        expect((await read()).map((layer, i) => Buffer.compare(layer, before[i]!))).toEqual(before.map(() => 0))
      }),
      { numRuns: process.env['QCOW2_LONG'] === '1' ? 500 : 40 },
    )
  })

  test('version 2 of an encrypted image: zero clusters stay zeroes, and are refused where they would need the key', async () => {
    for (const backing of [undefined, new MemoryDevice(1 << 20)]) {
      const host = new MemoryDevice(0, { growable: true })
      const image = await Qcow2Image.create(host, {
        size: 1 << 20,
        clusterSize: 4096,
        encryption: { format: 'aes', passphrase: 'secret' },
        ...(backing === undefined ? {} : { backing: { file: 'base', format: 'raw' }, references: () => backing }),
      })
      await image.write(0, new Uint8Array(40_960).fill(5))
      await image.writeZeroes(0, 8192, { unmap: false })
      await image.flush()
      const amended = amendImage(host, { version: 2 })
      if (backing !== undefined) {
        await expect(amended).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', features: ['zero clusters'] })
        continue
      }
      await amended
      expect(await checkImage(host)).toMatchObject(sound)
      await using opened = await Qcow2Image.open(copyOf(host), { passphrase: 'secret' })
      expect([...new Set(await opened.read(4096, 4096)), ...new Set(await opened.read(8192, 4096))]).toEqual([0, 5])
    }
  })

  test('a downgrade tells how many L1 entries it went through', async () => {
    const host = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(host, { size: 8 << 20, clusterSize: 4096 })
    for (const at of [0, 2 << 20, 6 << 20]) await image.write(at, new Uint8Array(4096).fill(1))
    await image.flush()
    const told: number[] = []
    await amendImage(host, { version: 2, onProgress: ({ done, total }) => told.push(done, total) })
    expect(told).toEqual([0, 4, 1, 4, 2, 4, 3, 4, 4, 4])
  })

  test('version 2 has no bitmaps: their clusters are free', async () => {
    const host = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(host, { size: 1 << 20, clusterSize: 4096 })
    await image.bitmaps.add({ name: 'b' })
    await image.flush()
    await amendImage(host, { version: 2 })
    expect(await checkImage(host)).toMatchObject(sound)
    expect(await readImageInfo(host)).toMatchObject({ version: 2, bitmaps: [] })
  })

  test('version 2 takes an image made for zstd as long as nothing is compressed, not even in a snapshot', async () => {
    const host = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(host, { size: 1 << 20, clusterSize: 4096, compressionType: 'zstd' })
    await image.write(0, new Uint8Array(4096).fill(1))
    await image.flush()
    const packed = new MemoryDevice(0, { growable: true })
    const other = await Qcow2Image.create(packed, { size: 1 << 20, clusterSize: 4096 })
    await other.writeCompressed(8192, new Uint8Array(4096).fill(2))
    await other.snapshots.create({ name: 's' })
    await other.write(8192, new Uint8Array(4096).fill(3))
    await other.flush()
    packed.bytes[79] = 8
    packed.bytes[104] = 1
    expect(await readImageInfo(packed)).toMatchObject({ compressionType: 'zstd' })
    await expect(amendImage(packed, { version: 2 })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', features: ['compressed clusters of type zstd'] })
  })

  test('what version 2 does not have is named', async () => {
    const host = new MemoryDevice(0, { growable: true })
    await (await Qcow2Image.create(host, { size: 1 << 20, clusterSize: 16384, extendedL2: true, compressionType: 'zstd' })).flush()
    await expect(amendImage(host, { version: 2 })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', features: ['extended L2 entries'] })
    await expect(amendImage(host, { refcountBits: 3 })).rejects.toThrow(RangeError)
    // nor is anything else changed that was asked for along with it
    const narrow = new MemoryDevice(0, { growable: true })
    await (await Qcow2Image.create(narrow, { size: 1 << 20, clusterSize: 16384, extendedL2: true, refcountBits: 8 })).flush()
    const before = narrow.bytes.slice()
    await expect(amendImage(narrow, { version: 2, refcountBits: 16, lazyRefcounts: false })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
    expect(Buffer.compare(narrow.bytes, before)).toBe(0)
    await expect(amendImage(host, { dataFile: 'x' })).rejects.toThrow(TypeError)
  })
})

test('compact: cuts what nothing uses at the end, and nothing else', async () => {
  const host = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(host, { size: 1 << 20, clusterSize: 4096 })
  await image.write(0, new Uint8Array(409_600).fill(7))
  await image.discard(102_400, 307_200)
  await image.close()
  const file = copyOf(host)
  const before = file.size
  const given = await compactImage(file)
  expect(given).toBeGreaterThan(200_000)
  expect(file.size).toBe(before - given)
  expect(await checkImage(file)).toMatchObject({ ...sound, imageEndOffset: file.size })
  const model = new Uint8Array(1 << 20).fill(7, 0, 102_400)
  expect(Buffer.compare(await contentOf(file), model)).toBe(0)
  expect(await compactImage(file)).toBe(0)
})

describeWithQemu('operations', (qemu) => {
  test('measure: every number equals qemu-img, over sizes, clusters, refcounts and entries', async () => {
    for (const size of [0, 1024, 10 << 20, 1 << 30, 1e14 - (1e14 % 512)]) {
      for (const [clusterSize, refcountBits, extendedL2] of [[512, 1, false], [512, 64, false], [4096, 16, false], [65536, 16, false], [65536, 16, true], [2 << 20, 64, true]] as const) {
        const options = `cluster_size=${clusterSize},refcount_bits=${refcountBits},extended_l2=${extendedL2 ? 'on' : 'off'}`
        const { code, stdout } = await qemu.img('measure', '--output=json', '-O', 'qcow2', '-o', options, '--size', String(size))
        if (code !== 0) continue
        const theirs = JSON.parse(stdout) as Record<string, number>
        const ours = measureQcow2(size, { clusterSize, refcountBits, extendedL2 })
        expect({ options, size, ...ours }).toEqual({ options, size, required: theirs['required'], fullyAllocated: theirs['fully-allocated'], bitmaps: 0 })
      }
    }
  })

  test('measure of a source equals qemu-img', async () => {
    const path = `${tempFolder()}/a.qcow2`
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4096', path, '20M')
    await qemu.io('-c', 'write 0 100k', '-c', 'write 5M 1M', '-c', 'write -z 8M 64k', '-c', 'write 19M 4k', path)
    await qemu.imgOk('bitmap', '--add', path, 'b')
    const theirs = JSON.parse(await qemu.imgOk('measure', '--output=json', '-O', 'qcow2', path)) as Record<string, number>
    await using image = await Qcow2Image.open(path, { readOnly: true })
    const ours = await measureConversion(image, { bitmaps: await image.bitmaps.list() })
    expect(ours).toEqual({ required: theirs['required'], fullyAllocated: theirs['fully-allocated'], bitmaps: theirs['bitmaps'] })
  })

  test('info equals qemu-img, field by field', async () => {
    const folder = tempFolder()
    writeFileSync(`${folder}/base.raw`, new Uint8Array(1 << 20))
    const shapes = ['compat=0.10', 'lazy_refcounts=on,refcount_bits=32', 'compression_type=zstd,cluster_size=16k,extended_l2=on', `data_file=${folder}/d.raw,data_file_raw=on`, `backing_file=base.raw,backing_fmt=raw`]
    for (const [i, options] of shapes.entries()) {
      const path = `${folder}/${i}.qcow2`
      await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', options, path, '1M')
      if (i < 3) await qemu.imgOk('snapshot', '-c', `snap ${i}`, path)
      if (i === 1 || i === 2) await qemu.imgOk('bitmap', '--add', '-g', '32k', path, 'bits')
      const theirs = JSON.parse(await qemu.imgOk('info', '--output=json', path)) as Record<string, unknown> & { 'format-specific': { data: Record<string, unknown> }; snapshots?: Record<string, unknown>[] }
      const data = theirs['format-specific'].data
      await using host = await openFile(path, { readOnly: true })
      const info = await readImageInfo(host)
      expect({
        'virtual-size': info.virtualSize,
        'cluster-size': info.clusterSize,
        'dirty-flag': info.dirty,
        backing: info.backingFile,
        'backing-format': info.backingFormat,
        compat: info.version === 2 ? '0.10' : '1.1',
        'refcount-bits': info.refcountBits,
        'compression-type': info.compressionType,
        'lazy-refcounts': info.version === 2 ? undefined : info.lazyRefcounts,
        'extended-l2': info.version === 2 ? undefined : info.extendedL2,
        'data-file': info.dataFile,
        'data-file-raw': info.externalData ? info.dataFileRaw : undefined,
        bitmaps: info.bitmaps.length === 0 ? undefined : info.bitmaps.map(({ name, granularity, auto, inUse }) => ({ name, granularity, flags: [...(inUse ? ['in-use'] : []), ...(auto ? ['auto'] : [])] })),
        snapshots: info.snapshots.map(({ id, name, vmStateSize }) => ({ id, name, vmStateSize })),
      }).toEqual({
        'virtual-size': theirs['virtual-size'],
        'cluster-size': theirs['cluster-size'],
        'dirty-flag': theirs['dirty-flag'],
        backing: theirs['backing-filename'],
        'backing-format': theirs['backing-filename-format'],
        compat: data['compat'],
        'refcount-bits': data['refcount-bits'],
        'compression-type': data['compression-type'],
        'lazy-refcounts': data['lazy-refcounts'],
        'extended-l2': data['extended-l2'],
        'data-file': data['data-file'],
        'data-file-raw': data['data-file-raw'],
        bitmaps: data['bitmaps'],
        snapshots: (theirs.snapshots ?? []).map((snapshot) => ({ id: snapshot['id'], name: snapshot['name'], vmStateSize: snapshot['vm-state-size'] })),
      })
    }
  })

  test('QEMU accepts what amend made of its image, and reads the same', async () => {
    const folder = tempFolder()
    const path = `${folder}/a.qcow2`
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', 'compat=0.10,cluster_size=4096', path, '4M')
    await qemu.io('-c', 'write -P 1 0 100k', '-c', 'write -c -P 9 1M 4k', path)
    await qemu.imgOk('snapshot', '-c', 's', path)
    await qemu.io('-c', 'write -P 2 50k 100k', path)
    copyFileSync(path, `${folder}/before.qcow2`)
    for (const options of [{ version: 3 as const, refcountBits: 64 }, { refcountBits: 2 }, { refcountBits: 16, lazyRefcounts: true }, { version: 2 as const, lazyRefcounts: false }]) {
      {
        await using host = await openFile(path)
        await amendImage(host, options)
      }
      expect(await qemu.img('check', path)).toMatchObject({ code: 0 })
      expect(await qemu.img('compare', `${folder}/before.qcow2`, path)).toMatchObject({ code: 0 })
      await qemu.imgOk('snapshot', '-a', 's', path)
      await qemu.imgOk('snapshot', '-a', 's', `${folder}/before.qcow2`)
      expect(await qemu.img('compare', `${folder}/before.qcow2`, path)).toMatchObject({ code: 0 })
    }
  })

  test('amend to version 2 leaves alone what a snapshot reads from the cluster of a zero cluster', async () => {
    const path = `${tempFolder()}/disk.qcow2`
    await qemu.imgOk('create', '-q', '-f', 'qcow2', path, '8M')
    expect(await qemu.io('-c', 'write -P 0x11 0 64k', '-c', 'write -P 0x22 64k 64k', path)).toMatchObject({ code: 0 })
    await qemu.imgOk('snapshot', '-c', 's', path)
    expect(await qemu.io('-c', 'write -z 0 64k', path)).toMatchObject({ code: 0 })
    const host = await openFile(path)
    await amendImage(host, { version: 2 })
    expect(await checkImage(host)).toMatchObject(sound)
    await host.close()
    await using image = await Qcow2Image.open(path)
    expect([(await image.read(0, 1))[0], (await image.read(65536, 1))[0]]).toEqual([0, 0x22])
    await image.snapshots.apply('s')
    expect([(await image.read(0, 1))[0], (await image.read(65536, 1))[0]]).toEqual([0x11, 0x22])
  })

  test('commit and unsafe rebase are seen by qemu-img', async () => {
    const folder = tempFolder()
    await qemu.imgOk('create', '-q', '-f', 'qcow2', `${folder}/base.qcow2`, '2M')
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', `${folder}/top.qcow2`)
    await qemu.io('-c', 'write -P 5 64k 300k', '-c', 'write -z 1M 64k', `${folder}/top.qcow2`)
    await qemu.imgOk('convert', '-O', 'raw', `${folder}/top.qcow2`, `${folder}/before.raw`)
    {
      await using top = await Qcow2Image.open(`${folder}/top.qcow2`)
      await using base = await Qcow2Image.open(`${folder}/base.qcow2`)
      await commitImage(top, base)
    }
    expect(await qemu.img('check', `${folder}/base.qcow2`)).toMatchObject({ code: 0 })
    expect(await qemu.img('check', `${folder}/top.qcow2`)).toMatchObject({ code: 0 })
    expect(await qemu.img('compare', '-f', 'raw', `${folder}/before.raw`, `${folder}/base.qcow2`)).toMatchObject({ code: 0 })
    copyFileSync(`${folder}/base.qcow2`, `${folder}/other.qcow2`)
    {
      await using top = await Qcow2Image.open(`${folder}/top.qcow2`)
      await setBackingFile(top, { file: 'other.qcow2', format: 'qcow2' })
    }
    expect(JSON.parse(await qemu.imgOk('info', '--output=json', `${folder}/top.qcow2`))).toMatchObject({ 'backing-filename': 'other.qcow2' })
    expect(await qemu.img('compare', '-f', 'raw', `${folder}/before.raw`, `${folder}/top.qcow2`)).toMatchObject({ code: 0 })
    expect(readFileSync(`${folder}/before.raw`).length).toBe(2 << 20)
  })
})
