/** The QMP client and the tiny guest against real QEMUs. */
import { readFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { QmpClient } from '../../src/qmp/client.ts'
import { checkGuestMemory, Guest } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

describeWithQemu('QMP', (qemu) => {
  test('commands, events, refusals and out-of-band execution', async () => {
    const guest = await Guest.boot(qemu)
    const { qmp } = guest
    expect(qmp.greeting.version.qemu.major).toBe(qemu.major)
    expect(qmp.outOfBand).toBe(true)
    const events = qmp.events('STOP', 'RESUME')
    await qmp.execute('stop')
    expect(await qmp.execute('query-status')).toMatchObject({ running: false, status: 'paused' })
    await qmp.execute('cont')
    expect((await events.next()).value).toMatchObject({ event: 'STOP' })
    expect((await events.next()).value).toMatchObject({ event: 'RESUME' })
    await expect(qmp.execute('no-such-command')).rejects.toMatchObject({ qmpClass: 'CommandNotFound' })
    await expect(qmp.execute('migrate-recover', { uri: 'unix:x' }, { outOfBand: true })).rejects.toMatchObject({
      code: 'ERR_QMP',
      command: 'migrate-recover',
    })
  })

  test('a second client of the same monitor is told why it waits', async () => {
    const guest = await Guest.boot(qemu)
    await expect(QmpClient.connect(guest.qmpPath, { timeout: 200 })).rejects.toThrow('one client at a time')
  })

  test('a monitor that writes its messages over several lines', async () => {
    const folder = tempFolder()
    const path = join(folder, 'pretty')
    await Guest.boot(qemu, { args: ['-chardev', `socket,id=pretty,path=${path},server=on,wait=off`, '-mon', 'chardev=pretty,mode=control,pretty=on'] })
    await using qmp = await QmpClient.connect(path, { wait: 5000 })
    expect(await qmp.execute('query-status')).toMatchObject({ running: true })
    expect(await qmp.execute('query-block')).toBeInstanceOf(Array)
    expect(await qmp.execute('query-named-block-nodes')).toBeInstanceOf(Array)
    expect(await qmp.execute('query-pci')).toBeInstanceOf(Array)
    expect(await qmp.execute('query-qmp-schema')).toBeInstanceOf(Array)
    expect(await qmp.execute('query-migrate')).toBeInstanceOf(Object)
    expect(await qmp.execute('query-cpus-fast')).toHaveLength(1)
  })

  test('over TCP', async () => {
    const port = await freePort()
    await Guest.boot(qemu, { args: ['-qmp', `tcp:127.0.0.1:${port},server=on,wait=off`] })
    await using qmp = await QmpClient.connect({ host: '127.0.0.1', port })
    expect(await qmp.execute('query-status')).toMatchObject({ running: true })
  })

  test('pending calls and events reject when QEMU quits', async () => {
    const guest = await Guest.boot(qemu)
    const events = guest.qmp.events('NEVER')
    const ended = expect(events.next()).rejects.toMatchObject({ code: 'ERR_QMP' })
    await guest.qmp.execute('quit')
    await guest.exited()
    await ended
    await expect(guest.qmp.execute('query-status')).rejects.toMatchObject({ code: 'ERR_QMP' })
  })

  test('the guest counts on, and its memory obeys the formula', async () => {
    const guest = await Guest.boot(qemu)
    await guest.run(5)
    await guest.qmp.execute('stop')
    const file = join(guest.folder, 'ram')
    await guest.qmp.execute('pmemsave', { val: 0, size: 4 << 20, filename: file })
    const ram = new Uint8Array(readFileSync(file))
    const memory = await checkGuestMemory((offset, length) => ram.subarray(offset, offset + length))
    expect(memory.pages).toBeGreaterThan(500)
    expect(guest.errors).toEqual([])
    expect(memory.problems).toEqual([])
    expect(memory.tick).toBeGreaterThanOrEqual(5)
  })
})

function freePort(): Promise<number> {
  return new Promise((resolve) => {
    const server = createServer()
    onTestFinished(() => void server.close())
    server.listen(0, '127.0.0.1', () => {
      const address = server.address()
      const port = typeof address === 'object' && address !== null ? address.port : 0
      server.close(() => resolve(port))
    })
  })
}
