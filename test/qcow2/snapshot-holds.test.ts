/** Snapshots that are written, read, deleted and given up at the same time, also while the image is closed, checked or repaired. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { Qcow2Error } from '../../src/core/errors.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import type { SnapshotDevice } from '../../src/qcow2/snapshot-device.ts'
import type { SnapshotWriter } from '../../src/qcow2/snapshot-writer.ts'
import { codeOf } from '../support/code.ts'

const MiB = 1 << 20
const long = process.env['QCOW2_LONG'] === '1'
const sound = { leaks: 0, corruptions: 0, checkErrors: 0 }
const stateLength = 300_000
const again = (device: MemoryDevice): MemoryDevice => new MemoryDevice(device.bytes.slice(), { growable: true })

async function withData(): Promise<{ device: MemoryDevice; image: Qcow2Image }> {
  const device = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(device, { size: 8 * MiB })
  await image.write(0, new Uint8Array(200_000).fill(1))
  return { device, image }
}

/** Compares megabytes at once, and names the first difference. */
function expectSame(bytes: Uint8Array, wanted: Uint8Array): void {
  if (Buffer.compare(bytes, wanted) !== 0) expect(bytes.findIndex((byte, index) => byte !== wanted[index]), 'first wrong byte').toBe(-1)
  expect(bytes.length).toBe(wanted.length)
}

async function turns(count: number): Promise<void> {
  for (let i = 0; i < count; i++) await Promise.resolve()
}

const operations = ['begin', 'capture', 'finish', 'give up', 'create', 'save', 'delete', 'rename', 'open', 'close one', 'apply', 'write', 'check', 'repair', 'close'] as const
interface Step {
  readonly operation: (typeof operations)[number]
  /** Which snapshot. */
  readonly slot: number
  /** Turns of the microtask queue before it. */
  readonly delay: number
}

/** Starts each step without waiting for those before it. */
class Run {
  readonly device = new MemoryDevice(0, { growable: true })
  readonly #writers: SnapshotWriter[] = []
  readonly #opened: { readonly device: SnapshotDevice; readonly disk: Uint8Array }[] = []
  #fill = 0

