/**
 * Streams that real QEMUs make with each capability that changes a stream: read to their end, put together again byte
 * for byte, and their RAM equal to QEMU's own dump of the stopped VM.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { ramFlag } from '../../src/migration/format.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { Guest, type GuestOptions } from '../support/guest.ts'
import { memoryOf, migrate, packetsOf, takenApart, type Migrated, type MigrationSettings } from '../support/migrated.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

interface Case extends MigrationSettings {
  readonly title: string
  /** First and, if it is gone since, last major version that has it. */
  readonly since?: number
  readonly until?: number
  readonly guest?: GuestOptions
  /** Names of records that the main stream must have. */
  readonly has?: readonly string[]
  readonly hasNot?: readonly string[]
  /** Flags that some page record of the main stream must have. */
  readonly flags?: number
  /** Shared memory does not come. */
  readonly absent?: boolean
}

const multifd = { capabilities: ['multifd'], channels: 2 }
const uuid = '00112233-4455-6677-8899-aabbccddeeff'

const cases: Case[] = [
  { title: 'no capability' },
  { title: 'background-snapshot', capabilities: ['background-snapshot'], hasNot: ['end ram'] },
  { title: 'xbzrle of a guest that stands still', capabilities: ['xbzrle'] },
  { title: 'compress', until: 9, capabilities: ['compress'], flags: ramFlag.compressPage },
  { title: 'multifd, none', ...multifd },
  { title: 'multifd, zlib', ...multifd, parameters: { 'multifd-compression': 'zlib' } },
  { title: 'multifd, zstd', ...multifd, parameters: { 'multifd-compression': 'zstd' } },
  { title: 'multifd, four channels', ...multifd, channels: 4, parameters: { 'multifd-channels': 4 } },
  { title: 'mapped-ram', since: 9, capabilities: ['mapped-ram'], file: true, has: ['bytes'] },
  { title: 'mapped-ram with multifd', since: 9, capabilities: ['mapped-ram', 'multifd'], file: true },
  { title: 'mapped-ram with multifd and direct-io', since: 9, capabilities: ['mapped-ram', 'multifd'], parameters: { 'direct-io': true }, file: true },
  { title: 'zero-page-detection none', since: 9, parameters: { 'zero-page-detection': 'none' } },
  { title: 'zero-page-detection legacy with multifd', since: 9, ...multifd, parameters: { 'zero-page-detection': 'legacy' }, flags: ramFlag.zero },
  { title: 'zero-page-detection none with multifd', since: 9, ...multifd, parameters: { 'zero-page-detection': 'none' } },
  { title: 'release-ram', capabilities: ['release-ram'] },
  { title: 'return-path', capabilities: ['return-path'], acknowledge: true, has: ['openReturnPath', 'ping'] },
  { title: 'postcopy-ram, never switched to', capabilities: ['postcopy-ram'], acknowledge: true, has: ['openReturnPath', 'postcopyAdvise'] },
  { title: 'validate-uuid', capabilities: ['validate-uuid'], guest: { args: ['-uuid', uuid] } },
  { title: 'no VM description', guest: { machine: 'pc,suppress-vmdesc=on' }, hasNot: ['vm-description'] },
  { title: 'a machine type without configuration, footers and description', until: 7, guest: { machine: 'pc-i440fx-2.2' }, hasNot: ['configuration', 'footer', 'vm-description'] },
  { title: 'x-ignore-shared', capabilities: ['x-ignore-shared'], absent: true },
]

const available = (version: number) => cases.filter(({ since = 0, until = Infinity }) => version >= since && version <= until)

/** From 640 KiB to 1 MiB the guest sees ROM and devices, not this memory. */
function expectSameMemory(ram: Uint8Array, dump: Buffer): void {
  expect(ram.length).toBe(dump.length)
  expect(dump.subarray(0, 0xa0000).equals(ram.subarray(0, 0xa0000))).toBe(true)
  expect(dump.subarray(0x100000).equals(ram.subarray(0x100000))).toBe(true)
}

async function dumped(guest: Guest): Promise<Buffer> {
  const filename = join(guest.folder, 'dump')
  await guest.qmp.execute('pmemsave', { val: 0, size: 4 << 20, filename })
  return readFileSync(filename)
}

function sharedMemory(): GuestOptions {
  const backend = `memory-backend-file,id=memory,size=4M,share=on,mem-path=${join(tempFolder(), 'ram')}`
  return { machine: 'pc,memory-backend=memory', args: ['-object', backend] }
}

async function expectAbsent({ main }: Migrated): Promise<void> {
  await using vm = await VmState.index(new MemoryDevice(main))
  expect(vm.capabilities).toContain('x-ignore-shared')
  const { gpa, length } = vm.ram.block('memory')
  expect(gpa).toBe(0)
  for (let at = 0; at < length; at += 4096) expect(vm.ram.pageKind('memory', at)).toBe('absent')
  expect(vm.ram.counts.normal).toBeGreaterThan(0)
}

