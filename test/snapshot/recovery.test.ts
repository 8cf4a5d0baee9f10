/** Reverts whose connection or process dies: the guest pauses, and goes on with a new one that knows only the saved VM. */
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { readFileSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { QmpClient } from '../../src/qmp/client.ts'
import { connectSocket } from '../../src/qmp/socket.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import type { PageSource } from '../../src/snapshot/page-source.ts'
import { recover, revert } from '../../src/snapshot/revert.ts'
import { Guest, mainMemory } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { makeSave } from '../support/saves.ts'
import { SlowSource } from '../support/slow-source.ts'
import { tempFolder } from '../support/temp.ts'

const hash = (file: string): string => createHash('sha256').update(readFileSync(file)).digest('hex')

/** Reverts into the guest, and drops the connection as soon as the guest runs: it has the first MiB at most. */
async function revertAndCut(guest: Guest, saved: PageSource): Promise<void> {
  const abort = new AbortController()
  const cut = revert(new SlowSource(saved, 1 << 20).source, {
    qmp: guest.qmp,
    incoming: join(guest.folder, 'incoming'),
    signal: abort.signal,
    onProgress: ({ phase }) => phase === 'running' && void whenRunning(guest).then(() => abort.abort(new Error('cut'))),
  })
  await expect(cut).rejects.toThrow('cut')
}

/** Resolves when the guest runs: a connection lost in the moment before ends QEMU. */
async function whenRunning(guest: Guest): Promise<void> {
  await expect.poll(async () => (await guest.qmp.execute('query-status')).running, { interval: 1, timeout: 10_000 }).toBe(true)
}

describeWithQemu('recovery', (qemu) => {
  test('after the connection was lost, again and again', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const before = hash(file)
    const guest = await Guest.boot(qemu, { incoming: 'defer' })
    await using saved = await openSaved(file)
    // How much each connection gets before it is cut; the guest's memory has 4 MiB.
    const cuts = [1 << 20, 1 << 19, 1 << 18]
    for (const [index, bytes] of cuts.entries()) {
      const { source } = new SlowSource(saved, bytes)
      const abort = new AbortController()
      const options = {
        qmp: guest.qmp,
        incoming: join(guest.folder, `incoming-${index}`),
        signal: abort.signal,
        onProgress: ({ phase }: { phase: string }) => {
          if (phase !== 'running') return
          // while it recovers, QEMU may answer nothing
          if (index === 0) void whenRunning(guest).then(() => abort.abort(new Error('cut')))
          else setTimeout(() => abort.abort(new Error('cut')), 30)
        },
      }
      const cut = index === 0 ? revert(source, options) : recover(source, options)
      await expect(cut).rejects.toThrow('cut')
    }
    const report = await recover(file, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming-last') })
    expect(report.pages).toBeGreaterThan(0)
    await guest.expectGoesOn(memory.tick)
    expect(await guest.qmp.execute('query-migrate')).toMatchObject({ status: 'completed' })
    expect(hash(file)).toBe(before)
  })

  test(`a recovery that breaks off before QEMU has resumed ${qemu.major < 10 ? 'ends QEMU' : 'can be repeated'}`, async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const guest = await Guest.boot(qemu, { incoming: 'defer' })
    await using saved = await openSaved(file)
    await revertAndCut(guest, saved)
    const again = join(guest.folder, 'again')
    await expect.poll(async () => guest.qmp.execute('migrate-recover', { uri: `unix:${again}` }, { outOfBand: true }).then(() => true, () => false), { interval: 10, timeout: 10_000 }).toBe(true)
    const stream = await connectSocket(again)
    const recovering = recover(saved, { incoming: stream, onProgress: ({ phase }) => phase === 'recovering' && setImmediate(() => stream.destroy()) })
    await expect(recovering).rejects.toMatchObject({ code: 'ERR_STREAM', phase: 'recovering', message: expect.stringContaining('unless QEMU has ended') as string })
    if (qemu.major < 10) {
      await guest.exited()
    } else {
      await recover(file, { qmp: guest.qmp, incoming: join(guest.folder, 'once-more') })
      await guest.expectGoesOn(memory.tick)
    }
  })

  test('while its main lock is held, by a monitor connected before: a new one gets no answer', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const second = join(tempFolder(), 'second')
    const args = ['-chardev', `socket,id=second,path=${second},server=on,wait=off`, '-mon', 'chardev=second,mode=control']
    const guest = await Guest.boot(qemu, { incoming: 'defer', args })
    await using saved = await openSaved(file)
    await revertAndCut(guest, saved)
    await expect.poll(async () => (await guest.qmp.execute('query-migrate')).status, { interval: 10, timeout: 10_000 }).toBe('postcopy-paused')
    // QEMU's main thread waits for a page now, as it does when a device has to read the guest's memory.
    const reading = guest.qmp.execute('human-monitor-command', { 'command-line': `xp /1wx ${(4 << 20) - 0x20000}` })
    // it may answer another monitor before it comes to that command
    const connect = async (): Promise<string> => {
      const client = await QmpClient.connect(second, { timeout: 500 }).catch((error: unknown) => String(error))
      if (typeof client !== 'string') await client.close()
      return typeof client === 'string' ? client : 'answered'
    }
    await expect.poll(connect, { interval: 50, timeout: 10_000 }).toContain('no answer to')
    await recover(file, { qmp: guest.qmp, incoming: join(guest.folder, 'again') })
    expect(await reading).toMatch(/0x[0-9a-f]{8}/)
    await guest.expectGoesOn(memory.tick)
  })

  test('pages of a recorded order, sent while the guest started, count as received', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const guest = await Guest.boot(qemu, { incoming: 'defer' })
    await using saved = await openSaved(file)
    const clusters = Array.from({ length: 16 }, (_, n) => 16 + n)
    const faultOrder = { version: 1, clusterSize: 65_536, blocks: [mainMemory], faults: clusters.flatMap((cluster) => [0, cluster]) } as const
    const { source } = new SlowSource(saved, (1 << 20) + 65_536)
    const abort = new AbortController()
    const onProgress = ({ phase }: { phase: string }): void => {
      if (phase === 'running') void whenRunning(guest).then(() => abort.abort(new Error('cut')))
    }
    const cut = revert(source, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming'), signal: abort.signal, faultOrder, onProgress })
    await expect(cut).rejects.toThrow('cut')
    await recover(file, { qmp: guest.qmp, incoming: join(guest.folder, 'again'), faultOrder })
    await guest.expectGoesOn(memory.tick)
  })

  test('after the process was killed', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const folder = (await Guest.boot(qemu, { paused: true })).folder
    const incoming = join(folder, 'incoming')
    const guest = await Guest.boot(qemu, { incoming: `unix:${incoming}`, args: ['-global', 'migration.x-postcopy-ram=on'] })
    const sources = resolve(import.meta.dirname, '../../src/snapshot')
    const script = join(folder, 'revert.mts')
    writeFileSync(
      script,
      `import { openSaved } from ${JSON.stringify(join(sources, 'open-saved.ts'))}
       import { revert } from ${JSON.stringify(join(sources, 'revert.ts'))}
       import { SlowSource } from ${JSON.stringify(resolve(import.meta.dirname, '../support/slow-source.ts'))}
       const { source } = new SlowSource(await openSaved(${JSON.stringify(file)}), 1 << 20)
       setInterval(() => undefined, 1000)
       await revert(source, { incoming: ${JSON.stringify(incoming)}, onProgress: ({ phase }) => console.log(phase) })`,
    )
    const child = spawn(process.execPath, ['--import', 'tsx', script], { stdio: ['ignore', 'pipe', 'inherit'], cwd: resolve(import.meta.dirname, '../..') })
    onTestFinished(() => void child.kill('SIGKILL'))
    const gone = new Promise((settle) => child.on('exit', settle))
    let said = ''
    child.stdout.on('data', (text: Buffer) => (said += text.toString()))
    await expect.poll(() => said, { timeout: 30_000, interval: 5 }).toContain('running')
    child.kill('SIGKILL')
    await gone
    await recover(file, { qmp: guest.qmp, incoming: join(guest.folder, 'again') })
    await guest.expectGoesOn(memory.tick)
  })

  test.runIf(process.env['QCOW2_LONG'] === '1')('200 saves and reverts, the connection cut at random points', async () => {
    let { file, memory } = await makeSave(qemu, 'RAM image')
    for (let round = 0; round < 200; round++) {
      const before = hash(file)
      const guest = await Guest.boot(qemu, { incoming: 'defer' })
      await using saved = await openSaved(file)
      let attempt = 0
      const once = async (): Promise<boolean> => {
        const last = attempt >= 3
        const { source } = new SlowSource(saved, last ? Infinity : Math.floor(Math.random() * (2 << 20)))
        const abort = new AbortController()
        let reached = false
        const options = {
          qmp: guest.qmp,
          incoming: join(guest.folder, `incoming-${attempt}`),
          signal: abort.signal,
          onProgress: ({ phase }: { phase: string }) => {
            if (phase !== 'running' || reached || last) return
            reached = true
            const cut = (): unknown => setTimeout(() => abort.abort(new Error('cut')), Math.random() * 30)
            if (attempt === 1) void whenRunning(guest).then(cut)
            else cut()
          },
        }
        const talk = attempt++ === 0 ? revert(source, options) : recover(source, options)
        return talk.then(() => true, (error: unknown) => {
          expect(error).toMatchObject({ message: 'cut' })
          return false
        })
      }
      while (!(await once()));
      await guest.expectGoesOn(memory.tick)
      expect(hash(file)).toBe(before)
      await guest.kill()
      if (round % 10 === 9) ({ file, memory } = await makeSave(qemu, 'RAM image'))
    }
  })
})
