import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { diffVmStates } from '../../src/migration/diff.ts'
import { exportElfCore } from '../../src/migration/elf-core.ts'
import { exportRaw } from '../../src/migration/export-raw.ts'
import { exportMappedRam, writeStream } from '../../src/migration/mapped-ram.ts'
import { plainStream } from '../../src/migration/convert.ts'
import { physicalRanges } from '../../src/migration/physical-ranges.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { tempFolder } from '../support/temp.ts'
import { describeWithTools, outputOf } from '../support/tools.ts'
import { capture, expected, sha256, wholeStreams } from './captures.ts'

function open(name: string): Promise<VmState> {
  return VmState.index(new MemoryDevice(capture(name)))
}

function newDevice(): MemoryDevice {
  return new MemoryDevice(0, { growable: true })
}

describe('mapped-ram', () => {
  test.each(wholeStreams.filter((name) => !name.includes('ignore-shared')))('%s as a mapped-ram file has the same RAM and devices', async (name) => {
    await using vm = await open(name)
    const device = newDevice()
    const length = await exportMappedRam(vm, device)
    expect(device.size).toBe(length)
    await using mapped = await VmState.index(device)
    expect(mapped.capabilities).toEqual(['mapped-ram'])
    for (const { name: block, length: size } of mapped.ram.blocks) {
      expect(sha256(await mapped.ram.read(block, 0, size))).toBe(expected[name]!.ram_sha256![block])
    }
    expect(await mapped.decodeDevices()).toEqual(await vm.decodeDevices())
  })

  test("QEMU's own file comes out byte for byte", async () => {
    await using vm = await open('qemu100-mappedram.mig')
    const device = newDevice()
    await exportMappedRam(vm, device)
    expect(Buffer.from(device.bytes).equals(capture('qemu100-mappedram.mig'))).toBe(true)
  })

  test('there and back again: the plain stream stays the same', async () => {
    await using vm = await open('qemu100-bgsnap.mig')
    const plain = newDevice()
    await writeStream(plainStream(vm), plain)
    const mapped = newDevice()
    await exportMappedRam(vm, mapped)
    await using again = await VmState.index(mapped)
    const back = newDevice()
    await writeStream(plainStream(again), back)
    expect(Buffer.from(back.bytes).equals(plain.bytes)).toBe(true)
  })

  test('a stream that lacks shared memory is refused', async () => {
    await using vm = await open('qemu100-ignore-shared-uuid.mig')
    await expect(exportMappedRam(vm, newDevice())).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
  })
})

describe('raw', () => {
  test.each(['skip', 'write'] as const)('a RAM block, zeroes: %s', async (zeroes) => {
    await using vm = await open('qemu100-xbzrle.mig')
    const device = newDevice()
    await exportRaw(vm, 'pc.ram', device, { zeroes })
    expect(sha256(device.bytes)).toBe(expected['qemu100-xbzrle.mig']!.ram_sha256!['pc.ram'])
  })

  test('zeroes overwrite what a device held', async () => {
    await using vm = await open('qemu100-xbzrle.mig')
    const device = new MemoryDevice(new Uint8Array(4 << 20).fill(9))
    await exportRaw(vm, 'pc.ram', device, { zeroes: 'write' })
    expect(sha256(device.bytes)).toBe(expected['qemu100-xbzrle.mig']!.ram_sha256!['pc.ram'])
  })

  test('a device too small is refused', async () => {
    await using vm = await open('qemu100-xbzrle.mig')
    await expect(exportRaw(vm, 'pc.ram', new MemoryDevice(4096))).rejects.toThrow(RangeError)
  })
})

interface Segment {
  offset: number
  address: number
  length: number
}

function segmentsOf(elf: Uint8Array): Segment[] {
  const view = new DataView(elf.buffer, elf.byteOffset, elf.byteLength)
  const count = view.getUint16(56, true)
  // the first are the notes
  return Array.from({ length: count - 1 }, (_, i) => {
    const at = 64 + 56 * (i + 1)
    expect(view.getUint32(at, true)).toBe(1)
    // debuggers look at virtual addresses only
    expect(view.getBigUint64(at + 16, true)).toBe(view.getBigUint64(at + 24, true))
    return { offset: Number(view.getBigUint64(at + 8, true)), address: Number(view.getBigUint64(at + 24, true)), length: Number(view.getBigUint64(at + 32, true)) }
  })
}

