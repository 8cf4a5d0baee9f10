/** Guest physical addresses: QEMU puts marks at addresses, and they are found there or the VM is refused by name. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { readPlacement } from '../../src/migration/memory-placement.ts'
import { physicalRanges, type PhysicalRange, type PhysicalSource } from '../../src/migration/physical-ranges.ts'
import type { RamBlock } from '../../src/migration/records.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { captureStream } from '../support/saved.ts'
import { tempFolder } from '../support/temp.ts'
import { capture } from './captures.ts'

const MiB = 1 << 20
const GiB = 1 << 30

interface Machine {
  readonly machine: string
  readonly memory: string
  readonly args?: string
  /** Capability `x-ignore-shared`: the list of blocks has addresses. */
  readonly addresses?: boolean
  /** Where QEMU puts marks, all of which have to be found. */
  readonly marks?: readonly number[]
  /** Or why the addresses are refused. */
  readonly refused?: RegExp
}

const twoNodes = '-object memory-backend-ram,id=m0,size=1G -object memory-backend-ram,id=m1,size=1G -numa node,memdev=m1 -numa node,memdev=m0'
const sharedNodes = twoNodes.replaceAll('size=1G', 'size=2G,share=on')
const dimm = '-object memory-backend-ram,id=d0,size=SIZE -device pc-dimm,id=dimm0,memdev=d0'

const machines: Record<string, Machine> = {
  'pc, all below the hole': { machine: 'pc', memory: '3328M', marks: [2 * MiB, 0xcff0_0000] },
  'pc with a hole': { machine: 'pc', memory: '5G', marks: [2 * MiB, 0xbff0_0000, 4 * GiB, 0x1_3ff0_0000] },
  'pc, little memory': { machine: 'pc', memory: '12M', marks: [2 * MiB, 0xb0_0000] },
  'q35 with a hole': { machine: 'q35', memory: '5G', marks: [2 * MiB, 0x7ff0_0000, 4 * GiB, 0x1_bff0_0000] },
  'q35, all below the hole': { machine: 'q35', memory: '2560M', marks: [2 * MiB, 0x9ff0_0000] },
  'max-ram-below-4g': { machine: 'pc,max-ram-below-4g=1G', memory: '2G', marks: [2 * MiB, 0x3ff0_0000, 4 * GiB, 0x1_3ff0_0000] },
  'an old machine that names none': { machine: 'pc-i440fx-2.3', memory: '4G', marks: [2 * MiB, 0xbff0_0000, 4 * GiB] },
  'video memory that is larger': { machine: 'pc', memory: '64M', args: '-device VGA,vgamem_mb=256', marks: [2 * MiB, 0x3f0_0000] },
  'main memory by name': { machine: 'pc,memory-backend=mine', memory: '5G', args: '-object memory-backend-ram,id=mine,size=5G', marks: [0xbff0_0000, 4 * GiB] },
  'with addresses': { machine: 'pc,memory-backend=mine', memory: '5G', args: '-object memory-backend-ram,id=mine,size=5G', addresses: true, marks: [2 * MiB, 0xbff0_0000, 4 * GiB, 0x1_3ff0_0000] },
  microvm: { machine: 'microvm', memory: '4G', marks: [2 * MiB, 0xbff0_0000, 4 * GiB] },
  'virtio-mem that is larger': {
    machine: 'pc',
    memory: '256M,maxmem=4G',
    args: '-object memory-backend-ram,id=v0,size=1G -device virtio-mem-pci,memdev=v0,id=vm0,requested-size=512M',
    marks: [2 * MiB],
  },
  'NUMA nodes in two blocks': { machine: 'pc', memory: '2G', args: twoNodes, refused: /in several RAM blocks \('m0' of 1073741824 bytes, 'm1' of 1073741824 bytes; NUMA nodes\?\)/ },
  'a DIMM that is larger': { machine: 'pc', memory: '256M,slots=2,maxmem=4G', args: dimm.replace('SIZE', '1G'), refused: /besides main memory there is 'd0' of 1073741824 bytes/ },
  'a DIMM that is smaller': { machine: 'pc', memory: '512M,slots=2,maxmem=4G', args: dimm.replace('SIZE', '128M'), refused: /besides main memory there is 'd0' of 134217728 bytes/ },
  'a DIMM of the same size': { machine: 'q35', memory: '256M,slots=2,maxmem=4G', args: dimm.replace('SIZE', '256M'), refused: /'d0'/ },
  'memory shared with others': { machine: 'pc', memory: '64M', args: '-object memory-backend-ram,id=s0,size=128M,share=on -device ivshmem-plain,memdev=s0,master=on', refused: /besides main memory there is '[^']*s0' of 134217728 bytes/ },
}