describeWithQemu('capabilities', (qemu) => {
  test.each(available(qemu.major))('$title', async (settings) => {
    const guest = await Guest.boot(qemu, settings.absent === true ? sharedMemory() : settings.guest)
    await guest.run(3)
    await guest.qmp.execute('stop')
    const dump = await dumped(guest)
    const migrated = await migrate(guest, settings)
    const { records, rebuilt, flags } = takenApart(migrated.main)
    expect(Buffer.compare(rebuilt, migrated.main)).toBe(0)
    for (const name of settings.has ?? []) expect(records).toContain(name)
    for (const name of settings.hasNot ?? []) expect(records).not.toContain(name)
    expect(flags & (settings.flags ?? 0)).toBe(settings.flags ?? 0)
    if (settings.absent === true) await expectAbsent(migrated)
    else expectSameMemory(await memoryOf(migrated), dump)
  })

  if (qemu.major >= 9) test('zero-page-detection: zero pages come as whole pages, on the main channel, or in packets', async () => {
    const told = async (mode: string): Promise<{ main: number; packets: number }> => {
      const guest = await Guest.boot(qemu)
      await guest.qmp.execute('stop')
      const { main, channels } = await migrate(guest, { ...multifd, parameters: { 'zero-page-detection': mode } })
      let packets = 0
      for (const { zero } of packetsOf(main, channels)) packets += zero.length
      return { main: takenApart(main).flags & ramFlag.zero, packets }
    }
    expect(await told('none')).toEqual({ main: 0, packets: 0 })
    expect(await told('legacy')).toEqual({ main: ramFlag.zero, packets: 0 })
    const { main, packets } = await told('multifd')
    expect(main).toBe(0)
    expect(packets).toBeGreaterThan(0)
  })

  test('dirty-bitmaps', async () => {
    const disk = join(tempFolder(), 'disk.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', disk, '64M')
    const guest = await Guest.boot(qemu, { disks: [disk] })
    await guest.run(3)
    await guest.qmp.execute('block-dirty-bitmap-add', { node: 'd0', name: 'changes', persistent: true, granularity: 65_536 })
    await guest.qmp.execute('human-monitor-command', { 'command-line': 'qemu-io d0 "write 1M 200k"' })
    await guest.qmp.execute('stop')
    const dump = await dumped(guest)
    const migrated = await migrate(guest, { capabilities: ['dirty-bitmaps'] })
    const { records, rebuilt } = takenApart(migrated.main)
    expect(Buffer.compare(rebuilt, migrated.main)).toBe(0)
    expect(records).toContain('start dirty-bitmap')
    expect(records).toContain('postcopyAdvise')
    expect(records.filter((name) => name === 'dirty-bitmap').length).toBeGreaterThan(2)
    expectSameMemory(await memoryOf(migrated), dump)
  })

  test('postcopy: a package, discards, and pages behind it', async () => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    await guest.qmp.execute('stop')
    const dump = await dumped(guest)
    const migrated = await migrate(guest, {
      capabilities: ['postcopy-ram'],
      parameters: { 'max-bandwidth': 1 << 20 },
      acknowledge: true,
      during: async () => {
        await guest.qmp.execute('migrate-start-postcopy')
      },
    })
    const { records, rebuilt } = takenApart(migrated.main)
    expect(Buffer.compare(rebuilt, migrated.main)).toBe(0)
    expect(records).toContain('packaged')
    expect(records).toContain('postcopyRamDiscard')
    expect(records.lastIndexOf('ram-pages')).toBeGreaterThan(records.indexOf('packaged'))
    expectSameMemory(await memoryOf(migrated), dump)
  })

  test('xbzrle of a running guest', async () => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    const migrated = await migrate(guest, {
      capabilities: ['xbzrle'],
      parameters: { 'max-bandwidth': 3 << 20 },
      during: async () => {
        await new Promise((wake) => setTimeout(wake, 2000))
        await guest.qmp.execute('migrate-set-parameters', { 'max-bandwidth': 600 << 20 })
      },
    })
    const { rebuilt, flags } = takenApart(migrated.main)
    expect(Buffer.compare(rebuilt, migrated.main)).toBe(0)
    expect(flags & ramFlag.xbzrle).toBe(ramFlag.xbzrle)
    await using vm = await VmState.index(new MemoryDevice(migrated.main))
    expect(vm.ram.counts.xbzrle).toBeGreaterThan(0)
    const ram = await memoryOf(migrated)
    // QEMU 7.2 loses dirty pages of a guest that runs under TCG: there is no truth to compare with
    if (qemu.major >= 10) expectSameMemory(ram, await dumped(guest))
  })
})
