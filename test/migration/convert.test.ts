import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { plainStream, strippedStream } from '../../src/migration/convert.ts'
import { splitStream } from '../../src/migration/stream-parts.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { capture, expected, sha256, wholeStreams } from './captures.ts'

async function bytesOf(chunks: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const pieces: Uint8Array[] = []
  for await (const chunk of chunks) pieces.push(chunk.slice())
  return Buffer.concat(pieces)
}

/** Page numbers by block. */
function absentPages({ ram }: VmState): Record<string, number[]> {
  const absent: Record<string, number[]> = {}
  for (const { name, index, length } of ram.blocks) {
    const pages = Array.from({ length: length / 4096 }, (_, page) => page)
    absent[name] = pages.filter((page) => ram.pageKind(index, page * 4096) === 'absent')
  }
  return absent
}

describe('every capture', () => {
  test.each(wholeStreams)('%s as a plain stream has the same RAM and devices, each page once', async (name) => {
    await using vm = await VmState.index(new MemoryDevice(capture(name)))
    await using plain = await VmState.index(new MemoryDevice(await bytesOf(plainStream(vm))))
    const { counts } = plain.ram
    expect(counts).toMatchObject({ xbzrle: 0, compressed: 0, duplicate: 0 })
    expect(plain.machine).toBe(vm.machine)
    expect(plain.capabilities).toEqual(vm.capabilities.filter((capability) => capability !== 'mapped-ram'))
    for (const block of plain.ram.blocks) expect(sha256(await plain.ram.read(block.name, 0, block.length))).toBe(expected[name]!.ram_sha256![block.name])
    expect(await plain.decodeDevices()).toEqual(await vm.decodeDevices())
    expect(absentPages(plain)).toEqual(absentPages(vm))
  })

  test.each(wholeStreams)('%s stripped keeps all but the pages', async (name) => {
    await using vm = await VmState.index(new MemoryDevice(capture(name)))
    await using stripped = await VmState.index(new MemoryDevice(await bytesOf(strippedStream(vm))))
    expect(stripped.ram.counts).toEqual({ normal: 0, zero: 0, xbzrle: 0, compressed: 0, duplicate: 0 })
    expect(stripped.ram.blocks.map(({ name: block }) => block)).toEqual(vm.ram.blocks.map(({ name: block }) => block))
    expect(await stripped.decodeDevices()).toEqual(await vm.decodeDevices())
    expect(stripped.streamLength).toBeLessThan(600_000)
  })
})

test('a plain savevm stream keeps its length when written again', async () => {
  await using vm = await VmState.index(new MemoryDevice(capture('qemu100-savevm.vmstate')))
  const again = await bytesOf(plainStream(vm))
  const parts = 7 // PART sections beyond the first, each with its frame and block name
  expect(Math.abs(again.length - vm.streamLength)).toBeLessThan(parts * 60)
})

test.each(wholeStreams)('%s: the parts to start the VM again', async (name) => {
  await using vm = await VmState.index(new MemoryDevice(capture(name)))
  const parts = splitStream(await bytesOf(vm.rest('before')), await bytesOf(vm.rest('after')))
  expect(parts).toMatchObject({ machine: vm.machine, footers: true, ramSectionId: vm.ramSection.sectionId })
  expect(parts.blocks.map(({ name: block }) => block)).toEqual(vm.ram.blocks.map(({ name: block }) => block))
  expect(parts.vmDescription.length).toBe(expected[name]!.vmdesc_length! + 5)
  expect(parts.earlyDevices.length > 0).toBe(name.includes('virtio-mem'))
  const sections = [...vm.devices].slice(name.includes('virtio-mem') ? 1 : 0)
  const length = sections.reduce((sum, device) => sum + device.length + 14 + Buffer.byteLength(device.name) + 5, 0)
  expect(parts.devices.length).toBe(length)
})

test('zero pages can be left out', async () => {
  await using vm = await VmState.index(new MemoryDevice(capture('qemu72-compress.mig')))
  await using plain = await VmState.index(new MemoryDevice(await bytesOf(plainStream(vm, { zeroPages: 'drop' }))))
  expect(plain.ram.counts.zero).toBe(0)
  expect(plain.ram.pageKind('pc.ram', 0)).toBe('absent')
})
