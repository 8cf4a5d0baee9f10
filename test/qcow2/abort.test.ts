/** A signal ends long operations between two steps, with its reason, and leaves a consistent image. */
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { tempFolder } from '../support/temp.ts'

const MiB = 1 << 20
const GiB = 2 ** 30
const sound = { leaks: 0, corruptions: 0, checkErrors: 0 }
const size = MiB / 2
const reason = new Error('enough')
const again = (device: MemoryDevice): MemoryDevice => new MemoryDevice(device.bytes.slice(), { growable: true })

async function* everyOther(): AsyncGenerator<{ offset: number; length: number }> {
  for (let offset = 0; offset < size; offset += 1024) yield await Promise.resolve({ offset, length: 512 })
}

const operations: Record<string, (image: Qcow2Image, signal: AbortSignal) => Promise<unknown>> = {
  'write': (image, signal) => image.write(0, new Uint8Array(size).fill(9), { signal }),
  'write compressed': (image, signal) => image.writeCompressed(0, new Uint8Array(size).fill(9), { signal }),
  'write zeroes': (image, signal) => image.writeZeroes(0, size, { signal }),
  'write zeroes, unmap': (image, signal) => image.writeZeroes(0, size, { signal, unmap: true }),
  'discard': (image, signal) => image.discard(0, size, { signal }),
  'shrink': (image, signal) => image.resize(512, { signal }),
  'create a snapshot': ({ snapshots }, signal) => snapshots.create({ name: 'new', signal }),
  'create a snapshot with VM state': ({ snapshots }, signal) => snapshots.create({ name: 'new', vmState: [new Uint8Array(MiB)], signal }),
  'apply a snapshot': ({ snapshots }, signal) => snapshots.apply('old', { signal }),
  'merge a bitmap': ({ bitmaps }, signal) => bitmaps.merge('b', everyOther(), { signal }),
}

/** Small clusters, all of them data, half of them shared with a snapshot. */
async function seeded(): Promise<MemoryDevice> {
  const device = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(device, { size, clusterSize: 512 })
  await image.write(0, new Uint8Array(size).fill(1))
  await image.snapshots.create({ name: 'old' })
  await image.write(0, new Uint8Array(size / 2).fill(2))
  await image.bitmaps.add({ name: 'b', granularity: 512 })
  await image.close()
  return device
}

/** The bytes that may be there: what was, or what was to be. */
function expectMixture(bytes: Uint8Array, allowed: readonly number[]): void {
  expect(allowed).toEqual(expect.arrayContaining([...new Set(bytes)]))
}

/** Waits for turns of the microtask queue, and now and then for one of the event loop. */
async function turns(count: number): Promise<void> {
  for (let i = 1; i <= count; i++) await (i % 200 === 0 ? new Promise((resolve) => setImmediate(resolve)) : Promise.resolve())
}

/** Aborts after so many turns; false if the operation was done by then. */
async function abortedAfter(operation: (image: Qcow2Image, signal: AbortSignal) => Promise<unknown>, seed: MemoryDevice, delay: number): Promise<boolean> {
  const device = again(seed)
  const image = await Qcow2Image.open(device)
  const abort = new AbortController()
  const outcome = operation(image, abort.signal).then(() => 'done', (error: unknown) => error)
  await turns(delay)
  abort.abort(reason)
  const done = (await outcome) === 'done'
  if (!done) {
    expect(await outcome).toBe(reason)
    expect(image.size).toBe(size)
    expect([...image.snapshots].map(({ name }) => name)).toEqual(['old'])
    expectMixture(await image.read(0, size), [0, 1, 2, 9])
  }
  expect(await image.check()).toMatchObject(sound)
  await image.write(0, new Uint8Array(512).fill(7))
  await image.snapshots.create({ name: 'after' })
  await image.close()
  expect(await checkImage(again(device))).toMatchObject(sound)
  await using reopened = await Qcow2Image.open(again(device))
  await using old = await reopened.snapshots.open('old')
  expectMixture(await old.read(0, size), [1])
  return !done
}

describe('aborted at any moment', () => {
  for (const [name, operation] of Object.entries(operations)) {
    test(name, { timeout: 60_000 }, async () => {
      const seed = await seeded()
      let aborted = 0
      for (let delay = 0; await abortedAfter(operation, seed, delay); delay = Math.ceil(delay * 1.5 + 1)) aborted++
      expect(aborted).toBeGreaterThan(1)
    })
  }

  test('growing over a longer backing file', async () => {
    const backing = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size })
    const device = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(device, { size: 512, clusterSize: 512, backing: { file: 'backing', format: 'qcow2' }, references: () => backing })
    const abort = new AbortController()
    const growing = image.resize(size, { signal: abort.signal }).catch((error: unknown) => error)
    await turns(150)
    abort.abort(reason)
    expect(await growing).toBe(reason)
    expect(image.size).toBe(512)
    await image.resize(size)
    await image.close()
    expect(await checkImage(again(device))).toMatchObject(sound)
  })

  test('growing over a raw data file, and growing again', async () => {
    const folder = tempFolder()
    const path = join(folder, 'image.qcow2')
    const image = await Qcow2Image.create(path, { size: MiB, clusterSize: 512, dataFile: join(folder, 'data.raw'), dataFileRaw: true })
    await image.write(0, new Uint8Array(MiB).fill(1))
    const abort = new AbortController()
    const entries = image.engine.l1Table.length
    const growing = image.resize(256 * MiB, { signal: abort.signal }).catch((error: unknown) => error)
    const mapped = (): number => image.engine.l1Table.offsetAt(entries)
    while (image.engine.l1Table.length === entries || mapped() === 0) await new Promise((resolve) => setImmediate(resolve))
    abort.abort(reason)
    expect(await growing).toBe(reason)
    expect(image.size).toBe(MiB)
    await image.resize(4 * MiB)
    expectMixture(await image.read(0, MiB), [1])
    expectMixture(await image.read(MiB, 3 * MiB), [0])
    await image.close()
    await using device = await openFile(path, { readOnly: true })
    expect(await checkImage(device)).toMatchObject(sound)
  })
})

test('a timer aborts even what never waits for the disk', async () => {
  const backing = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 8 * GiB })
  const image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), {
    size: 8 * GiB, backing: { file: 'backing', format: 'qcow2' }, references: () => backing,
  })
  const abort = new AbortController()
  setTimeout(() => abort.abort(reason), 0)
  await expect(image.writeZeroes(0, 8 * GiB, { signal: abort.signal })).rejects.toBe(reason)
  expect(await image.check()).toMatchObject(sound)
  await image.close()
})
