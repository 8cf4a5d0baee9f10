/** Internal snapshots with VM state: ours for QEMU's loadvm, and QEMU's savevm for us. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { loadVmState, saveVmState } from '../../src/snapshot/vm-state-snapshot.ts'
import { capture as captured } from '../migration/captures.ts'
import { checkGuestMemory, Guest } from '../support/guest.ts'
import { describeWithQemu, qemus } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const disk = 1 << 20
/** Streams of the plain guest, by QEMU and machine type: loadable by either QEMU that knows the machine. */
const streams = ['qemu72-savevm.vmstate', 'qemu72-bgsnap.mig', 'qemu100-savevm.vmstate', 'qemu100-bgsnap.mig', 'qemu100-precopy.mig', 'qemu100-xbzrle.mig']
const major = (name: string): number => (name.startsWith('qemu72') ? 7 : 10)

async function bytesOf(chunks: AsyncIterable<Uint8Array>): Promise<Buffer> {
  const all: Uint8Array[] = []
  for await (const chunk of chunks) all.push(new Uint8Array(chunk))
  return Buffer.concat(all)
}

describe('round trip', () => {
  test.each(streams)('%s comes back byte for byte', async (name) => {
    const stream = captured(name)
    await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: disk })
    const info = await saveVmState(image, stream, { name: 'snap' })
    expect(info).toMatchObject({ name: 'snap', vmStateSize: stream.length, diskSize: disk })
    await using snapshot = await image.snapshots.open('snap')
    expect(Buffer.compare(await bytesOf(loadVmState(snapshot)), stream)).toBe(0)
  })

  test.each(['qemu72-savevm', 'qemu100-savevm'])('%s: the clock in the stream is the one savevm recorded', async (name) => {
    await using theirs = await Qcow2Image.open(new MemoryDevice(new Uint8Array(captured(`${name}.qcow2`))), { readOnly: true })
    await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: disk })
    const info = await saveVmState(image, captured(`${name}.vmstate`), { name: 'snap' })
    expect(info.vmClock).toBe([...theirs.snapshots][0]!.vmClock)
  })

  test('an incomplete stream, or a name that exists, leaves the image as it was', async () => {
    const device = new MemoryDevice(0, { growable: true })
    await using image = await Qcow2Image.create(device, { size: disk })
    const stream = captured('qemu72-bgsnap.mig')
    await saveVmState(image, stream, { name: 'first' })
    await expect(saveVmState(image, stream.subarray(0, stream.length - 1), { name: 'second' })).rejects.toMatchObject({ code: 'ERR_STREAM' })
    await expect(saveVmState(image, stream, { name: 'first' })).rejects.toMatchObject({ code: 'ERR_EXISTS' })
    expect([...image.snapshots].map(({ name }) => name)).toEqual(['first'])
  })

  test('a snapshot without VM state is told', async () => {
    await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: disk })
    await image.snapshots.create({ name: 'disk only' })
    await using snapshot = await image.snapshots.open('disk only')
    await expect(bytesOf(loadVmState(snapshot))).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  })
})