function markAt(index: number): bigint {
  return 0x1122_3344_5566_0001n + BigInt(index)
}

async function savedVm(qemu: Qemu, { machine, memory, args = '', addresses = false, marks = [] }: Machine): Promise<VmState> {
  const loaders = marks.flatMap((address, i) => ['-device', `loader,addr=0x${address.toString(16)},data=0x${markAt(i).toString(16)},data-len=8`])
  const guest = await Guest.boot(qemu, { machine, memory, paused: true, args: [...args.split(' ').filter((arg) => arg !== ''), ...loaders] })
  if (addresses) await guest.qmp.execute('migrate-set-capabilities', { capabilities: [{ capability: 'x-ignore-shared', state: true }] })
  const stream = await captureStream(guest, false)
  await guest.kill()
  return VmState.index(new MemoryDevice(stream))
}

describeWithQemu('addresses of memory', (qemu) => {
  const known = Object.keys(machines).filter((name) => !(name === 'an old machine that names none' && qemu.major > 9))
  test.each(known)('%s', async (name) => {
    const machine = machines[name]!
    await using vm = await savedVm(qemu, machine)
    if (machine.refused !== undefined) {
      expect(() => physicalRanges(vm)).toThrow(expect.objectContaining({ code: 'ERR_UNSUPPORTED', message: expect.stringMatching(machine.refused) as string }) as Error)
      await expect(vm.ram.readPhysical(2 * MiB, 8)).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
      return
    }
    const ranges = physicalRanges(vm)
    for (const [i, address] of (machine.marks ?? []).entries()) {
      const bytes = await vm.ram.readPhysical(address, 8)
      expect(new DataView(bytes.buffer).getBigUint64(0, true), `address 0x${address.toString(16)}`).toBe(markAt(i))
    }
    if (name.startsWith('virtio-mem')) expect(ranges.find(({ block }) => block.endsWith('/v0'))).toMatchObject({ address: 4 * GiB, length: GiB })
    const [total, unit] = /^(\d+)([MG])/.exec(machine.memory)!.slice(1) as [string, string]
    const main = ranges.filter(({ block }) => !/bios|flash|\//.test(block)).reduce((sum, { length }) => sum + length, 0)
    expect(main).toBe(Number(total) * (unit === 'G' ? GiB : MiB))
  })

  test('NUMA nodes, by a map', async () => {
    const marks = [2 * MiB, 1 * GiB + 2 * MiB]
    await using plain = await savedVm(qemu, { machine: 'pc', memory: '2G', args: twoNodes, marks })
    const map: PhysicalRange[] = [{ block: 'm1', offset: 0, length: GiB, address: 0 }, { block: 'm0', offset: 0, length: GiB, address: GiB }]
    for (const [i, address] of marks.entries()) {
      const bytes = await plain.ram.readPhysical(address, 8, { map })
      expect(new DataView(bytes.buffer).getBigUint64(0, true)).toBe(markAt(i))
    }
  })

  test('NUMA nodes in an order that the stream tells: their memory is absent, not elsewhere', async () => {
    await using vm = await savedVm(qemu, { machine: 'pc', memory: '4G', args: sharedNodes, addresses: true })
    expect(physicalRanges(vm)).toEqual([
      { block: 'm1', offset: 0, length: 2 * GiB, address: 0 },
      { block: 'm0', offset: 0, length: GiB, address: 2 * GiB },
      { block: 'pc.bios', offset: 0, length: 65_536, address: 0xffff_0000 },
      { block: 'm0', offset: GiB, length: GiB, address: 4 * GiB },
    ])
  })

  test('video memory is left out, firmware ends at 4 GiB', async () => {
    await using vm = await savedVm(qemu, machines['video memory that is larger']!)
    expect(physicalRanges(vm)).toEqual([
      { block: 'pc.ram', offset: 0, length: 64 * MiB, address: 0 },
      { block: 'pc.bios', offset: 0, length: 65_536, address: 0xffff_0000 },
    ])
    const bios = readFileSync(resolve(import.meta.dirname, '../fixtures/guest/tinybios.bin'))
    expect(Buffer.compare(await vm.ram.readPhysical(0xffff_0000, 65_536), bios)).toBe(0)
  })

  test('flash: the first ends at 4 GiB, the second before it', async () => {
    const folder = tempFolder()
    const [code, vars] = [join(folder, 'code'), join(folder, 'vars')]
    writeFileSync(code, new Uint8Array(4 * MiB).fill(0xc0))
    writeFileSync(vars, new Uint8Array(MiB).fill(0xd1))
    const args = ['-drive', `if=pflash,unit=0,format=raw,readonly=on,file=${code}`, '-drive', `if=pflash,unit=1,format=raw,file=${vars}`]
    const guest = await Guest.boot(qemu, { machine: 'q35', memory: 64, paused: true, system: [], args })
    await using vm = await VmState.index(new MemoryDevice(await captureStream(guest, false)))
    expect(physicalRanges(vm).map(({ block, address }) => [block, address])).toEqual([['pc.ram', 0], ['system.flash1', 4 * GiB - 5 * MiB], ['system.flash0', 4 * GiB - 4 * MiB]])
    expect([...(await vm.ram.readPhysical(4 * GiB - 4 * MiB - 1, 2))]).toEqual([0xd1, 0xc0])
  })
})

describe('other targets', () => {
  test('aarch64: virt has its memory at 1 GiB, flash at 0', async () => {
    await using vm = await VmState.index(new MemoryDevice(new Uint8Array(gunzipSync(readFileSync(resolve(import.meta.dirname, '../fixtures/targets/aarch64.mig.gz'))))))
    const page = await vm.ram.readPhysical(GiB + MiB + 5 * 4096, 4096)
    expect(new Uint32Array(page.buffer)).toEqual(new Uint32Array(1024).fill(5))
    expect(physicalRanges(vm).map(({ block, address }) => [block, address])).toEqual([['virt.flash0', 0], ['virt.flash1', 64 * MiB], ['mach-virt.ram', GiB]])
  })

  test('riscv64: virt has its memory at 2 GiB', () => {
    const blocks = listOf([['riscv_virt_board.ram', 8 * GiB], ['virt.flash0', 32 * MiB], ['virt.flash1', 32 * MiB], ['riscv_virt_board.mrom', 0xf000]])
    expect(physicalRanges({ machine: 'virt', ram: { blocks } }).map(({ block, address }) => [block, address])).toEqual([
      ['riscv_virt_board.mrom', 0x1000], ['virt.flash0', 0x2000_0000], ['virt.flash1', 0x2200_0000], ['riscv_virt_board.ram', 0x8000_0000],
    ])
  })

  test.each<[string, string | undefined, [string, number][]]>([
    ["machine type 's390-ccw-virtio-7.2'", 's390-ccw-virtio-7.2', [['s390.ram', GiB]]],
    ["machine type 'virt'", 'virt', [['loongarch.lowram', GiB]]],
    ['does not name the machine type', undefined, [['pc.ram', GiB]]],
    ['no readable state of the clock', 'pc-q35-9.0', [['pc.ram', GiB]]],
    ['several RAM blocks', 'virt-9.0', [['mach-virt.ram', GiB], ['dimm0', GiB]]],
    ["no RAM block 'mach-virt.ram'", 'virt-9.0', [['virt.flash0', MiB]]],
  ])('%s is refused', (reason, machine, blocks) => {
    expect(() => physicalRanges({ machine, ram: { blocks: listOf(blocks) } })).toThrow(expect.objectContaining({ code: 'ERR_UNSUPPORTED', message: expect.stringContaining(reason) as string }) as Error)
  })
})

describe('what the firmware was told', () => {
  const pc = (below: number, above: number, blocks: [string, number][]): PhysicalSource => ({ machine: 'pc-i440fx-9.0', ram: { blocks: listOf(blocks) }, placement: { pc: { below, above }, virtioMem: [] } })

  test('the rounding of 64 KiB is memory, too', () => {
    expect(physicalRanges(pc(100 * MiB, 0, [['pc.ram', 100 * MiB + 8192]]))).toEqual([{ block: 'pc.ram', offset: 0, length: 100 * MiB + 8192, address: 0 }])
    expect(physicalRanges(pc(3 * GiB, GiB, [['pc.ram', 4 * GiB + 8192]])).map(({ length }) => length)).toEqual([3 * GiB, GiB + 8192])
  })

  test('more than it can count, or another size, is refused', () => {
    expect(physicalRanges(pc(3 * GiB, 900 * GiB, [['pc.ram', 903 * GiB]]))).toHaveLength(2)
    for (const [below, above, length] of [[3 * GiB, 1020 * GiB, 1023 * GiB], [3 * GiB, GiB, 2 ** 40 + 4 * GiB], [2 * GiB, 0, GiB], [GiB, 0, 2 * GiB]] as const) {
      expect(() => physicalRanges(pc(below, above, [['pc.ram', length]]))).toThrow(/not certain/)
    }
  })

  test('the clock is found in a stream without VM description', async () => {
    const bytes = capture('qemu100-bgsnap.mig')
    await using vm = await VmState.index(new MemoryDevice(bytes.slice(0, bytes.length - 20)))
    expect(vm.tailOffset).toBeDefined()
    expect(physicalRanges(vm).map(({ address }) => address)).toEqual([0, 0xffff_0000])
    expect(await readPlacement(new MemoryDevice(new Uint8Array(0)), [], undefined)).toEqual({ pc: undefined, virtioMem: [] })
  })
})

describe('a map', () => {
  const vm: PhysicalSource = { machine: undefined, ram: { blocks: listOf([['a', 2 * MiB], ['b', MiB]]) } }

  test('is sorted by address', () => {
    const map = [{ block: 'b', offset: 0, length: MiB, address: 4 * GiB }, { block: 'a', offset: MiB, length: MiB, address: 0 }]
    expect(physicalRanges(vm, { map }).map(({ block }) => block)).toEqual(['a', 'b'])
  })

  test.each<[string, PhysicalRange[]]>([
    ["no RAM block 'c'", [{ block: 'c', offset: 0, length: 1, address: 0 }]],
    ['which has 1048576', [{ block: 'b', offset: MiB, length: 1, address: 0 }]],
    ['which has 1048576', [{ block: 'b', offset: 0, length: 0, address: 0 }]],
    ['which has 1048576', [{ block: 'b', offset: 0, length: 1, address: 2 ** 53 }]],
    ['overlap at address 0xff000', [{ block: 'a', offset: 0, length: MiB, address: 0 }, { block: 'b', offset: 0, length: MiB, address: 0xff000 }]],
  ])('%s', (message, map) => {
    expect(() => physicalRanges(vm, { map })).toThrow(message)
  })

  test('65,536 blocks take no time to speak of', () => {
    const blocks = listOf(Array.from({ length: 65_536 }, (_, i) => [`b${i}`, 4096]))
    const map = blocks.map(({ name, length }, i) => ({ block: name, offset: 0, length, address: (65_536 - i) * 8192 }))
    const started = performance.now()
    expect(physicalRanges({ machine: undefined, ram: { blocks } }, { map })).toHaveLength(65_536)
    expect(() => physicalRanges({ machine: 'pc-q35-9.0', ram: { blocks }, placement: { pc: { below: GiB, above: 0 }, virtioMem: [] } })).toThrow(/and 65531 more/)
    expect(performance.now() - started).toBeLessThan(2000)
  })
})

function listOf(blocks: readonly (readonly [name: string, length: number])[]): RamBlock[] {
  return blocks.map(([name, length], index) => ({ index, name, length }))
}
