import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { copyDevice } from '../../src/qcow2/copy.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 1000 : 80
const clusterSize = 4096
const sourceClusters = fc.constantFrom(512, 4096, 16384)

/** Writes to an overlay: data, or zeroes that hide what is below. */
const writes = fc.array(
  fc.record({ at: fc.oneof(fc.nat({ max: 300_000 }), fc.nat({ max: 600 }).map((sectors) => sectors * 512)), length: fc.oneof(fc.integer({ min: 1, max: 40_000 }), fc.constantFrom(512, 4096, 16384)), kind: fc.constantFrom('data', 'zeroes', 'zero clusters') }),
  { maxLength: 6 },
)

/** An overlay over the first `reach` bytes of a file, or over none, after writes, and what it reads. */
async function overlay(below: Uint8Array, changes: typeof writes extends fc.Arbitrary<infer T> ? T : never, clusterSize = 4096, reach = below.length): Promise<{ image: Qcow2Image; content: Uint8Array }> {
  const backing = { file: 'base.raw', format: 'raw' }
  const isOver = reach > 0 ? { backing, references: () => new MemoryDevice(below.subarray(0, reach)) } : {}
  const image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: below.length, clusterSize, ...isOver })
  const content = below.slice().fill(0, reach)
  for (const { at, length, kind } of changes) {
    const offset = at % below.length
    const part = content.subarray(offset, Math.min(below.length, offset + length))
    part.fill(kind === 'data' ? 0x5a : 0)
    await (kind === 'zero clusters' ? image.writeZeroes(offset, part.length) : image.write(offset, part.slice()))
  }
  return { image, content }
}

const below = fc.integer({ min: 1, max: 300 }).map((sectors) => new Uint8Array(sectors * 512).map((_, at) => (at % 8192 < 5000 ? 0xbb : 0)))

test('over the same backing file only what the source holds itself is copied, its zeroes too', async () => {
  await fc.assert(
    fc.asyncProperty(below, writes, fc.constantFrom(0, 512, 4096, 65536), fc.boolean(), fc.constantFrom(2 as const, 3 as const), sourceClusters, fc.constantFrom(1, 0.5, 0), async (base, changes, sparseSize, targetIsZero, version, smaller, part) => {
      const source = await overlay(base, changes, smaller, Math.floor((base.length / 512) * part) * 512)
      const host = new MemoryDevice(0, { growable: true })
      const backing = { file: 'base.raw', format: 'raw' }
      const target = await Qcow2Image.create(host, { size: base.length, clusterSize, version, backing, references: () => new MemoryDevice(base) })
      await copyDevice(source.image, target, { skipBacking: true, sparseSize, targetIsZero })
      expect(Buffer.compare(await target.read(0, target.size), source.content)).toBe(0)
      expect(await checkImage(host)).toMatchObject({ corruptions: 0, leaks: 0 })
      for await (const { depth, start, length } of source.image.map()) {
        // only whole pieces of the copy are left out
        if (depth > 0 && part === 1 && smaller >= clusterSize) for await (const copied of target.map({ offset: start, length })) expect(copied.depth).toBeGreaterThan(0)
      }
    }),
    { numRuns },
  )
})

test('clusters are copied compressed into an image of any size and content', async () => {
  await fc.assert(
    fc.asyncProperty(below, writes, fc.constantFrom(0, 4096), fc.nat({ max: 20 }), fc.boolean(), async (base, changes, sparseSize, more, used) => {
      const source = await overlay(base, changes)
      const host = new MemoryDevice(0, { growable: true })
      const target = await Qcow2Image.create(host, { size: base.length + more * 512, clusterSize })
      if (used) await target.write(0, new Uint8Array(target.size).fill(0xdd))
      await copyDevice(source.image, target, { compressed: true, sparseSize })
      expect(Buffer.compare(await target.read(0, base.length), source.content)).toBe(0)
      expect((await target.read(base.length, more * 512)).every((byte) => byte === (used ? 0xdd : 0))).toBe(true)
      const { size } = host
      await target.close()
      const { corruptions, leaks, compressedClusters } = await checkImage(new MemoryDevice(host.bytes.subarray(0, size)))
      expect({ corruptions, leaks }).toEqual({ corruptions: 0, leaks: 0 })
      const whole = Math.floor(base.length / clusterSize)
      if (sparseSize === 0) expect(compressedClusters).toBeGreaterThanOrEqual(whole)
    }),
    { numRuns },
  )
})

test('only an image takes compressed clusters', async () => {
  const copying = copyDevice(new MemoryDevice(4096), new MemoryDevice(4096), { compressed: true })
  await expect(copying).rejects.toThrow(TypeError)
})
