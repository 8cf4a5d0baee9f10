/** Damaged RAM images and manifests: each is read, or refused with a typed error. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { capture as store } from '../../src/snapshot/capture.ts'
import { parseManifest } from '../../src/snapshot/manifest.ts'
import { decodeLayout, decodeTrailer, encodeLayout, trailerLength } from '../../src/snapshot/ram-image-layout.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { RamImage } from '../../src/snapshot/ram-image.ts'
import { capture } from '../migration/captures.ts'
import { damaged, edits, isTyped } from '../support/damage.ts'

const long = process.env['QCOW2_LONG'] === '1'

/** Runs a reader over damaged copies. */
async function expectTyped(good: Uint8Array, runs: number, read: (bytes: Uint8Array) => unknown): Promise<void> {
  let refused = 0
  await fc.assert(
    fc.asyncProperty(edits, async (list) => {
      try {
        await read(damaged(good, list))
      } catch (error) {
        if (!isTyped(error)) throw error
        refused++
      }
    }),
    { numRuns: runs },
  )
  expect(refused).toBeGreaterThan(0)
}

test('a RAM image', async () => {
  const device = new MemoryDevice(0, { growable: true })
  await store(capture('qemu100-bgsnap.mig'), RamImageWriter.to(device))
  await expectTyped(device.bytes, long ? 5000 : 100, async (bytes) => {
    await using ram = await RamImage.open(new MemoryDevice(bytes))
    for (const { name, length } of ram.blocks) if (length <= 16 << 20) await ram.read(name, 0, length)
  })
})

test('the layout of a RAM image', async () => {
  const blocks = ['pc.ram', 'pc.bios'].map((name, i) => ({ name, length: 1 << 20, position: i * (2 << 20), absent: [[4096, 8192], [65_536, 4096]] as const }))
  const bytes = encodeLayout({ pageSize: 4096, restLength: 1000, pagesAt: 500, blocks })
  const end = bytes.length - trailerLength
  await expectTyped(bytes.subarray(0, end), long ? 20_000 : 300, (json) => {
    for (const { length, position, absent } of decodeLayout(json, 4 << 20).blocks) {
      expect(position + length).toBeLessThanOrEqual(4 << 20)
      for (const [offset, size] of absent) expect(offset + size).toBeLessThanOrEqual(length)
    }
  })
  await expectTyped(bytes.subarray(end), long ? 20_000 : 300, (trailer) => {
    if (trailer.length === trailerLength) decodeTrailer(trailer)
  })
})

test.each(['null', '1', '"a"', '[]'])('a layout with %s as a block', (block) => {
  const json = Buffer.from(`{"pageSize":4096,"restLength":0,"pagesAt":0,"blocks":[${block}]}`)
  expect(() => decodeLayout(json, 4 << 20)).toThrow(/RAM image layout: .*a block/)
})

test('a manifest', async () => {
  const manifest = {
    format: 'qcow2 saved VM', version: 1, created: '2026-01-01T00:00:00.000Z',
    qemu: { qemu: { major: 10, minor: 0, micro: 2 }, package: '' }, machine: 'pc-i440fx-10.0', accelerator: 'tcg', running: true,
    memory: { kind: 'RAM image', file: 'vm.qcow2' }, pageSize: 4096, ramBlocks: [{ name: 'pc.ram', length: 4 << 20 }], disks: [],
  }
  const text = JSON.stringify(manifest)
  expect(parseManifest(text)).toEqual(manifest)
  await expectTyped(Buffer.from(text), long ? 20_000 : 300, (bytes) => parseManifest(new TextDecoder().decode(bytes)))
})
