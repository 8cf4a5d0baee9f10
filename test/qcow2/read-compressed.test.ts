import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { trace, type TracedRequest } from '../../src/block/trace.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { diskOf } from '../support/disk.ts'

const clusterSize = 4096

/** An image whose clusters are compressed, stored in the order given, and what it must read as. */
async function compressedImage(order: readonly number[]): Promise<{ host: MemoryDevice; bytes: Uint8Array }> {
  const bytes = diskOf([{ length: order.length * clusterSize, kind: 'text' }])
  const host = new MemoryDevice(0, { growable: true })
  await using image = await Qcow2Image.create(host, { size: bytes.length, clusterSize })
  for (const index of order) {
    await image.writeCompressed(index * clusterSize, bytes.subarray(index * clusterSize, (index + 1) * clusterSize))
  }
  await image.flush()
  return { host: new MemoryDevice(host.bytes.slice(), { growable: true }), bytes }
}

test.each([
  ['in order', (index: number) => index],
  ['in another order', (index: number) => (index * 37) % 256],
])('compressed clusters that lie together %s come with few requests', async (_, place) => {
  const { host, bytes } = await compressedImage(Array.from({ length: 256 }, (_, index) => place(index)))
  const log: TracedRequest[] = []
  await using image = await Qcow2Image.open(trace(host, log), { readOnly: true })
  await image.read(0, clusterSize)
  log.length = 0
  expect(Buffer.compare(await image.read(0, image.size), bytes)).toBe(0)
  expect(log.length).toBeLessThanOrEqual(2)
  expect(log.every(({ operation }) => operation === 'read')).toBe(true)
})

test('what is compressed reads the same in any order, beside any other data, from any place on', async () => {
  const image = fc.uniqueArray(fc.integer({ min: 0, max: 39 }), { minLength: 40, maxLength: 40 })
  const places = fc.array(fc.integer({ min: 0, max: 39 }), { maxLength: 20 })
  await fc.assert(
    fc.asyncProperty(image, places, fc.nat(40 * clusterSize), fc.nat(40 * clusterSize), async (order, changed, from, to) => {
      const { host, bytes } = await compressedImage(order)
      await using image = await Qcow2Image.open(host)
      for (const index of changed) {
        const data = new Uint8Array(600).fill(index + 1)
        bytes.set(data, index * clusterSize + 100)
        await image.write(index * clusterSize + 100, data)
      }
      const start = Math.min(from, to)
      const end = Math.max(from, to)
      expect(Buffer.compare(await image.read(start, end - start), bytes.subarray(start, end))).toBe(0)
    }),
    { numRuns: process.env['QCOW2_LONG'] === '1' ? 1000 : 60 },
  )
})

test('a damaged cluster among many is told by its own offset', async () => {
  const { host } = await compressedImage(Array.from({ length: 64 }, (_, index) => index))
  const log: TracedRequest[] = []
  await using image = await Qcow2Image.open(trace(host, log))
  await image.read(20 * clusterSize, clusterSize)
  const { offset } = log.at(-1)!
  await host.write(offset, new Uint8Array(64).fill(0xff))
  await expect(image.read(0, image.size)).rejects.toMatchObject({ code: 'ERR_CORRUPT', offset })
})

test('a failing read fails the request after every part of it has ended', async () => {
  const { host } = await compressedImage(Array.from({ length: 512 }, (_, index) => index))
  let running = 0
  let fail = false
  const readInto = host.readInto.bind(host)
  const failing = Object.assign(host, {
    async readInto(offset: number, target: Uint8Array) {
      running++
      await new Promise((resolve) => setTimeout(resolve, fail ? 5 : 0))
      running--
      if (fail) throw new Error('no more')
      return readInto(offset, target)
    },
  })
  await using image = await Qcow2Image.open(failing, { readOnly: true })
  await image.read(0, 1)
  fail = true
  await expect(image.read(0, image.size)).rejects.toThrow('no more')
  expect(running).toBe(0)
})
