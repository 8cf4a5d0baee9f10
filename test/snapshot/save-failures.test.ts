/** Saves that go wrong in the middle, with real QEMUs: what is said, what is left of the VM, and that nothing is a saved VM. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import type { CallOptions } from '../../src/block/device.ts'
import { FilterDevice } from '../../src/block/filter.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { Qcow2Error } from '../../src/core/errors.ts'
import { QmpClient } from '../../src/qmp/client.ts'
import type { DuplexStream } from '../../src/qmp/duplex.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { save, type SaveOptions } from '../../src/snapshot/save-files.ts'
import type { MigrationReceiver } from '../../src/snapshot/outgoing-migration.ts'
import { saveTo } from '../../src/snapshot/save.ts'
import { manifestPath } from '../../src/snapshot/saved-names.ts'
import { MigrationListener } from '../../src/snapshot/socket.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { memoryOf } from '../support/saves.ts'
import { smallDisk } from '../support/small-disk.ts'
import { tempFolder } from '../support/temp.ts'

/** MiB: enough that a save is never over before something happens to it. */
const memory = 64

/** Calls `act` once, in the middle of a save. */
function inTheMiddle(act: () => unknown): Pick<SaveOptions, 'onProgress'> {
  let done = false
  return {
    onProgress: (progress) => {
      if (done || progress.done < 1 << 20) return
      done = true
      void act()
    },
  }
}

/** What was written is not taken for a saved VM. */
async function expectNothingSaved(file: string): Promise<void> {
  expect(existsSync(manifestPath(file))).toBe(false)
  if (existsSync(file)) await expect(openSaved(file)).rejects.toMatchObject({ code: expect.stringMatching(/^ERR_/) as string })
}

/** The guest runs with its memory sound, its disk is `disk`, and it can be saved. */
async function expectUnharmed(guest: Guest, disk?: string): Promise<void> {
  expect(await guest.qmp.execute('query-status')).toMatchObject({ running: true })
  if (disk !== undefined) {
    const drives = await guest.qmp.execute('query-block')
    expect(drives.flatMap(({ inserted }) => (inserted === undefined ? [] : [inserted.file]))).toEqual([disk])
  }
  await guest.run(3)
  expect(guest.errors).toEqual([])
  const file = join(tempFolder(), 'afterwards.qcow2')
  await save(guest.qmp, { memory: file, disks: 'none' })
  expect((await memoryOf(file)).consistent).toBe(true)
}

/** No connection ever comes. */
function never(options?: CallOptions): Promise<never> {
  return new Promise((_resolve, reject) => options?.signal?.addEventListener('abort', () => reject(options.signal?.reason as Error)))
}

async function guestWithDisk(qemu: Qemu): Promise<{ guest: Guest; disk: string; overlay: string }> {
  const disk = join(tempFolder(), 'disk.qcow2')
  await qemu.imgOk('create', '-f', 'qcow2', disk, '8M')
  const guest = await Guest.boot(qemu, { memory, disks: [disk] })
  await guest.run(2)
  return { guest, disk, overlay: join(guest.folder, 'overlay.qcow2') }
}

/** A device on a disk that is full after 2 MiB. */
class SmallDisk extends FilterDevice {
  protected override async onWrite(offset: number, bytes: Uint8Array, options?: CallOptions): Promise<void> {
    if (offset + bytes.length > 2 << 20) throw new Qcow2Error('ERR_NO_SPACE', `no space for ${bytes.length} bytes at offset ${offset}`)
    await super.onWrite(offset, bytes, options)
  }
}