describe('ELF core', () => {
  test.each(['qemu100-bgsnap.mig', 'qemu72-rich-q35.mig'])('%s: memory is at its physical addresses', async (name) => {
    await using vm = await open(name)
    const device = newDevice()
    await exportElfCore(vm, device)
    const segments = segmentsOf(device.bytes)
    expect(segments.map(({ address }) => address)).toEqual([0, 0xffff_0000])
    const [main, bios] = segments as [Segment, Segment]
    expect(sha256(device.bytes.subarray(main.offset, main.offset + main.length))).toBe(expected[name]!.ram_sha256!['pc.ram'])
    expect(sha256(device.bytes.subarray(bios.offset, bios.offset + bios.length))).toBe(expected[name]!.ram_sha256!['pc.bios'])
  })

  test('addresses that the stream tells are used', async () => {
    await using vm = await open('qemu100-ignore-shared-uuid.mig')
    expect(physicalRanges(vm)).toEqual([
      { block: 'pc.ram', offset: 0, length: 4 << 20, address: 0 },
      { block: 'pc.bios', offset: 0, length: 65_536, address: 0xffff_0000 },
    ])
  })
})

describeWithTools("ELF core in others' eyes", ['readelf', 'gdb'], () => {
  const name = 'qemu72-rich-q35.mig'

  async function writeCore(vm: VmState): Promise<string> {
    const file = join(tempFolder(), 'core')
    await using device = await openFile(file, { create: 'w' })
    await exportElfCore(vm, device)
    return file
  }

  test('readelf finds a core with a segment for each range', async () => {
    await using vm = await open(name)
    const file = await writeCore(vm)
    const told = outputOf('readelf', '-lW', file)
    expect(told).toContain('Elf file type is CORE')
    const segments = [...told.matchAll(/LOAD\s+0x[0-9a-f]+ 0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+)/g)].map((match) => match.slice(1).map((hex) => Number.parseInt(hex, 16)))
    expect(segments).toEqual(physicalRanges(vm).map(({ address, length }) => [address, address, length, length]))
  })

  test('gdb reads the words at physical addresses', async () => {
    await using vm = await open(name)
    const file = await writeCore(vm)
    for (const { block, offset, length, address } of physicalRanges(vm)) {
      const at = Math.min(0x100000, length - 16)
      const told = outputOf('gdb', '-nx', '-batch', '-c', file, '-ex', `x/4xw 0x${(address + at).toString(16)}`)
      const words = [...told.matchAll(/\t0x([0-9a-f]{8})/g)].map(([, hex]) => Number.parseInt(hex!, 16))
      const bytes = await vm.ram.read(block, offset + at, 16)
      expect(words).toEqual([...new Uint32Array(bytes.buffer, bytes.byteOffset, 4)])
      expect(words.some((word) => word !== 0)).toBe(true)
    }
  })
})

describe('diff', () => {
  test('a VM is equal to itself in another form', async () => {
    await using vm = await open('qemu72-compress.mig')
    const mapped = newDevice()
    await exportMappedRam(vm, mapped)
    await using other = await VmState.index(mapped)
    expect(await diffVmStates(vm, other)).toEqual({ ram: [], devices: [] })
  })

  test('changed pages and fields are named', async () => {
    await using before = await open('qemu100-bgsnap.mig')
    await using after = await open('qemu100-savevm.vmstate')
    const { ram, devices } = await diffVmStates(before, after)
    const main = ram.find(({ block }) => block === 'pc.ram')!
    expect(main.kind).toBe('changed')
    const [old, next] = [await before.ram.read('pc.ram', 0, 4 << 20), await after.ram.read('pc.ram', 0, 4 << 20)]
    const differs = new Set<number>()
    for (let page = 0; page < 1024; page++) {
      if (!Buffer.from(old.subarray(page * 4096, (page + 1) * 4096)).equals(next.subarray(page * 4096, (page + 1) * 4096))) differs.add(page)
    }
    const told = main.ranges.flatMap(({ offset, length }) => Array.from({ length: length / 4096 }, (_, i) => offset / 4096 + i))
    expect(told).toEqual([...differs])
    expect(devices).toContainEqual(expect.objectContaining({ device: 'timer (0)', field: 'cpu_clock_offset' }))
  })

  test('blocks and devices that only one has', async () => {
    await using before = await open('qemu100-bgsnap.mig')
    await using after = await open('qemu100-virtio-mem.mig')
    const { ram, devices } = await diffVmStates(before, after)
    expect(ram.some(({ kind }) => kind === 'added')).toBe(true)
    expect(devices).toContainEqual(expect.objectContaining({ device: '0000:00:02.0/virtio-mem (0)', field: '', before: undefined }))
  })
})
