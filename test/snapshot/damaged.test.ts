/** Damaged RAM images and manifests: each is read, or refused with a typed error. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { capture as store } from '../../src/snapshot/capture.ts'
import { faultOrderPath, manifestPath } from '../../src/snapshot/saved-names.ts'
import { parseManifest } from '../../src/snapshot/parse-manifest.ts'
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
    format: 'qcow2 saved VM', version: 2, created: '2026-01-01T00:00:00.000Z',
    qemu: { qemu: { major: 10, minor: 0, micro: 2 }, package: '' }, machine: 'pc-i440fx-10.0', accelerator: 'tcg', running: false,
    status: 'io-error', cpus: { count: 2, type: 'qemu64-x86_64-cpu' }, devices: ['PCI 0:2.0 1af4:1001', 'virtio-blk-pci'],
    memory: { kind: 'RAM image', file: 'vm.qcow2' }, pageSize: 4096, ramBlocks: [{ name: 'pc.ram', length: 4 << 20 }],
    disks: [
      { node: 'd0', activeNode: 'd0', device: 'a', qdev: 'b', file: '/vm/a', format: 'raw', size: 512, frozen: false },
      { node: 'd1', activeNode: 'd1-1', file: '/vm/b', format: 'qcow2', size: 0, frozen: { overlay: '/vm/b-1', modified: '2026-01-01T00:00:00.000Z' } },
      { node: 'd2', activeNode: 'd2', file: '/vm/c', format: 'qcow2', size: 1, frozen: { internal: 'moment' } },
    ],
  }
  const text = JSON.stringify(manifest)
  expect(parseManifest(text)).toEqual(manifest)
  for (const [field, value, message] of [
    ['status', 1, 'status is not a text'],
    ['cpus', { count: -1, type: '' }, 'cpus.count is not a whole number'],
    ['devices', ['a', 1], 'devices[1] is not a text'],
    ['ramBlocks', [null], 'ramBlocks[0] is not an object'],
    ['ramBlocks', [{ name: 'a', length: 1.5 }], 'ramBlocks[0].length is not a whole number'],
    ['disks', [{ ...manifest.disks[0], frozen: true }], 'disks[0].frozen is not an object'],
    ['disks', [{ ...manifest.disks[0], file: undefined }], 'disks[0].file is missing'],
    ['accelerator', 'xen', 'accelerator is "xen", expected "kvm" or "tcg"'],
  ] as const) {
    expect(() => parseManifest(JSON.stringify({ ...manifest, [field]: value }))).toThrow(message)
  }
  await expectTyped(Buffer.from(text), long ? 20_000 : 300, (bytes) => parseManifest(new TextDecoder().decode(bytes)))
})

test('a manifest of version 1', () => {
  const old = {
    format: 'qcow2 saved VM', version: 1, created: '2026-01-01T00:00:00.000Z',
    qemu: { qemu: { major: 7, minor: 2, micro: 22 }, package: '' }, machine: 'pc-i440fx-7.2', accelerator: 'tcg', running: false,
    memory: { kind: 'RAM image', file: 'vm.qcow2' }, pageSize: 4096, ramBlocks: [],
    disks: [{ node: 'd0', overlay: 'o.qcow2', file: 'd.qcow2', activeNode: 'd0-1' }, { node: 'd1', internal: 'moment', file: '/vm/d', activeNode: 'd1' }],
  }
  expect(parseManifest(JSON.stringify(old))).toEqual({
    ...old,
    version: 2,
    status: 'paused',
    disks: [
      { node: 'd0', activeNode: 'd0-1', file: 'd.qcow2', format: '', frozen: { overlay: 'o.qcow2' } },
      { node: 'd1', activeNode: 'd1', file: '/vm/d', format: '', frozen: { internal: 'moment' } },
    ],
  })
})

test('each snapshot has its own manifest and fault order, whatever its name', () => {
  expect(manifestPath('/vm/warm.qcow2')).toBe('/vm/warm.qcow2.json')
  expect(manifestPath('/vm/state.qcow2', 'one')).toBe('/vm/state.qcow2@one.json')
  expect(faultOrderPath('/vm/state.qcow2', 'one')).toBe('/vm/state.qcow2@one.faults.json')
  const names = ['a', 'a.faults', '../a', 'a/b', 'ä', '', ' ', '%61', 'x'.repeat(500), `${'x'.repeat(500)}y`]
  const paths = names.flatMap((name) => [manifestPath('v', name), faultOrderPath('v', name)])
  expect(new Set(paths).size).toBe(paths.length)
  for (const path of paths) expect(path).toMatch(/^v@[A-Za-z0-9_%-]{0,140}(\.faults)?\.json$/)
})