describeWithQemu('a save in whose middle', (qemu) => {
  const targets = [
    ['RAM image', (file: string) => file],
    ['stream file', (file: string) => ({ stream: file })],
  ] as const

  test.each(targets)('QEMU is killed: no %s is saved', async (_kind, target) => {
    const guest = await Guest.boot(qemu, { memory })
    await guest.run(2)
    const file = join(tempFolder(), 'saved')
    const saving = save(guest.qmp, { memory: target(file), ...inTheMiddle(() => guest.process.kill('SIGKILL')) })
    await expect(saving).rejects.toMatchObject({ code: expect.stringMatching(/^ERR_(QMP|STREAM)$/) as string, message: expect.stringContaining('save failed') as string })
    await expectNothingSaved(file)
  })

  // QEMU 7.2 may hang in `quit` then, with its monitor: that is noticed, too
  test('the VM is switched off: nothing is saved', async () => {
    const monitor = join(tempFolder(), 'second')
    const args = ['-chardev', `socket,id=second,path=${monitor},server=on,wait=off`, '-mon', 'chardev=second,mode=control']
    const guest = await Guest.boot(qemu, { memory, args })
    await guest.run(2)
    await using qmp = await QmpClient.connect(monitor, { timeout: 1_000 })
    const file = join(tempFolder(), 'saved')
    const quit = (): Promise<unknown> => guest.qmp.execute('quit').catch(() => undefined)
    const saving = save(qmp, { memory: file, ...inTheMiddle(quit) })
    await expect(saving).rejects.toMatchObject({ code: expect.stringMatching(/^ERR_(QMP|STREAM)$/) as string })
    await expectNothingSaved(file)
  })

  // QEMU 7.2 leaves memory write-protected when a background snapshot breaks off: docs/live.md warns of it
  test(`its connection breaks, in mode ${qemu.major < 10 ? 'stop' : 'background'}`, async () => {
    const { guest, disk, overlay } = await guestWithDisk(qemu)
    const file = join(tempFolder(), 'saved')
    await using listener = await MigrationListener.open()
    let connection: DuplexStream | undefined
    const receiver: MigrationReceiver = {
      uri: listener.uri,
      accept: async (options) => (connection = await listener.accept(options)),
    }
    const saving = save(guest.qmp, {
      memory: file,
      mode: qemu.major < 10 ? 'stop' : 'background',
      disks: [{ node: 'd0', overlay }],
      receiver,
      ...inTheMiddle(() => connection?.destroy()),
    })
    await expect(saving).rejects.toMatchObject({ code: 'ERR_STREAM' })
    await expectNothingSaved(file)
    await expectUnharmed(guest, disk)
  })

  test('QEMU cannot connect: it ends at once, and says why', async () => {
    const { guest, disk, overlay } = await guestWithDisk(qemu)
    const file = join(tempFolder(), 'saved')
    const receiver: MigrationReceiver = { uri: `unix:${join(guest.folder, 'nobody')}`, accept: never }
    for (const disks of [[], [{ node: 'd0', overlay }]]) {
      const saving = save(guest.qmp, { memory: file, receiver, disks })
      await expect(saving).rejects.toMatchObject({ code: 'ERR_QMP', message: expect.stringMatching(/migrate: QEMU reports failed: .*connect/) as string })
    }
    await expectNothingSaved(file)
    await expectUnharmed(guest, disk)
  })

  test('QEMU dies before it has connected: it ends at once', async () => {
    const guest = await Guest.boot(qemu, { memory })
    await guest.run(2)
    const file = join(tempFolder(), 'saved')
    await using listener = await MigrationListener.open()
    const accept: MigrationReceiver['accept'] = (options) => {
      guest.process.kill('SIGKILL')
      return never(options)
    }
    const saving = save(guest.qmp, { memory: file, receiver: { uri: listener.uri, accept } })
    await expect(saving).rejects.toMatchObject({ code: 'ERR_QMP', message: expect.stringMatching(/closed the monitor connection|connection failed/) as string })
    await expectNothingSaved(file)
  })

  test('the file system gets full', async ({ skip }) => {
    const folder = smallDisk(8 << 20, skip)
    const { guest, disk, overlay } = await guestWithDisk(qemu)
    const image = join(folder, 'image.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', image, '1M')
    for (const target of [...targets.map(([, at]) => at(join(folder, 'saved'))), { image, snapshot: 'saved' }]) {
      const saving = save(guest.qmp, { memory: target, disks: [{ node: 'd0', overlay }] })
      await expect(saving).rejects.toMatchObject({ code: 'ERR_NO_SPACE', message: expect.stringContaining(folder) as string })
      await expectNothingSaved(join(folder, 'saved'))
      await guest.run(1)
      expect(existsSync(overlay)).toBe(false)
    }
    expect(await qemu.imgOk('snapshot', '-l', image)).not.toContain('saved')
    expect(await qemu.img('check', image)).toMatchObject({ code: expect.toSatisfy((code) => code === 0 || code === 3) as number }) // 3: leaks
    await expectUnharmed(guest, disk)
  })

  test('a device gets full', async () => {
    const { guest, disk, overlay } = await guestWithDisk(qemu)
    const target = new MemoryDevice(0, { growable: true })
    const saving = saveTo(guest.qmp, RamImageWriter.to(new SmallDisk(target)), { disks: [{ node: 'd0', overlay }] })
    await expect(saving).rejects.toMatchObject({ code: 'ERR_NO_SPACE' })
    await expect(openSaved(target.bytes)).rejects.toMatchObject({ code: expect.stringMatching(/^ERR_/) as string })
    await expectUnharmed(guest, disk)
  })

  test('another save begins: the other is refused, this one succeeds', async () => {
    const monitor = join(tempFolder(), 'second')
    const args = ['-chardev', `socket,id=second,path=${monitor},server=on,wait=off`, '-mon', 'chardev=second,mode=control']
    const guest = await Guest.boot(qemu, { memory, args })
    await guest.run(2)
    await guest.qmp.execute('migrate-set-parameters', { 'max-bandwidth': 123_456_789 })
    await using other = await QmpClient.connect(monitor)
    const [file, second, third] = ['1', '2', '3'].map((name) => join(tempFolder(), name)) as [string, string, string]
    const refusals: Promise<unknown>[] = []
    await save(guest.qmp, {
      memory: file,
      ...inTheMiddle(() => {
        refusals.push(expect(save(guest.qmp, { memory: second })).rejects.toMatchObject({ code: 'ERR_BUSY' }))
        refusals.push(expect(save(other, { memory: third, fallback: 'stop' })).rejects.toMatchObject({ code: 'ERR_BUSY' }))
      }),
    })
    expect(await Promise.all(refusals)).toHaveLength(2)
    expect((await memoryOf(file)).consistent).toBe(true)
    for (const nothing of [second, third]) await expectNothingSaved(nothing)
    expect(await guest.qmp.execute('query-migrate-parameters')).toMatchObject({ 'max-bandwidth': 123_456_789 })
    await expectUnharmed(guest)
  })

  test('something fails while the guest is paused: it stays paused', async () => {
    const { guest, disk, overlay } = await guestWithDisk(qemu)
    await guest.qmp.execute('stop')
    const full = RamImageWriter.to(new SmallDisk(new MemoryDevice(0, { growable: true })))
    await expect(saveTo(guest.qmp, full, { disks: [{ node: 'd0', overlay }] })).rejects.toMatchObject({ code: 'ERR_NO_SPACE' })
    expect(await guest.qmp.execute('query-status')).toMatchObject({ running: false })
    await guest.qmp.execute('cont')
    await expectUnharmed(guest, disk)
  })
})
