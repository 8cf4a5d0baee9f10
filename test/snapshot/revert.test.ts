/** Saved VMs of every kind started in real QEMUs, by postcopy and by ordinary migration. */
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { migrationStream } from '../../src/snapshot/eager.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import { revert, revertEagerly } from '../../src/snapshot/revert.ts'
import { saveVmState } from '../../src/snapshot/vm-state-snapshot.ts'
import { faultsOf, parseFaultOrder } from '../../src/snapshot/fault-order.ts'
import { capture } from '../migration/captures.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu, qemus } from '../support/qemu.ts'
import { makeSave, saveKinds } from '../support/saves.ts'
import { faultsFirst } from '../support/slow-source.ts'

const machine = 'pc-i440fx-7.2'
/** A RAM image on top of another names it by a path outside its folder. */
const anywhere = { references: 'any' } as const
const hash = (file: string): string => createHash('sha256').update(readFileSync(file)).digest('hex')

describeWithQemu('revert', (qemu) => {
  describe.each(saveKinds(qemu))('%s', (kind) => {
    test('by postcopy', async () => {
      const { file, memory } = await makeSave(qemu, kind)
      const before = hash(file)
      const guest = await Guest.boot(qemu, { incoming: 'defer' })
      await using saved = await openSaved(file, anywhere)
      const report = await revert(faultsFirst(saved, 1), { state: 'running', qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
      await guest.expectGoesOn(memory.tick)
      expect(await guest.qmp.execute('query-migrate')).toMatchObject({ status: 'completed' })
      expect(report.requests).toBeGreaterThan(0)
      expect(report.latencies.length).toBeGreaterThan(0)
      expect(report.completeAfter).toBeGreaterThan(report.runningAfter)
      expect(hash(file)).toBe(before)
    })

    test('by ordinary migration', async () => {
      const { file, memory } = await makeSave(qemu, kind)
      const guest = await Guest.boot(qemu, { incoming: 'defer' })
      const { state } = await revertEagerly(file, { ...anywhere, qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
      expect(state).toBe(kind === 'mapped-ram' ? 'paused' : 'running') // saved while it was stopped
      if (state === 'paused') await guest.qmp.execute('cont')
      await guest.expectGoesOn(memory.tick)
    })

    test('by its path', async () => {
      const { file, memory } = await makeSave(qemu, kind)
      const guest = await Guest.boot(qemu, { incoming: 'defer' })
      const { state, mode } = await revert(file, { ...anywhere, qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
      expect([mode, state]).toEqual(kind === 'mapped-ram' ? ['eager', 'paused'] : ['postcopy', 'running'])
      if (state === 'paused') await guest.qmp.execute('cont')
      await guest.expectGoesOn(memory.tick)
    })

    // what opens them is the same for all
    test.skipIf(/ /.test(kind.replace('RAM image', '').replace('stream file', '')))('by loadvm, as an internal snapshot', async () => {
      const { file, memory } = await makeSave(qemu, kind)
      const image = join((await Guest.boot(qemu, { paused: true })).folder, 'image.qcow2')
      {
        await using target = await Qcow2Image.create(image, { size: 1 << 20 })
        await using saved = await openSaved(file, anywhere)
        await saveVmState(target, migrationStream(saved, { zeroPages: 'keep' }), { name: 'snap' })
      }
      const drive = ['-blockdev', `driver=qcow2,node-name=vmstate,file.driver=file,file.filename=${image}`]
      const guest = await Guest.boot(qemu, { loadvm: 'snap', args: drive })
      if (kind === 'mapped-ram') await guest.qmp.execute('cont')
      await guest.expectGoesOn(memory.tick)
    })
  })

  test('without a monitor', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const folder = (await Guest.boot(qemu, { paused: true })).folder
    const incoming = join(folder, 'incoming')
    const guest = await Guest.boot(qemu, { incoming: `unix:${incoming}`, args: ['-global', 'migration.x-postcopy-ram=on'] })
    await revert(file, { incoming })
    await guest.expectGoesOn(memory.tick)
  })

  test('faults recorded at the first revert are sent first at the second', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const first = await Guest.boot(qemu, { incoming: 'defer' })
    await using saved = await openSaved(file)
    const { faultOrder } = await revert(faultsFirst(saved, 8), { qmp: first.qmp, incoming: join(first.folder, 'incoming') })
    await first.kill()
    expect([...faultsOf(faultOrder)].length).toBeGreaterThan(3)
    expect(parseFaultOrder(JSON.stringify(faultOrder))).toEqual(faultOrder)
    const second = await Guest.boot(qemu, { incoming: 'defer' })
    const report = await revert(file, { qmp: second.qmp, incoming: join(second.folder, 'incoming'), faultOrder })
    await second.expectGoesOn(memory.tick)
    expect(report.faultOrder.faults.slice(0, faultOrder.faults.length)).toEqual(faultOrder.faults)
  })

  test('a snapshot of an open image, while it is open', async () => {
    const { file, memory } = await makeSave(qemu, 'savevm')
    await using image = await Qcow2Image.open(file, { readOnly: true })
    const guest = await Guest.boot(qemu, { incoming: 'defer' })
    await revert(image, { snapshot: 'snap', qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
    await guest.expectGoesOn(memory.tick)
    expect(image.closed).toBe(false)
  })

  test('paused until cont, with -S', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const guest = await Guest.boot(qemu, { incoming: 'defer', paused: true })
    await revert(file, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
    expect(await guest.qmp.execute('query-status')).toMatchObject({ running: false })
    await guest.qmp.execute('cont')
    await guest.expectGoesOn(memory.tick)
  })

  test('another machine is explained before anything starts', async () => {
    const { file } = await makeSave(qemu, 'RAM image')
    const guest = await Guest.boot(qemu, { incoming: 'defer', machine: 'q35', memory: 8 })
    const reverting = revert(file, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
    await expect(reverting).rejects.toThrow(/machine type: saved pc-i440fx.*; RAM block pc.ram: saved 4194304 bytes, here 8388608/)
    expect(await guest.qmp.execute('query-status')).toMatchObject({ status: 'inmigrate' })
  })
})

describe.runIf(qemus.length > 1)('across versions', () => {
  const [older, newer] = [qemus[0]!, qemus.at(-1)!]

  test.each([
    { from: older, to: newer },
    { from: newer, to: older },
  ])('saved under $from.version', async ({ from, to }) => {
    for (const kind of ['RAM image', 'savevm'] as const) {
      const { file, memory } = await makeSave(from, kind, { machine })
      const guest = await Guest.boot(to, { machine, incoming: 'defer' })
      await revert(file, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
      await guest.expectGoesOn(memory.tick)
    }
  })
})

describe('what is no saved VM is refused', () => {
  test.each([
    ['nothing', new Uint8Array(0)],
    ['zeroes', new Uint8Array(100_000)],
    ['text', new TextEncoder().encode('hello, world')],
  ])('%s', async (_name, bytes) => {
    await expect(openSaved(bytes)).rejects.toMatchObject({ code: expect.stringMatching(/^ERR_(STREAM|FORMAT)$/) as string })
  })

  test('one whose dirty bitmaps would be lost, however it is kept and brought back', async () => {
    const stream = capture('qemu72-dirty-bitmaps.mig')
    const image = new MemoryDevice(0, { growable: true })
    const writer = RamImageWriter.to(image)
    for (const record of new MigrationParser().push(stream)) writer.record(record)
    await writer.finish()
    for (const kept of [stream, image.bytes.subarray(0, image.size)]) {
      await using saved = await openSaved(kept)
      expect(saved.dirtyBitmaps).toEqual(['bm0'])
      const refusal = { code: 'ERR_UNSUPPORTED', features: ['dirty-bitmaps'], message: expect.stringContaining("'bm0'") as string }
      await expect(revert(saved, { incoming: '/nowhere' })).rejects.toMatchObject(refusal)
      await expect(revertEagerly(saved, { incoming: '/nowhere' })).rejects.toMatchObject(refusal)
      await expect(migrationStream(saved).next()).rejects.toMatchObject(refusal)
    }
  })

  test('an image without VM state', async () => {
    const device = new MemoryDevice(0, { growable: true })
    await using image = await Qcow2Image.create(device, { size: 1 << 20 })
    await expect(openSaved(image)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    await image.snapshots.create({ name: 'disk only' })
    await expect(openSaved(image)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    await expect(openSaved(image, { snapshot: 'disk only' })).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    await expect(openSaved(image, { snapshot: 'other' })).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  })

  test('one of several saved VMs in an image, unless it is named', async () => {
    const device = new MemoryDevice(0, { growable: true })
    {
      await using image = await Qcow2Image.create(device, { size: 1 << 20 })
      await image.snapshots.create({ name: 'disk only' })
      await saveVmState(image, capture('qemu72-precopy.mig'), { name: 'first' })
      await (await openSaved(image)).close()
      await saveVmState(image, capture('qemu100-precopy.mig'), { name: 'second' })
      const refusal = { code: 'ERR_NOT_FOUND', message: expect.stringMatching(/several saved VMs.*: first, second$/) as string }
      await expect(openSaved(image)).rejects.toMatchObject(refusal)
      await expect(revert(image, { incoming: '/nowhere' })).rejects.toMatchObject(refusal)
    }
    const file = device.bytes.slice(0, device.size)
    await expect(openSaved(file)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    await expect(openSaved(file, { snapshot: 'third' })).rejects.toThrow('saved VMs in it: first, second')
    for (const [snapshot, machine] of [['first', /7\.2/], ['3', /10\.0/]] as const) {
      await using saved = await openSaved(file, { snapshot })
      expect(saved.machine).toMatch(machine)
    }
  })
})
