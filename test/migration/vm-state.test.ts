import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { exportMappedRam } from '../../src/migration/mapped-ram.ts'
import { VmState, type VmStateOptions } from '../../src/migration/vm-state.ts'
import { capture, expected, guestProblems, sha256, wholeStreams } from './captures.ts'
import { libvirtImage, zstdFrame } from './libvirt.ts'
import { tempFolder } from '../support/temp.ts'

function index(bytes: Uint8Array, options?: VmStateOptions): Promise<VmState> {
  return VmState.index(new MemoryDevice(bytes), options)
}

test('takes a path, and closes the file with the VM state or when it fails', async () => {
  const path = join(tempFolder(), 'vm.mig')
  writeFileSync(path, capture('qemu100-savevm.vmstate'))
  const vm = await VmState.index(path, { keepOpen: true })
  expect(vm.machine).toBe('pc-i440fx-10.0')
  await vm.close()
  expect(vm.storage.closed).toBe(true)
  await expect(VmState.index(join(tempFolder(), 'none'))).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
})

describe('captures', () => {
  test.each(wholeStreams)('%s: RAM, machine and counts are as expected', async (name) => {
    const want = expected[name]!
    await using vm = await index(capture(name))
    const { counts } = want
    expect(vm.machine).toBe(want.machine)
    expect(vm.capabilities).toEqual(want.capabilities)
    expect(vm.devices).toHaveLength(want.device_sections!)
    const mapped = name.includes('mappedram')
    expect(vm.ram.counts).toEqual({
      normal: counts!.normal, zero: mapped ? 363 : counts!.zero, xbzrle: counts!.xbzrle, compressed: counts!.compressed, duplicate: counts!.repeated,
    })
    expect(vm.streamLength).toBe(want.raw_bytes)
    const hashes: Record<string, string> = {}
    for (const block of vm.ram.blocks) hashes[block.name] = sha256(await vm.ram.read(block.name, 0, block.length))
    expect(hashes).toEqual(want.ram_sha256)
    if (want.guest?.consistent === true) expect(guestProblems(await vm.ram.read('pc.ram', 0, 4 << 20))).toEqual([])
  })

  test('a page by its guest physical address', async () => {
    await using vm = await index(capture('qemu100-ignore-shared-uuid.mig'))
    expect(Buffer.from(vm.uuid!).toString('hex')).toBe('00112233445566778899aabbccddeeff')
    const whole = await vm.ram.read('pc.bios', 0, 65_536)
    expect(await vm.ram.readPhysical(0xffff_0000 + 0x8000, 4096)).toEqual(whole.slice(0x8000, 0x9000))
    await expect(vm.ram.readPhysical(0xfff0_0000, 16)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  })

  test('unplugged memory is absent, not zero', async () => {
    await using vm = await index(capture('qemu100-virtio-mem.mig'))
    const unplugged = vm.ram.blocks.find(({ name }) => !name.startsWith('pc') && !name.startsWith('/rom'))!
    expect(vm.ram.pageKind(unplugged.name, 0)).toBe('absent')
    const kinds = new Set<string>()
    for await (const { kind } of vm.ram.device(unplugged.name).map()) kinds.add(kind)
    expect([...kinds]).toEqual(['unallocated'])
  })

  test('RAM blocks are devices whose map agrees with their content', async () => {
    await using vm = await index(capture('qemu72-compress.mig'))
    const ram = vm.ram.device('pc.ram')
    const kinds = new Set<string>()
    let next = 0
    for await (const { start, length, zero, kind } of ram.map()) {
      expect(start).toBe(next)
      next += length
      kinds.add(kind)
      const content = await ram.read(start, length)
      if (zero) expect(content.every((byte) => byte === 0)).toBe(true)
    }
    expect(next).toBe(ram.size)
    expect([...kinds].sort()).toEqual(['compressed', 'data', 'zero'])
    await expect(ram.write(0, new Uint8Array(1))).rejects.toMatchObject({ code: 'ERR_READ_ONLY' })
  })

  test.each(['qemu100-xbzrle.mig', 'qemu100-precopy.mig', 'qemu100-mappedram.mig'])('%s: any range reads as the whole does', async (name) => {
    await using vm = await index(capture(name))
    const whole = await vm.ram.read(0, 0, 4 << 20)
    await fc.assert(
      fc.asyncProperty(fc.integer({ min: 0, max: 4 << 20 }), fc.integer({ min: 0, max: 300_000 }), async (offset, length) => {
        const end = Math.min(offset + length, 4 << 20)
        expect(Buffer.from(await vm.ram.read(0, offset, end - offset)).equals(whole.subarray(offset, end))).toBe(true)
      }),
      { numRuns: 40 },
    )
  })

  test('a stream without its VM description still gives its RAM', async () => {
    const bytes = capture('qemu100-bgsnap.mig')
    await using vm = await index(bytes.subarray(0, 0x2ec78b))
    expect(vm.devices).toEqual([])
    expect(vm.tailOffset).toBe(0x2e952d)
    expect(guestProblems(await vm.ram.read('pc.ram', 0, 4 << 20))).toEqual([])
  })

  test.each([0, 0x55])('padding of bytes %i behind the stream is left out', async (fill) => {
    const bytes = capture('qemu100-virtio-mem.mig')
    await using vm = await index(Buffer.concat([bytes, Buffer.alloc(70_000, fill)]))
    expect(vm.devices).toHaveLength(33)
    expect(vm.streamLength).toBe(bytes.length)
    expect(vm.tailOffset).toBeUndefined()
  })

  test('a mapped-ram file whose bitmaps were never written is refused, or repaired', async () => {
    const bytes = capture('qemu100-mappedram.mig').slice()
    await using intact = await index(bytes.slice())
    for (const { mapped, length } of intact.ram.blocks) bytes.fill(0, mapped!.bitmapOffset, mapped!.bitmapOffset + Math.ceil(length / 4096 / 64) * 8)
    await expect(index(bytes)).rejects.toThrow(/no page of any RAM block is marked present/)
    await using repaired = await index(bytes, { repairMappedRam: true })
    expect(guestProblems(await repaired.ram.read('pc.ram', 0, 4 << 20))).toEqual([])
  })
})

describe('devices', () => {
  test('fields are decoded', async () => {
    await using vm = await index(capture('qemu100-bgsnap.mig'))
    const state = await vm.decodeDevice(vm.device('globalstate'))
    expect(state['size']).toBe(8)
    expect(state['runstate']).toMatch(/^0x72756e6e696e67/)
    const cpu = await vm.decodeDevice(vm.device('cpu'))
    expect(cpu['env.eip']).toBeTypeOf('number')
    expect(Array.isArray(cpu['env.regs'])).toBe(true)
    const timer = await vm.decodeDevice(vm.device('timer'))
    expect(timer).toEqual({ cpu_ticks_offset: 37968410, unused: '0x0000000000000000', cpu_clock_offset: 14624883 })
  })

  test.each(wholeStreams)('%s: every device section becomes JSON', async (name) => {
    await using vm = await index(capture(name))
    const all = await vm.decodeDevices()
    expect(Object.keys(all)).toHaveLength(expected[name]!.device_sections!)
    expect(JSON.parse(JSON.stringify(all))).toBeTruthy()
  })

  test.each(['qemu72-bgsnap.mig', 'qemu100-bgsnap.mig'])('%s: elements described one by one make one array', async (name) => {
    await using vm = await index(capture(name))
    const { state } = await vm.decodeDevice(vm.device('fdc'))
    expect((state as { drives: unknown }).drives).toEqual([
      { head: 0, track: 0, sect: 0, 'fdrive/media_rate': { media_rate: 0 } },
      { head: 0, track: 0, sect: 0, 'fdrive/media_rate': { media_rate: 0 } },
    ])
    const power = await vm.decodeDevice(vm.device('0000:00:01.3/piix4_pm'))
    expect(power['acpi_pci_hotplug.acpi_pcihp_pci_status']).toHaveLength(256)
  })
})

describe('libvirt save images', () => {
  const stream = capture('qemu72-compress.mig')
  test.each<[string, number, Uint8Array]>([
    ['raw', 0, stream],
    ['gzip', 1, gzipSync(stream)],
    ['zstd', 5, zstdFrame(stream)],
  ])('%s', async (format, number, content) => {
    for (const little of [true, false]) {
      await using vm = await index(libvirtImage(content, number, { little }))
      expect(vm.libvirt).toMatchObject({ format, version: 2, wasRunning: true, domainXml: '<domain/>', cookieXml: '<cookie/>' })
      expect(guestProblems(await vm.ram.read('pc.ram', 0, 4 << 20))).toEqual([])
    }
  })

  test('sparse: mapped-ram behind the header', async () => {
    const head = libvirtImage(new Uint8Array(0), 6)
    const device = new MemoryDevice(0, { growable: true })
    await device.write(0, head)
    {
      await using vm = await index(stream)
      await exportMappedRam(vm, device, { offset: head.length })
    }
    await using vm = await VmState.index(device)
    expect(vm.libvirt?.format).toBe('sparse')
    expect(vm.streamOffset).toBe(head.length)
    expect(guestProblems(await vm.ram.read('pc.ram', 0, 4 << 20))).toEqual([])
  })

  test.each<[string, Uint8Array, RegExp]>([
    ['xz', libvirtImage(stream, 3), /compressed with xz, which Node cannot read/],
    ['unknown format', libvirtImage(stream, 7), /format is 7, known are 0 to 6/],
    ['interrupted', libvirtImage(stream, 0, { magic: 'LibvirtQemudPart' }), /the save was interrupted/],
    ['version', libvirtImage(stream, 0, { version: 3 }), /version is 3, allowed 1 to 2/],
    ['damaged gzip', libvirtImage(gzipSync(stream).subarray(0, 9000), 1), /gzip stream: the data is damaged/],
  ])('%s is refused', async (_what, bytes, message) => {
    await expect(index(bytes)).rejects.toThrow(message)
  })

  test('a compressed stream goes to the spool that is given', async () => {
    const spool = new MemoryDevice(0, { growable: true })
    {
      await using vm = await index(gzipSync(stream), { spool })
      expect(vm.storage).toBe(spool)
      expect(spool.size).toBe(stream.length)
    }
    expect(spool.closed).toBe(true)
  })

  test('a function is asked for a spool for a compressed stream only', async () => {
    let asked: MemoryDevice | undefined
    const spool = (): MemoryDevice => (asked = new MemoryDevice(0, { growable: true }))
    await (await index(stream, { spool })).close()
    expect(asked).toBeUndefined()
    await (await index(gzipSync(stream), { spool })).close()
    expect(asked).toMatchObject({ closed: true })
    await expect(index(gzipSync(stream.subarray(0, 1000)), { spool })).rejects.toMatchObject({ code: 'ERR_STREAM' })
    expect(asked).toMatchObject({ closed: true })
  })

  test('of an image, compressed, it is said what to do', async () => {
    const image = gzipSync(Buffer.from('514649fb00000003', 'hex'))
    await expect(index(image)).rejects.toThrow('a qcow2 image compressed with gzip: decompress the file first (gzip -d)')
  })
})

test('the VM state owns its device, also when indexing fails', async () => {
  const device = new MemoryDevice(capture('qemu72-compress.mig'))
  await (await VmState.index(device)).close()
  expect(device.closed).toBe(true)
  const broken = new MemoryDevice(new Uint8Array(100))
  await expect(VmState.index(broken)).rejects.toThrow('not a QEMU migration stream')
  expect(broken.closed).toBe(true)
})
