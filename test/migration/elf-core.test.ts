/** The ELF core beside QEMU's own dump of the same stopped instant, and the other files by physical address. */
import { readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { describe, expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { exportElfCore } from '../../src/migration/elf-core.ts'
import { exportLime, exportPhysical } from '../../src/migration/physical-export.ts'
import { physicalRanges } from '../../src/migration/physical-ranges.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { expectBytes } from '../support/bytes.ts'
import { Guest, type GuestOptions } from '../support/guest.ts'
import { describeWithLinux } from '../support/linux.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { captureStream } from '../support/saved.ts'
import { tempFolder } from '../support/temp.ts'
import { describeWithTools, outputOf } from '../support/tools.ts'
import { capture } from './captures.ts'

interface Segment {
  readonly type: number
  readonly offset: number
  readonly address: number
  readonly length: number
}

interface Core {
  readonly machine: number
  readonly segments: readonly Segment[]
  readonly notes: readonly { readonly name: string; readonly type: number; readonly content: Uint8Array }[]
}

function coreOf(file: Uint8Array): Core {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength)
  const u64 = (at: number): number => Number(view.getBigUint64(at, true))
  const [first, count] = [u64(32), view.getUint16(56, true) === 0xffff ? view.getUint32(u64(40) + 44, true) : view.getUint16(56, true)]
  const segments = Array.from({ length: count }, (_, i) => {
    const at = first + 56 * i
    return { type: view.getUint32(at, true), offset: u64(at + 8), address: u64(at + 24), length: u64(at + 32) }
  })
  const notes = []
  const { offset, length } = segments.find(({ type }) => type === 4)!
  for (let at = offset; at < offset + length; ) {
    const [nameLength, contentLength] = [view.getUint32(at, true), view.getUint32(at + 4, true)]
    const content = at + 12 + Math.ceil(nameLength / 4) * 4
    notes.push({ name: Buffer.from(file.subarray(at + 12, at + 11 + nameLength)).toString(), type: view.getUint32(at + 8, true), content: file.subarray(content, content + contentLength) })
    at = content + Math.ceil(contentLength / 4) * 4
  }
  return { machine: view.getUint16(18, true), segments: segments.filter(({ type }) => type === 1), notes }
}

async function ourCore(vm: VmState): Promise<Uint8Array> {
  const target = new MemoryDevice(0, { growable: true })
  await exportElfCore(vm, target)
  return target.bytes
}

/** The stopped guest as a stream, and as QEMU dumps it. */
async function stoppedAndDumped(qemu: Qemu, options: GuestOptions, ready: (guest: Guest) => Promise<unknown>): Promise<{ stream: Uint8Array; dump: Uint8Array }> {
  const guest = await Guest.boot(qemu, options)
  await ready(guest)
  await guest.qmp.execute('stop')
  const path = join(guest.folder, 'dump')
  await guest.qmp.execute('dump-guest-memory', { paging: false, protocol: `file:${path}` })
  const stream = await captureStream(guest, false)
  await guest.kill()
  return { stream, dump: readFileSync(path) }
}

async function expectSameCore(stream: Uint8Array, dump: Uint8Array): Promise<void> {
  await using vm = await VmState.index(new MemoryDevice(stream))
  const [ours, theirs] = [await ourCore(vm), new Uint8Array(dump)]
  const [core, other] = [coreOf(ours), coreOf(theirs)]
  expect(core.machine).toBe(other.machine)
  expect(core.notes.map(({ name, type }) => [name, type])).toEqual(other.notes.map(({ name, type }) => [name, type]))
  core.notes.forEach(({ content }, i) => expectBytes(content, other.notes[i]!.content))
  // QEMU shows firmware below 1 MiB where the guest has it; memory itself is compared everywhere else
  for (const segment of other.segments) {
    const from = segment.address === 0 ? 0 : segment.address
    if (from >= 0xa_0000 && from < 0x10_0000) continue
    const mine = core.segments.find(({ address, length }) => address <= from && from + segment.length <= address + length)!
    const until = from === 0 ? Math.min(segment.length, 0xa_0000) : segment.length
    const at = mine.offset + from - mine.address
    expectBytes(ours.subarray(at, at + until), theirs.subarray(segment.offset, segment.offset + until))
    if (until < segment.length) expectBytes(ours.subarray(at + 0x10_0000, at + segment.length), theirs.subarray(segment.offset + 0x10_0000, segment.offset + segment.length))
  }
}

describeWithQemu("QEMU's own dump", (qemu) => {
  test.each(['pc', 'q35'])('%s, two CPUs without long mode: notes and memory are the same', async (machine) => {
    const { stream, dump } = await stoppedAndDumped(qemu, { machine, args: ['-smp', '2'] }, (guest) => guest.run(2))
    await expectSameCore(stream, dump)
  })

  test("the kernel's VMCOREINFO, where the guest has told its place", async () => {
    const note = Buffer.concat([Buffer.from([11, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]), Buffer.from('VMCOREINFO\0\0OSRELEASE\0\0\0')])
    const bytes = [...note].map((byte, i) => ['-device', `loader,addr=0x${(0x20_0000 + i).toString(16)},data=${byte},data-len=1`])
    const guest = await Guest.boot(qemu, { paused: true, args: ['-device', 'vmcoreinfo', ...bytes.flat()] })
    const stream = await captureStream(guest, false)
    const { offset } = await VmState.index(new MemoryDevice(stream)).then((vm) => vm.device('vmcoreinfo'))
    const tell = async (length: number, address: number): Promise<Core['notes']> => {
      const view = new DataView(stream.buffer, stream.byteOffset + offset)
      view.setUint8(0, 1) // has_vmcoreinfo
      view.setUint16(3, 1) // guest_format: an ELF note
      view.setUint32(5, length)
      view.setBigUint64(9, BigInt(address))
      await using vm = await VmState.index(new MemoryDevice(stream))
      return coreOf(await ourCore(vm)).notes
    }
    const told = await tell(note.length, 0x20_0000)
    expect(told.at(-1)).toMatchObject({ name: 'VMCOREINFO', type: 0 })
    expect(Buffer.from(told.at(-1)!.content).toString()).toBe('OSRELEASE')
    // what a guest may tell as well
    for (const [length, address] of [[note.length, 0x7000_0000], [note.length - 1, 0x20_0000], [5, 0x20_0000], [0xffff_ffff, 0]] as const) {
      expect((await tell(length, address)).map(({ name }) => name)).toEqual(['CORE', 'QEMU'])
    }
  })
})

describeWithLinux("QEMU's own dump of Linux", (qemu, linux) => {
  test('notes and memory are the same', async () => {
    const { stream, dump } = await stoppedAndDumped(qemu, { ...linux, args: ['-smp', '2'] }, () => sleep(4000))
    await expectSameCore(stream, dump)
  }, 120_000)
})

describeWithTools('many segments', ['readelf'], () => {
  test('65,535 and more are counted in section 0', async () => {
    await using vm = await VmState.index(new MemoryDevice(capture('qemu100-bgsnap.mig')))
    const empty = vm.ram.blocks.find(({ name }) => name === 'pc.rom')!
    for (const count of [65_533, 65_534, 70_000]) {
      const map = Array.from({ length: count }, (_, i) => ({ block: empty.name, offset: 0, length: 4096, address: i * 8192 }))
      const file = join(tempFolder(), 'core')
      await using target = await openFile(file, { create: 'w' })
      await exportElfCore(vm, target, { map })
      const { segments } = coreOf(await target.read(0, 8 << 20))
      expect(segments).toHaveLength(count)
      expect(segments.at(-1)).toMatchObject({ address: (count - 1) * 8192, length: 4096 })
      const header = outputOf('readelf', '-hW', file)
      expect(header).toMatch(count < 65_534 ? /Number of program headers: +65534$/m : new RegExp(`Number of program headers: +65535 \\(${count + 1}\\)`))
    }
  })
})

describe('raw and LiME', () => {
  test('every byte is at its address, holes are holes', async () => {
    await using vm = await VmState.index(new MemoryDevice(capture('qemu100-bgsnap.mig')))
    const file = join(tempFolder(), 'raw')
    const target = await openFile(file, { create: 'w' })
    const progress: number[] = []
    await exportPhysical(vm, target, { onProgress: ({ done, total }) => progress.push(done / total) })
    expect(target.size).toBe(2 ** 32)
    expect(progress.at(-1)).toBe(1)
    for (const { block, length, address } of physicalRanges(vm)) expectBytes(await target.read(address, length), await vm.ram.read(block, 0, length))
    await target.close()
    expect(statSync(file).blocks * 512).toBeLessThan(16 << 20)
  })

  test('LiME: a header before each range, with its first and last address', async () => {
    await using vm = await VmState.index(new MemoryDevice(capture('qemu100-bgsnap.mig')))
    const target = new MemoryDevice(0, { growable: true })
    await exportLime(vm, target)
    const view = new DataView(target.bytes.buffer)
    let at = 0
    for (const { block, length, address } of physicalRanges(vm)) {
      expect([view.getUint32(at, true), view.getUint32(at + 4, true)]).toEqual([0x4c694d45, 1])
      expect([Number(view.getBigUint64(at + 8, true)), Number(view.getBigUint64(at + 16, true))]).toEqual([address, address + length - 1])
      expectBytes(target.bytes.subarray(at + 32, at + 32 + length), await vm.ram.read(block, 0, length))
      at += 32 + length
    }
    expect(target.size).toBe(at)
  })
})
