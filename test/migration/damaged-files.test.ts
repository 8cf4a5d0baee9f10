/** Damaged files around and beside a stream: each is read, or refused with a typed error. */
import { gzipSync } from 'node:zlib'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { exportMappedRam } from '../../src/migration/mapped-ram.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { damaged, edits, isTyped } from '../support/damage.ts'
import { capture } from './captures.ts'
import { libvirtImage, zstdFrame } from './libvirt.ts'

const long = process.env['QCOW2_LONG'] === '1'
const stream = capture('qemu72-compress.mig')
/** Bytes at the start of a mapped-ram file in which headers, bitmaps and the first pages are. */
const mappedStart = 1 << 20

/** A mapped-ram file, or the part of one that libvirt's header of `offset` bytes precedes. */
async function mappedFile(offset = 0): Promise<Uint8Array> {
  const device = new MemoryDevice(0, { growable: true })
  if (offset > 0) await device.write(0, libvirtImage(new Uint8Array(0), 6))
  await using vm = await VmState.index(new MemoryDevice(stream))
  await exportMappedRam(vm, device, { offset })
  return device.bytes
}

const files: [string, () => Promise<Uint8Array> | Uint8Array][] = [
  ['mapped-ram file', () => mappedFile()],
  ['libvirt image with mapped-ram', () => mappedFile(libvirtImage(new Uint8Array(0), 6).length)],
  ['libvirt image', () => libvirtImage(stream, 0)],
  ['libvirt image, gzip', () => libvirtImage(gzipSync(stream), 1)],
  ['libvirt image, zstd', () => libvirtImage(zstdFrame(stream), 5)],
]

test.each(files)('%s', async (_what, make) => {
  const good = await make()
  const outcome = { read: 0, refused: 0 }
  await fc.assert(
    fc.asyncProperty(edits, async (list) => {
      const head = damaged(good.subarray(0, mappedStart), list)
      const bytes = Buffer.concat([head, good.subarray(mappedStart)])
      try {
        await using vm = await VmState.index(new MemoryDevice(bytes))
        for (const { name, length } of vm.ram.blocks) if (length <= 16 << 20) await vm.ram.read(name, 0, length)
        if (vm.description !== undefined) await vm.decodeDevices()
        outcome.read++
      } catch (error) {
        if (!isTyped(error)) throw error
        outcome.refused++
      }
    }),
    { numRuns: long ? 2000 : 60 },
  )
  expect(outcome.refused).toBeGreaterThan(0)
})
