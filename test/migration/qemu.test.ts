/** Streams of real QEMUs made here, and streams assembled here loaded by real QEMUs. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { plainStream } from '../../src/migration/convert.ts'
import { exportMappedRam, writeStream } from '../../src/migration/mapped-ram.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { encodeRecord } from '../../src/migration/writer.ts'
import { checkGuestMemory, Guest } from '../support/guest.ts'
import { describeWithQemu, qemus, type Qemu } from '../support/qemu.ts'
import { captureStream } from '../support/saved.ts'
import { tempFolder } from '../support/temp.ts'
import { capture } from './captures.ts'

/** Machine types both here and in the captures. */
const machineOf = (qemu: Qemu): string => `pc-i440fx-${qemu.version.split('.').slice(0, 2).join('.')}`

async function loadInto(qemu: Qemu, machine: string, stream: AsyncIterable<Uint8Array>, vm: VmState): Promise<void> {
  const { tick } = await checkGuestMemory((offset, length) => vm.ram.read('pc.ram', offset, length))
  const file = join(tempFolder(), 'stream')
  await using device = await openFile(file, { create: 'w' })
  await writeStream(stream, device)
  const guest = await Guest.boot(qemu, { machine, incoming: `exec:cat ${file}` })
  await goOn(guest, tick)
}

/** A VM saved while stopped stays stopped. */
async function goOn(guest: Guest, tick: number): Promise<void> {
  let status = { status: 'inmigrate' }
  while (status.status === 'inmigrate') {
    status = await guest.qmp.execute('query-status')
    await new Promise((wake) => setTimeout(wake, 5))
  }
  if (status.status !== 'running') await guest.qmp.execute('cont')
  await guest.expectGoesOn(tick)
  await guest.kill()
}

describeWithQemu('real streams', (qemu) => {
  test.each([true, false])("RAM equals QEMU's own dump of the stopped VM (background snapshot: %s)", async (background) => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    await guest.qmp.execute('stop')
    const dump = join(guest.folder, 'ram')
    await guest.qmp.execute('pmemsave', { val: 0, size: 4 << 20, filename: dump })
    const stream = await captureStream(guest, background)
    await guest.kill()
    await using vm = await VmState.index(new MemoryDevice(stream))
    const ram = await vm.ram.read('pc.ram', 0, 4 << 20)
    const physical = readFileSync(dump)
    // From 640 KiB to 1 MiB the guest sees ROM and devices, not this memory.
    expect(physical.subarray(0, 0xa0000).equals(ram.subarray(0, 0xa0000))).toBe(true)
    expect(physical.subarray(0x100000).equals(ram.subarray(0x100000))).toBe(true)
    expect(await vm.decodeDevices()).toHaveProperty(['globalstate (0)'])
  })

  test('a stream of a running guest is rebuilt byte for byte and loads', async () => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    const stream = await captureStream(guest)
    await guest.kill()
    const parser = new MigrationParser()
    const pieces: Uint8Array[] = []
    for (let at = 0; at < stream.length; at += 50_000) for (const record of parser.push(stream.subarray(at, at + 50_000))) pieces.push(encodeRecord(record).slice())
    parser.end()
    const rebuilt = Buffer.concat(pieces)
    expect(rebuilt.equals(stream)).toBe(true)
    await using vm = await VmState.index(new MemoryDevice(stream))
    await loadInto(qemu, 'pc', chunks(rebuilt), vm)
  })

  const captures = qemu.major >= 10 ? ['qemu100-xbzrle.mig', 'qemu100-mappedram.mig', 'qemu100-precopy.mig'] : ['qemu72-compress.mig', 'qemu72-bgsnap.mig']

  test.each(captures)('%s as a plain stream loads and the guest goes on', async (name) => {
    await using vm = await VmState.index(new MemoryDevice(capture(name)))
    await loadInto(qemu, machineOf(qemu), plainStream(vm), vm)
  })

  test('without its zero pages it loads into a fresh VM', async () => {
    const name = qemu.major >= 10 ? 'qemu100-bgsnap.mig' : 'qemu72-bgsnap.mig'
    await using vm = await VmState.index(new MemoryDevice(capture(name)))
    await loadInto(qemu, machineOf(qemu), plainStream(vm, { zeroPages: 'drop' }), vm)
  })
})

async function* chunks(bytes: Uint8Array): AsyncGenerator<Uint8Array> {
  await Promise.resolve()
  yield bytes
}

const newest = qemus.find(({ major }) => major >= 10)

test.skipIf(newest === undefined)('compressed pages of QEMU 7.2 load in 10.0, which cannot read them itself', async () => {
  await using vm = await VmState.index(new MemoryDevice(capture('qemu72-compress.mig')))
  await loadInto(newest!, 'pc-i440fx-7.2', plainStream(vm), vm)
})

test.skipIf(newest === undefined)('a mapped-ram file made from a background snapshot loads', async () => {
  await using vm = await VmState.index(new MemoryDevice(capture('qemu100-bgsnap.mig')))
  const { tick } = await checkGuestMemory((offset, length) => vm.ram.read('pc.ram', offset, length))
  const file = join(tempFolder(), 'mapped')
  writeFileSync(file, '')
  {
    await using device = await openFile(file)
    await exportMappedRam(vm, device)
  }
  const guest = await Guest.boot(newest!, { machine: 'pc-i440fx-10.0', incoming: 'defer' })
  await guest.qmp.execute('migrate-set-capabilities', { capabilities: [{ capability: 'mapped-ram', state: true }] })
  await guest.qmp.execute('migrate-incoming', { uri: `file:${file}` })
  await goOn(guest, tick)
})
