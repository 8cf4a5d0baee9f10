/**
 * Requests while the whole disk changes, and requests that overlap each other in two files: whatever the interleaving,
 * the outcome is that of one order or the other.
 */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import type { BlockDevice } from '../../src/block/device.ts'
import { fault } from '../../src/block/fault.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { keepOpen } from '../../src/testing/build-image.ts'
import { pattern } from '../suites/block-device.ts'
import { expectBytes } from '../support/bytes.ts'
import '../support/seed.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 4000 : 400

/** Requests take a turn of the event loop, some of them several. */
function slow(device: BlockDevice, seed = 1): BlockDevice {
  const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
  let state = seed
  return fault(keepOpen(device), () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    const turns = state >>> 30
    return { kind: 'delay', until: (async () => { for (let i = 0; i <= turns; i++) await turn() })() }
  })
}

interface Call {
  readonly name: string
  readonly run: (image: Qcow2Image) => Promise<unknown>
}

const clusterSize = 4096
const offsetIn = fc.nat(20).map((n) => n * clusterSize)
const lengthOf = fc.oneof(fc.nat(5).map((n) => n * clusterSize), fc.integer({ min: 1, max: 60 }).map((n) => n * 512))

const request: fc.Arbitrary<Call> = fc.record({ kind: fc.constantFrom('write', 'write', 'write zeroes', 'unmap', 'compressed', 'compressed', 'read', 'map'), offset: offsetIn, length: lengthOf }).map(({ kind, offset, length }) => ({
  name: `${kind} ${length} at ${offset}`,
  async run(image): Promise<unknown> {
    switch (kind) {
      case 'write':
        return image.write(offset, new Uint8Array(length).fill(7))
      case 'write zeroes':
        return image.writeZeroes(offset, length)
      case 'unmap':
        return image.writeZeroes(offset, length, { unmap: true })
      case 'compressed':
        return image.writeCompressed(offset, new Uint8Array(length).fill(5))
      case 'read':
        return Buffer.from(await image.read(offset, length)).toString('latin1')
      default: {
        for await (const { length: bytes } of image.map({ offset })) expect(bytes).toBeGreaterThan(0)
        return 'extents' // that end at the size there is when they are asked for
      }
    }
  },
}))

const change: fc.Arbitrary<Call> = fc.oneof(
  fc.constantFrom('small', 'large', 'same').map((name) => ({ name: `apply ${name}`, run: (image: Qcow2Image) => image.snapshots.apply(name) })),
  fc.integer({ min: 1, max: 200 }).map((sectors) => ({ name: `resize ${sectors}`, run: (image: Qcow2Image) => image.resize(sectors * 512) })),
  fc.constant<Call>({ name: 'snapshot', run: (image) => image.snapshots.create({ name: 'new' }).then(() => undefined) }),
)

/** The outcome in a word: of a failure only what kind it is. */
async function outcome(call: Promise<unknown>): Promise<unknown> {
  return call.then((value) => value, (error: unknown) => ((error as { code?: string }).code ?? (error as Error).name))
}

async function start(): Promise<Uint8Array> {
  const host = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(keepOpen(host), { size: 100_352, clusterSize })
  await image.write(0, pattern(60_000))
  await image.snapshots.create({ name: 'same' })
  await image.resize(51_712)
  await image.write(40_000, new Uint8Array(9000).fill(9))
  await image.snapshots.create({ name: 'small' })
  await image.resize(122_880)
  await image.write(51_712, new Uint8Array(70_000).fill(10))
  await image.snapshots.create({ name: 'large' })
  await image.resize(70_656)
  await image.write(1000, new Uint8Array(69_000).fill(11))
  await image.close()
  return host.bytes.slice(0, host.size)
}

const disk = await start()

/** What `calls`, started together or one after the other, leave, and how each ended. */
async function after(calls: readonly Call[], together: { seed: number; pause: number } | undefined): Promise<{ outcomes: unknown[]; content: string }> {
  const host = new MemoryDevice(disk.slice(), { growable: true })
  const outcomes: unknown[] = []
  {
    await using image = await Qcow2Image.open(together === undefined ? keepOpen(host) : slow(host, together.seed))
    if (together === undefined) for (const { run } of calls) outcomes.push(await outcome(run(image)))
    else {
      const running: Promise<unknown>[] = []
      for (const { run } of calls) {
        running.push(outcome(run(image)))
        for (let turns = together.pause; turns > 0; turns--) await new Promise((resolve) => setImmediate(resolve))
      }
      outcomes.push(...(await Promise.all(running)))
    }
  }
  expect(await checkImage(host)).toMatchObject({ corruptions: 0, leaks: 0 })
  await using image = await Qcow2Image.open(host, { readOnly: true })
  return { outcomes, content: Buffer.from(await image.read(0, image.size)).toString('latin1') }
}

