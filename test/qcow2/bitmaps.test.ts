import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import type { DirtyRange } from '../../src/qcow2/bitmaps-bits.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

async function rangesOf(image: Qcow2Image, name: string): Promise<DirtyRange[]> {
  const ranges: DirtyRange[] = []
  for await (const range of image.bitmaps.read(name)) ranges.push(range)
  return ranges
}

const sound = { corruptions: 0, leaks: 0, checkErrors: 0, findings: [] }

test('any sequence of changes keeps the image sound and the list right', async () => {
  const step = fc.record({
    what: fc.constantFrom('add', 'remove', 'enable', 'disable', 'clear', 'merge'),
    name: fc.constantFrom('a', 'b', 'ein längerer Name'),
    other: fc.constantFrom('a', 'b'),
    granularity: fc.integer({ min: 9, max: 20 }),
  })
  await fc.assert(
    fc.asyncProperty(fc.array(step, { maxLength: 10 }), fc.constantFrom(512, 4096, 65536), async (steps, clusterSize) => {
      const host = new MemoryDevice(0, { growable: true })
      const image = await Qcow2Image.create(host, { size: 3 << 20, clusterSize })
      const model = new Map<string, { granularity: number; auto: boolean }>()
      for (const { what, name, other, granularity } of steps) {
        const known = model.get(name)
        const act = (): Promise<void> => {
          if (what === 'add') return image.bitmaps.add({ name, granularity: 2 ** granularity })
          return what === 'merge' ? image.bitmaps.merge(name, other) : image.bitmaps[what](name)
        }
        if (what === 'add' ? known !== undefined : known === undefined || (what === 'merge' && !model.has(other))) {
          await expect(act()).rejects.toMatchObject({ code: what === 'add' ? 'ERR_EXISTS' : 'ERR_NOT_FOUND' })
          continue
        }
        await act()
        if (what === 'add') model.set(name, { granularity: 2 ** granularity, auto: true })
        else if (what === 'remove') model.delete(name)
        else if (what === 'enable' || what === 'disable') known!.auto = what === 'enable'
      }
      expect(await image.bitmaps.list()).toEqual([...model].map(([name, each]) => ({ name, inUse: false, ...each })))
      expect(await checkImage(host)).toMatchObject(sound)
      await image.close()
    }),
    { numRuns: 40 },
  )
})

test('several changes after opening an image that has bitmaps already', async () => {
  const bytes = new MemoryDevice(0, { growable: true })
  const first = await Qcow2Image.create(bytes, { size: 3 << 20 })
  await first.bitmaps.add({ name: 'a' })
  await first.bitmaps.add({ name: 'b' })
  await first.flush()
  const image = await Qcow2Image.open(new MemoryDevice(bytes.bytes.slice(), { growable: true }))
  await image.bitmaps.add({ name: 'c' })
  await image.bitmaps.disable('c')
  await image.bitmaps.remove('a')
  await image.bitmaps.merge('b', 'c')
  expect(await image.bitmaps.list()).toMatchObject([{ name: 'b', auto: true }, { name: 'c', auto: false }])
  expect(await image.check()).toMatchObject(sound)
})

test('ranges of another image are merged in', async () => {
  const image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 3 << 20 })
  await image.bitmaps.add({ name: 'a', granularity: 65536 })
  // eslint-disable-next-line @typescript-eslint/require-await -- what a bitmap gives is asynchronous
  async function* ranges(): AsyncGenerator<DirtyRange, void, undefined> {
    yield { offset: 100, length: 10 }
    yield { offset: 1 << 20, length: 65537 }
    yield { offset: (3 << 20) - 1, length: 1 << 30 }
  }
  await image.bitmaps.merge('a', ranges())
  const dirty = []
  for await (const range of image.bitmaps.read('a')) dirty.push(range)
  expect(dirty).toEqual([
    { offset: 0, length: 65536 },
    { offset: 1 << 20, length: 131072 },
    { offset: (3 << 20) - 65536, length: 65536 },
  ])
})

test('ranges may come from requests to the image itself', async () => {
  await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 8 << 20 })
  await image.write(1 << 20, new Uint8Array(65536).fill(1))
  await image.bitmaps.add({ name: 'b' })
  async function* allocated(): AsyncGenerator<DirtyRange> {
    for await (const { start, length, data } of image.map()) if (data) yield { offset: start, length }
  }
  await image.bitmaps.merge('b', allocated())
  expect(await rangesOf(image, 'b')).toEqual([{ offset: 1 << 20, length: 65536 }])
})

