/** All of the memory, or none: capabilities that leave memory out or send it elsewhere, refusals with their own reason, sockets. */
import { existsSync, readdirSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { capture } from '../../src/snapshot/capture.ts'
import { deviceStreamSink } from '../../src/snapshot/save-sink.ts'
import { save } from '../../src/snapshot/save-files.ts'
import { saveTo } from '../../src/snapshot/save.ts'
import { MigrationListener } from '../../src/snapshot/socket.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { guestIn } from '../support/run-states.ts'
import { memoryOf } from '../support/saves.ts'
import { tempFolder } from '../support/temp.ts'

const nowhere = () => deviceStreamSink(new MemoryDevice(0, { growable: true }))

describeWithQemu('the whole memory', (qemu) => {
  const shared = { machine: 'pc,memory-backend=pc.ram', args: ['-object', 'memory-backend-memfd,id=pc.ram,size=4M,share=on'] }
  const switches = ['x-ignore-shared', 'multifd', 'mapped-ram', 'xbzrle', 'postcopy-ram', 'postcopy-preempt', 'return-path', 'compress', 'block', 'release-ram']

  test.each(['background', 'stop'] as const)('%s: whatever capability is on, it is saved whole, and the capability is on again', async (mode) => {
    const guest = await Guest.boot(qemu, shared)
    await guest.run(2)
    for (const capability of switches) {
      const on = capability === 'postcopy-preempt' ? ['postcopy-ram', capability] : [capability]
      const known = (await guest.qmp.execute('query-migrate-capabilities')).map((one) => one.capability)
      if (!on.every((name) => known.includes(name))) continue
      const set = (state: boolean): Promise<unknown> => guest.qmp.execute('migrate-set-capabilities', { capabilities: on.map((name) => ({ capability: name, state })) })
      if (!(await set(true).then(() => true, () => false))) continue // not built into this QEMU
      const file = join(tempFolder(), 'saved')
      await save(guest.qmp, { memory: file, mode })
      expect((await memoryOf(file)).consistent, capability).toBe(true)
      const after = (await guest.qmp.execute('query-migrate-capabilities')).filter(({ state }) => state).map((one) => one.capability)
      expect(after.sort()).toEqual([...on].sort())
      await set(false)
    }
    await guest.run(2)
    expect(guest.errors).toEqual([])
  })

  test('one that stands still, too', async () => {
    const { guest } = await guestIn(qemu, 'paused', shared)
    await guest.qmp.execute('migrate-set-capabilities', { capabilities: [{ capability: 'x-ignore-shared', state: true }] })
    const file = join(tempFolder(), 'saved')
    await save(guest.qmp, { memory: file, mode: 'stop' })
    expect((await memoryOf(file)).consistent).toBe(true)
  })

  test('a capture of several connections ends with the reason', async () => {
    const guest = await Guest.boot(qemu)
    await guest.run(1)
    await guest.qmp.execute('migrate-set-capabilities', { capabilities: [{ capability: 'multifd', state: true }] })
    await using listener = await MigrationListener.open({ single: true })
    const accepted = listener.accept()
    await guest.qmp.execute('migrate', { uri: listener.uri })
    const captured = capture((await accepted) as unknown as AsyncIterable<Uint8Array>, nowhere())
    await expect(captured).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', message: expect.stringContaining('multifd') as string })
  })

  test('a machine without VM description is saved', async () => {
    const guest = await Guest.boot(qemu, { machine: 'pc,suppress-vmdesc=on' })
    await guest.run(2)
    const file = join(tempFolder(), 'saved.mig')
    for (const mode of ['background', 'stop'] as const) await save(guest.qmp, { memory: { stream: file }, mode })
    await guest.run(2)
    expect(guest.errors).toEqual([])
  })

  test('a blocker is told as it is, with a fallback and without', async () => {
    const guest = await Guest.boot(qemu, { args: ['-device', 'ivshmem-plain,memdev=m', '-object', 'memory-backend-ram,id=m,size=1M,share=on'] })
    const file = join(tempFolder(), 'saved')
    for (const fallback of [undefined, 'stop'] as const) {
      await expect(save(guest.qmp, { memory: file, fallback })).rejects.toMatchObject({ code: 'ERR_QMP', message: expect.stringMatching(/^migrate: .*ivshmem/) as string })
    }
    await guest.run(1)
  })

  test('a migration under way is ERR_BUSY, whoever began it', async () => {
    const guest = await Guest.boot(qemu, { memory: 64 })
    await guest.run(1)
    await using silent = await MigrationListener.open()
    await guest.qmp.execute('migrate', { uri: silent.uri })
    await expect(saveTo(guest.qmp, nowhere(), { fallback: 'stop' })).rejects.toMatchObject({ code: 'ERR_BUSY', message: expect.not.stringContaining('background') as string })
    await guest.qmp.execute('migrate_cancel')
  })

  test('the socket is for this user alone, or as it is asked for', async () => {
    const seen: number[][] = []
    const guest = await Guest.boot(qemu)
    await guest.run(1)
    const folder = tempFolder()
    for (const options of [{}, { folder }, { path: join(folder, 'own') }, { path: join(folder, 'wide'), mode: 0o666 }, { folder, mode: 0o666 }]) {
      await using listener = await MigrationListener.open(options)
      seen.push([statSync(listener.path).mode & 0o777, statSync(dirname(listener.path)).mode & 0o777])
      await saveTo(guest.qmp, nowhere(), { receiver: listener })
    }
    expect(seen.map(([mode]) => mode)).toEqual([0o600, 0o600, 0o600, 0o666, 0o666])
    expect([seen[0]![1], seen[1]![1], seen[4]![1]]).toEqual([0o700, 0o700, 0o711])
    expect(readdirSync(folder)).toEqual([])
    await using taken = await MigrationListener.open({ path: join(folder, 'taken') })
    await expect(MigrationListener.open({ path: taken.path })).rejects.toMatchObject({ code: 'ERR_EXISTS' })
    await expect(MigrationListener.open({ folder: join(folder, 'missing') })).rejects.toMatchObject({ code: 'ERR_IO' })
    expect(existsSync(taken.path)).toBe(true)
  })
})