test('a request and a change of the whole disk at once are one after the other', async () => {
  await fc.assert(
    fc.asyncProperty(request, change, fc.boolean(), fc.record({ seed: fc.integer({ min: 1 }), pause: fc.nat(60) }), async (call, whole, first, together) => {
      const calls = first ? [call, whole] : [whole, call]
      const both = await after(calls, together)
      const [inOrder, reverse] = [await after(calls, undefined), await after([calls[1]!, calls[0]!], undefined)]
      const orders = [inOrder, { content: reverse.content, outcomes: [reverse.outcomes[1], reverse.outcomes[0]] }]
      // a request that does not fit is refused at once, by the size there is when it is made
      const refused = ['RangeError', 'ERR_ALIGNMENT']
      const matches = orders.some(({ content, outcomes }) => content === both.content && outcomes.every((each, at) => each === both.outcomes[at] || (refused.includes(each as string) && refused.includes(both.outcomes[at] as string))))
      const alone = await after([whole], undefined)
      const rejected = refused.includes(both.outcomes[calls.indexOf(call)] as string) && both.content === alone.content
      expect(matches || rejected, `${calls.map(({ name }) => name).join(', ')}: ${JSON.stringify(both.outcomes).slice(0, 200)}`).toBe(true)
    }),
    { numRuns },
  )
})

test('the last cluster of the disk is no longer the last one: a compressed write of a part of it is refused', async () => {
  const image = await Qcow2Image.create(slow(new MemoryDevice(0, { growable: true })), { size: 131_072 })
  await image.write(65_536, new Uint8Array(65_536).fill(9))
  await image.snapshots.create({ name: 's' })
  await image.resize(100_352)
  const applied = image.snapshots.apply('s')
  await new Promise((resolve) => setImmediate(resolve))
  await expect(image.writeCompressed(65_536, new Uint8Array(34_816).fill(5))).rejects.toMatchObject({ code: 'ERR_ALIGNMENT' })
  await applied
  expect((await image.read(65_536, 65_536)).every((byte) => byte === 9)).toBe(true)
})

test('writes, zeroes and discards that overlap at once leave a raw data file the same as the disk', async () => {
  const one = fc.record({ kind: fc.constantFrom('write', 'write', 'zeroes', 'unmap', 'discard'), at: fc.nat(30), length: fc.integer({ min: 1, max: 20 }), value: fc.integer({ min: 1, max: 255 }) })
  await fc.assert(
    fc.asyncProperty(fc.array(fc.array(one, { minLength: 1, maxLength: 6 }), { minLength: 1, maxLength: 4 }), fc.constantFrom(1, 512, 4096), fc.constantFrom(512, 4096, 16384), fc.integer({ min: 1 }), async (batches, unit, clusterSize, seed) => {
      const size = 65_536
      const raw = new MemoryDevice(0, { growable: true })
      const host = new MemoryDevice(0, { growable: true })
      const references = (): BlockDevice => slow(raw, seed)
      await (await Qcow2Image.create(keepOpen(host), { size, clusterSize, dataFile: 'raw', dataFileRaw: true, references: () => keepOpen(raw) })).close()
      const image = await Qcow2Image.open(slow(host, seed + 1), { references })
      for (const batch of batches) {
        await Promise.all(batch.map(({ kind, at, length, value }) => {
          const offset = (at * Math.max(unit, 1000)) % size
          const start = offset - (offset % unit)
          const bytes = Math.min(length * Math.max(unit, 500), size - start)
          if (kind === 'write') return image.write(start, new Uint8Array(bytes).fill(value))
          return kind === 'discard' ? image.discard(start, bytes) : image.writeZeroes(start, bytes, { unmap: kind === 'unmap' })
        }))
        expectBytes(raw.bytes.subarray(0, size), await image.read(0, size))
      }
      await image.close()
      expect(await checkImage(host)).toMatchObject({ corruptions: 0 })
    }),
    { numRuns: numRuns / 4 },
  )
})