test('writing marks enabled bitmaps as in use, and only these', async () => {
  const host = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(host, { size: 1 << 20 })
  await image.bitmaps.add({ name: 'on' })
  await image.bitmaps.add({ name: 'off', disabled: true })
  await image.write(0, new Uint8Array(512))
  await image.flush()
  expect(await image.bitmaps.list()).toMatchObject([{ name: 'on', inUse: true }, { name: 'off', inUse: false }])
  await expect(rangesOf(image, 'on')).rejects.toMatchObject({ code: 'ERR_CORRUPT' })
  await expect(image.bitmaps.clear('on')).rejects.toMatchObject({ code: 'ERR_CORRUPT' })
  expect(await rangesOf(image, 'off')).toEqual([])
  await image.bitmaps.remove('on')
  await image.bitmaps.add({ name: 'late' })
  await image.write(4096, new Uint8Array(512))
  expect(await image.bitmaps.list()).toMatchObject([{ name: 'off', inUse: false }, { name: 'late', inUse: true }])
  await image.flush()
  expect(await checkImage(host)).toMatchObject(sound)
})

test("caller's mistakes are refused", async () => {
  const image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 1 << 40 })
  await expect(image.bitmaps.add({ name: '' })).rejects.toThrow(RangeError)
  await expect(image.bitmaps.add({ name: 'x', granularity: 1000 })).rejects.toThrow(RangeError)
  await expect(image.bitmaps.add({ name: 'x', granularity: 256 })).rejects.toThrow(RangeError)
  const old = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 1 << 20, version: 2 })
  await expect(old.bitmaps.add({ name: 'x' })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
})

describeWithQemu('bitmaps', (qemu) => {
  test('bits that QEMU set are read as ranges, merged and copied', async () => {
    const path = `${tempFolder()}/a.qcow2`
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4096', path, '64M')
    await qemu.imgOk('bitmap', '--add', '-g', '4k', path, 'fine')
    await qemu.io('-c', 'write 0 64k', '-c', 'write 10M 1M', path)
    await qemu.imgOk('bitmap', '--disable', path, 'fine')
    await qemu.imgOk('bitmap', '--add', '-g', '64k', path, 'coarse')
    await qemu.io('-c', 'write 63M 1M', '-c', 'write 100k 1k', path)
    {
      await using image = await Qcow2Image.open(path)
      expect(await rangesOf(image, 'fine')).toEqual([{ offset: 0, length: 65536 }, { offset: 10 << 20, length: 1 << 20 }])
      expect(await rangesOf(image, 'coarse')).toEqual([{ offset: 65536, length: 65536 }, { offset: 63 << 20, length: 1 << 20 }])
      await image.bitmaps.add({ name: 'both', granularity: 8192 })
      await image.bitmaps.merge('both', 'fine')
      await image.bitmaps.merge('both', 'coarse')
      await image.bitmaps.clear('coarse')
      expect(await rangesOf(image, 'both')).toEqual([{ offset: 0, length: 131072 }, { offset: 10 << 20, length: 1 << 20 }, { offset: 63 << 20, length: 1 << 20 }])
    }
    expect(await qemu.img('check', path)).toMatchObject({ code: 0 })
    const info = JSON.parse(await qemu.imgOk('info', '--output=json', path)) as { 'format-specific': { data: { bitmaps: unknown } } }
    expect(info['format-specific'].data.bitmaps).toEqual([
      { name: 'fine', granularity: 4096, flags: [] },
      { name: 'coarse', granularity: 65536, flags: ['auto'] },
      { name: 'both', granularity: 8192, flags: ['auto'] },
    ])
    // QEMU reads our bits: merged into a bitmap of its own they come back the same
    await qemu.imgOk('bitmap', '--add', '-g', '4k', path, 'theirs')
    await qemu.imgOk('bitmap', '--merge', 'both', path, 'theirs')
    await using image = await Qcow2Image.open(path, { readOnly: true })
    expect(await rangesOf(image, 'theirs')).toEqual(await rangesOf(image, 'both'))
  })

  test('after a write here QEMU sees which bitmap must not be trusted', async () => {
    const path = `${tempFolder()}/b.qcow2`
    await qemu.imgOk('create', '-q', '-f', 'qcow2', path, '1M')
    await qemu.imgOk('bitmap', '--add', path, 'b')
    {
      await using image = await Qcow2Image.open(path)
      await image.write(0, new Uint8Array(512))
    }
    expect(await qemu.img('check', path)).toMatchObject({ code: 0 })
    const info = JSON.parse(await qemu.imgOk('info', '--output=json', path)) as { 'format-specific': { data: { bitmaps: unknown } } }
    expect(info['format-specific'].data.bitmaps).toMatchObject([{ name: 'b', flags: ['in-use', 'auto'] }])
  })
})