  async all(steps: readonly Step[]): Promise<void> {
    const image = await Qcow2Image.create(this.device, { size: MiB, clusterSize: 4096 })
    await image.write(0, new Uint8Array(200_000).fill(1))
    const running: Promise<unknown>[] = []
    for (const step of steps) {
      await turns(step.delay)
      running.push(this.#start(image, step).catch(expected))
    }
    await Promise.all(running)
    for (const { device, disk } of this.#opened) {
      if (!image.closed) expectSame(await device.read(0, MiB), disk)
      await device.close()
    }
    await image.close()
  }

  async #start(image: Qcow2Image, { operation, slot }: Step): Promise<unknown> {
    const { snapshots } = image
    const name = `s${slot}`
    const vmState = [new Uint8Array(stateLength).fill(slot + 1)]
    switch (operation) {
      case 'begin': {
        const writer = await snapshots.begin({ name })
        this.#writers[slot] = writer
        return writer.write(vmState[0]!)
      }
      case 'capture': return this.#writers[slot]?.captureDisk()
      case 'finish': return this.#writers[slot]?.finish()
      case 'give up': return this.#writers[slot]?.close()
      case 'create': return snapshots.create({ name })
      case 'save': return snapshots.create({ name, vmState })
      case 'delete': return snapshots.delete(name)
      case 'rename': return snapshots.rename(name, name)
      case 'open': {
        const device = await snapshots.open(name)
        const disk = await device.read(0, MiB)
        await expectState(device, name)
        return this.#opened.push({ device, disk })
      }
      case 'close one': return this.#opened.pop()?.device.close()
      case 'apply': return snapshots.apply(name)
      case 'write': return image.write(slot * 150_000, new Uint8Array(200_000).fill(++this.#fill))
      case 'check': return image.check().then((report) => { expect(report).toMatchObject(sound) })
      case 'repair': return image.check({ repair: 'all' }).then((report) => { expect(report).toMatchObject({ ...sound, leaksFixed: 0, corruptionsFixed: 0 }) })
      case 'close': return image.close()
    }
  }
}

/** What may happen to a step when others run beside it. */
function expected(error: unknown): void {
  if (!Qcow2Error.is(error) || !['ERR_CLOSED', 'ERR_BUSY', 'ERR_NOT_FOUND', 'ERR_EXISTS'].includes(error.code)) throw error
}

async function expectState(device: SnapshotDevice, name: string): Promise<void> {
  const { size } = device.vmState
  if (size === 0) return
  expectSame(await device.vmState.read(0, size), new Uint8Array(stateLength).fill(Number(name.slice(1)) + 1))
}

test('in any order, at any moment: the image is sound, its snapshots are whole', { timeout: long ? 1_800_000 : 60_000 }, async () => {
  const step = fc.record({ operation: fc.constantFrom(...operations), slot: fc.nat(2), delay: fc.oneof(fc.nat(8), fc.nat(400)) })
  await fc.assert(
    fc.asyncProperty(fc.array(step, { maxLength: 25, size: 'max' }), async (steps) => {
      const run = new Run()
      await run.all(steps)
      expect(await checkImage(again(run.device))).toMatchObject(sound)
      await using image = await Qcow2Image.open(again(run.device))
      for (const { id, name } of image.snapshots) {
        await using snapshot = await image.snapshots.open(id)
        await expectState(snapshot, name)
      }
    }),
    { numRuns: long ? 20_000 : 300 },
  )
})

describe('a snapshot that is being written', () => {
  test('is no leak for a check, and keeps a repair away', async () => {
    const { device, image } = await withData()
    const writer = await image.snapshots.begin({ name: 's' })
    const state = new Uint8Array(3 * MiB).fill(9)
    await writer.write(state)
    await writer.captureDisk()
    await image.write(0, new Uint8Array(100_000).fill(2))
    expect(await image.check()).toMatchObject(sound)
    for (const repair of ['leaks', 'all'] as const) expect(await codeOf(image.check({ repair }))).toBe('ERR_BUSY')
    await image.write(4 * MiB, new Uint8Array(4 * MiB).fill(5))
    await writer.finish()
    expect(await image.check({ repair: 'all' }), 'finished, though not closed').toMatchObject({ ...sound, leaksFixed: 0 })
    const snapshot = await image.snapshots.open('s')
    expectSame(await snapshot.vmState.read(0, snapshot.vmState.size), state)
    expect(await codeOf(image.check({ repair: 'leaks' }))).toBe('ERR_BUSY')
    await snapshot.close()
    await image.close()
    expect(await checkImage(again(device))).toMatchObject(sound)
  })

  test('finishing it twice makes one snapshot', async () => {
    const { device, image } = await withData()
    const writer = await image.snapshots.begin({ name: 's' })
    await writer.write(new Uint8Array(stateLength).fill(9))
    const [one, two] = await Promise.all([writer.finish(), writer.finish()])
    expect([two, await writer.finish()]).toEqual([one, one])
    expect(image.snapshots.count).toBe(1)
    await writer.close()
    await image.close()
    expect(await checkImage(again(device))).toMatchObject(sound)
  })

  test('closing the image or the writer at any moment of finish waits for it', async () => {
    for (let delay = 0; delay < 60; delay++) {
      const { device, image } = await withData()
      const writer = await image.snapshots.begin({ name: 's' })
      await writer.write(new Uint8Array(stateLength).fill(9))
      const finishing = writer.finish()
      await turns(delay)
      if (delay % 2 === 0) await image.close()
      else await writer.close()
      await finishing
      await image.close()
      expect(await checkImage(again(device))).toMatchObject(sound)
      await using reopened = await Qcow2Image.open(again(device))
      await using snapshot = await reopened.snapshots.open('s')
      expectSame(await snapshot.vmState.read(0, snapshot.vmState.size), new Uint8Array(stateLength).fill(9))
    }
  })

  test('is given back when the image is closed, also after bitmaps were changed', async () => {
    const { device, image } = await withData()
    const writer = await image.snapshots.begin({ name: 's' })
    await writer.write(new Uint8Array(2 * MiB))
    await image.bitmaps.add({ name: 'b' })
    await image.close()
    expect(await checkImage(again(device))).toMatchObject(sound)
    expect(await codeOf(image.snapshots.begin({ name: 't' }))).toBe('ERR_CLOSED')
    expect(await codeOf(image.snapshots.open('s'))).toBe('ERR_CLOSED')
  })

  test('beginning one beside a change of bitmaps loses neither', async () => {
    const seed = new MemoryDevice(0, { growable: true })
    const first = await Qcow2Image.create(seed, { size: 8 * MiB })
    await first.bitmaps.add({ name: 'a' })
    await first.close()
    for (let delay = 0; delay < 60; delay++) {
      const device = again(seed)
      const image = await Qcow2Image.open(device)
      const adding = image.bitmaps.add({ name: 'b' })
      await turns(delay)
      const writer = await image.snapshots.begin({ name: 's' })
      await adding
      await writer.close()
      expect((await image.bitmaps.list()).map(({ name, inUse }) => [name, inUse])).toEqual([['a', false], ['b', false]])
      await image.close()
      expect(await checkImage(again(device))).toMatchObject(sound)
    }
  })
})

test('opening a snapshot at any moment of its deletion finds it whole, or not at all', async () => {
  for (let delay = 0; delay < 100; delay++) {
    const { image } = await withData()
    await image.snapshots.create({ name: 's' })
    await image.write(0, new Uint8Array(200_000).fill(2))
    const deleting = codeOf(image.snapshots.delete('s'))
    await turns(delay)
    const opened = await image.snapshots.open('s').catch((error: unknown) => {
      expect(Qcow2Error.is(error, 'ERR_NOT_FOUND')).toBe(true)
      return undefined
    })
    expect(await deleting).toBe(opened === undefined ? 'no error' : 'ERR_BUSY')
    await opened?.close()
    await image.close()
  }
})

test('snapshots change no guest data, so they leave bitmaps trusted; applying one does not', async () => {
  const seed = new MemoryDevice(0, { growable: true })
  const first = await Qcow2Image.create(seed, { size: MiB })
  await first.snapshots.create({ name: 'small' })
  await first.resize(2 * MiB)
  await first.bitmaps.add({ name: 'tracking' })
  await first.bitmaps.add({ name: 'frozen', disabled: true })
  await first.close()
  const inUse = async (change: (image: Qcow2Image) => Promise<unknown>): Promise<string[]> => {
    const device = again(seed)
    const image = await Qcow2Image.open(device)
    await change(image)
    await image.close()
    expect(await checkImage(again(device))).toMatchObject(sound)
    await using reopened = await Qcow2Image.open(again(device), { readOnly: true })
    return (await reopened.bitmaps.list()).filter((bitmap) => bitmap.inUse).map(({ name }) => name)
  }
  expect(await inUse(({ snapshots }) => snapshots.create({ name: 's' }))).toEqual([])
  expect(await inUse(({ snapshots }) => snapshots.create({ name: 's', vmState: [new Uint8Array(stateLength)] }))).toEqual([])
  expect(await inUse(({ snapshots }) => snapshots.rename('small', 's'))).toEqual([])
  expect(await inUse(({ snapshots }) => snapshots.delete('small'))).toEqual([])
  expect(await inUse(({ snapshots }) => snapshots.apply('small')), 'no bitmap fits the other size').toEqual(['tracking', 'frozen'])
  expect(await inUse(async (image) => {
    await image.snapshots.create({ name: 's' })
    await image.write(0, new Uint8Array(512))
  })).toEqual(['tracking'])
  expect(await inUse(async (image) => {
    await image.snapshots.create({ name: 's' })
    await image.snapshots.apply('s')
  })).toEqual(['tracking'])
})

test('a snapshot has a name', async () => {
  const { image } = await withData()
  await image.snapshots.create({ name: 's' })
  expect(await codeOf(image.snapshots.rename('s', ''))).toBe('TypeError')
  expect(await codeOf(image.snapshots.create({ name: '' }))).toBe('TypeError')
  await image.close()
})