describeWithQemu('VM state snapshots', (qemu) => {
  const loadable = streams.filter((name) => major(name) <= qemu.major)

  test.each(loadable)('-loadvm of %s that we wrote: the guest goes on', async (name) => {
    const file = join(tempFolder(), 'disk.qcow2')
    const stream = captured(name)
    const date = new Date(2024, 1, 3, 4, 5, 6)
    {
      await using image = await Qcow2Image.create(file, { size: disk })
      await saveVmState(image, stream, { name: 'snap', date })
    }
    expect(await qemu.imgOk('check', file)).toContain('No errors were found')
    const list = await qemu.imgOk('snapshot', '-l', file)
    expect(list).toMatch(/snap\s.*2024-02-03 04:05:06\s+(00|0000):00:0\d\.\d{3}\s/)
    const info = JSON.parse(await qemu.imgOk('info', '--output=json', file)) as { snapshots: Record<string, unknown>[] }
    await using vm = await VmState.index(new MemoryDevice(new Uint8Array(stream)))
    const timer = await vm.decodeDevice(vm.device('timer'))
    const clock = BigInt(timer['cpu_clock_offset'] as bigint | number)
    expect(info.snapshots).toMatchObject([
      { 'name': 'snap', 'vm-state-size': stream.length, 'date-sec': date.getTime() / 1000, 'vm-clock-sec': Number(clock / 1_000_000_000n), 'vm-clock-nsec': Number(clock % 1_000_000_000n) },
    ])
    const memory = await checkGuestMemory((offset, length) => vm.ram.read('pc.ram', offset, length))
    const machine = major(name) === 7 ? 'pc-i440fx-7.2' : 'pc-i440fx-10.0'
    // The captured VM had a drive without a device.
    const guest = await Guest.boot(qemu, { machine, loadvm: 'snap', args: ['-drive', `if=none,id=d0,file=${file},format=qcow2`] })
    await guest.expectGoesOn(memory.tick)
  })

  test("every RAM page of the real savevm is QEMU's own", async () => {
    const file = join(tempFolder(), 'disk.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', file, '1M')
    const guest = await Guest.boot(qemu, { args: ['-drive', `if=none,id=d0,file=${file},format=qcow2`] })
    await guest.run(5)
    await guest.qmp.execute('stop')
    const said = await guest.qmp.execute('human-monitor-command', { 'command-line': 'savevm snap' })
    expect(said).toBe('')
    const dump = join(guest.folder, 'ram')
    await guest.qmp.execute('pmemsave', { val: 0, size: 4 << 20, filename: dump })
    await guest.kill()
    await using image = await Qcow2Image.open(file, { readOnly: true })
    await using snapshot = await image.snapshots.open('snap')
    await using vm = await VmState.index(snapshot.vmState, { keepOpen: true })
    const theirs = new Uint8Array(readFileSync(dump))
    // From 640 KiB to 1 MiB the machine shows firmware and devices instead of its main memory.
    for (const [from, to] of [[0, 0xa0000], [0x100000, 4 << 20]] as const) {
      for (let offset = from; offset < to; offset += 4096) {
        const ours = await vm.ram.read('pc.ram', offset, 4096)
        expect(Buffer.compare(ours, theirs.subarray(offset, offset + 4096)), `page at ${offset}`).toBe(0)
      }
    }
    expect((await checkGuestMemory((offset, length) => vm.ram.read('pc.ram', offset, length))).problems).toEqual([])
  })
})

test.runIf(qemus.length > 1)('a VM saved under the older QEMU goes on under the newer one, and back', async () => {
  const [older, newer] = [qemus[0]!, qemus.at(-1)!]
  const file = join(tempFolder(), 'disk.qcow2')
  writeFileSync(file, gunzipSync(readFileSync(join(import.meta.dirname, '../fixtures/captures/qemu72-savevm.qcow2.gz'))))
  const args = ['-drive', `if=none,id=d0,file=${file},format=qcow2`]
  const first = await Guest.boot(newer, { machine: 'pc-i440fx-7.2', loadvm: 'snap1', args })
  await first.run(3)
  await first.qmp.execute('human-monitor-command', { 'command-line': 'savevm snap2' })
  await first.kill()
  await using image = await Qcow2Image.open(file, { readOnly: true })
  await using snapshot = await image.snapshots.open('snap2')
  await using vm = await VmState.index(snapshot.vmState, { keepOpen: true })
  const { tick, problems } = await checkGuestMemory((offset, length) => vm.ram.read('pc.ram', offset, length))
  expect(problems).toEqual([])
  const second = await Guest.boot(older, { machine: 'pc-i440fx-7.2', loadvm: 'snap2', args })
  await second.expectGoesOn(tick)
})
