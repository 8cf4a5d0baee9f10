/** The run state of a saved VM comes back, however it is sent, unless the caller says otherwise. */
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import { readManifest, revertFile, revertFileEagerly } from '../../src/snapshot/revert-file.ts'
import { recover, revert, revertEagerly } from '../../src/snapshot/revert.ts'
import { runStateIn, wantedState, withRunState } from '../../src/snapshot/saved-state.ts'
import { save } from '../../src/snapshot/save-files.ts'
import { capture } from '../migration/captures.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { memoryOf } from '../support/saves.ts'
import { SlowSource } from '../support/slow-source.ts'
import { tempFolder } from '../support/temp.ts'

describe('the section that tells the run state', () => {
  test.each(['qemu72-precopy.mig', 'qemu72-bgsnap.mig', 'qemu72-rich-q35.mig', 'qemu100-precopy.mig', 'qemu100-bgsnap.mig'])('%s', async (name) => {
    await using saved = await openSaved(capture(name))
    const state = runStateIn(saved.devices)
    expect(['running', 'paused']).toContain(state)
    for (const other of ['running', 'paused', 'guest-panicked', 'x'.repeat(31)]) {
      const changed = withRunState(saved.devices, other)
      expect(runStateIn(changed)).toBe(other)
      expect(changed.length).toBe(saved.devices.length)
      expect(Buffer.compare(withRunState(changed, state!), saved.devices)).toBe(0)
    }
  })

  test('is not there', () => {
    const few = new TextEncoder().encode('\u000bglobalstate')
    for (const bytes of [new Uint8Array(0), few, new Uint8Array(1000).fill(11)]) {
      expect(runStateIn(bytes)).toBeUndefined()
      expect(withRunState(bytes, 'paused')).toBe(bytes)
    }
  })

  test('what is wanted', () => {
    expect(wantedState('running')).toBe('running')
    expect(wantedState('running', 'paused')).toBe('paused')
    expect(wantedState('suspended', 'paused')).toBe('suspended')
    expect(wantedState('io-error', 'running')).toBe('running')
    for (const passing of ['inmigrate', 'finish-migrate', 'postmigrate', 'save-vm', 'debug', 'colo', '']) expect(wantedState(passing)).toBe('paused')
  })
})

describeWithQemu('run states', (qemu) => {
  const waiting = (options: { paused?: boolean } = {}): Promise<Guest> => Guest.boot(qemu, { ...options, incoming: 'defer' })
  const incoming = (guest: Guest, name = 'incoming'): string => join(guest.folder, name)
  const stateOf = async (guest: Guest): Promise<string> => (await guest.qmp.execute('query-status')).status

  /** A VM saved in this state; the stream itself may tell another. */
  const saved = async (state: 'running' | 'paused', mode: 'background' | 'stop' = 'background'): Promise<string> => {
    const file = join(tempFolder(), 'warm.qcow2')
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    if (state === 'paused') await guest.qmp.execute('stop')
    await save(guest.qmp, { memory: file, mode })
    await guest.kill()
    return file
  }

  test('running: it runs, in every way', async () => {
    for (const mode of ['background', 'stop'] as const) {
      const file = await saved('running', mode)
      const { tick } = await memoryOf(file)
      for (const way of [revertFile, revertFileEagerly]) {
        const guest = await waiting()
        let ran = 0
        const report = await way(file, { qmp: guest.qmp, incoming: incoming(guest), onRunning: () => ran++ })
        expect(report).toMatchObject({ state: 'running', warnings: [] })
        expect(ran).toBe(1)
        await guest.expectGoesOn(tick)
        await guest.kill()
      }
      const alone = await Guest.boot(qemu, { incoming: `unix:${incoming(await waiting())}`, args: ['-global', 'migration.x-postcopy-ram=on'] })
      const [, path] = /^unix:(.*)$/.exec(String(alone.process.spawnargs[alone.process.spawnargs.indexOf('-incoming') + 1]))!
      expect(await revertFileEagerly(file, { incoming: path! })).toMatchObject({ state: 'running' })
      await alone.expectGoesOn(tick)
    }
  })

  test('paused: it waits, in every way, and goes on with cont', async () => {
    const file = await saved('paused')
    const { tick } = await memoryOf(file)
    for (const way of [revertFile, revertFileEagerly, revert, revertEagerly]) {
      const guest = await waiting()
      let ran = 0
      const report = await way(file, { qmp: guest.qmp, incoming: incoming(guest), onRunning: () => ran++ })
      expect(report).toMatchObject({ state: 'paused', warnings: [] })
      expect([ran, await stateOf(guest), guest.lines]).toEqual([0, 'paused', []])
      await guest.qmp.execute('cont')
      await guest.expectGoesOn(tick)
      await guest.kill()
    }
  })

  test('paused, to a QEMU that has no monitor for us', async () => {
    const file = await saved('paused')
    const path = join(tempFolder(), 'incoming')
    const guest = await Guest.boot(qemu, { incoming: `unix:${path}`, args: ['-global', 'migration.x-postcopy-ram=on'] })
    expect(await revertFile(file, { incoming: path })).toMatchObject({ mode: 'eager', state: 'paused' })
    await expect.poll(() => stateOf(guest)).toBe('paused')
    await guest.qmp.execute('cont')
    await guest.expectGoesOn((await memoryOf(file)).tick)
  })

  test('otherwise, where the caller says so', async () => {
    const [running, paused] = [await saved('running'), await saved('paused')]
    for (const way of [revertFile, revertFileEagerly]) {
      const one = await waiting()
      expect(await way(running, { qmp: one.qmp, incoming: incoming(one), state: 'paused' })).toMatchObject({ state: 'paused' })
      expect([await stateOf(one), one.lines]).toEqual(['paused', []])
      await one.kill()
      for (const options of [{}, { paused: true }]) {
        const other = await waiting(options)
        expect(await way(paused, { qmp: other.qmp, incoming: incoming(other), state: 'running' })).toMatchObject({ state: 'running' })
        await other.expectGoesOn((await memoryOf(paused)).tick)
        await other.kill()
      }
    }
  })

  test('-S keeps what ran waiting', async () => {
    const file = await saved('running')
    for (const way of [revertFile, revertFileEagerly]) {
      const guest = await waiting({ paused: true })
      expect(await way(file, { qmp: guest.qmp, incoming: incoming(guest) })).toMatchObject({ state: 'paused' })
      await guest.qmp.execute('cont')
      await guest.expectGoesOn((await memoryOf(file)).tick)
      await guest.kill()
    }
  })

  test('every state that QEMU can have', async () => {
    const file = await saved('running')
    const manifest = (await readManifest(file))!
    for (const status of ['prelaunch', 'io-error', 'shutdown', 'suspended', 'watchdog', 'guest-panicked', 'internal-error', 'debug', 'postmigrate', 'finish-migrate', 'save-vm']) {
      const guest = await waiting()
      const expected = ['debug', 'postmigrate', 'finish-migrate', 'save-vm'].includes(status) ? 'paused' : status
      const report = await revert(file, { qmp: guest.qmp, incoming: incoming(guest), manifest: { ...manifest, status } })
      expect([status, report.state, await stateOf(guest), guest.lines]).toEqual([status, expected, expected, []])
      await guest.kill()
    }
  })

  test('of a recovered VM', async () => {
    const file = await saved('running')
    const guest = await waiting()
    await using source = await openSaved(file)
    const abort = new AbortController()
    const onRunning = (): void => {
      const running = async (): Promise<boolean> => (await guest.qmp.execute('query-status')).running
      void expect.poll(running, { interval: 1, timeout: 10_000 }).toBe(true).then(() => abort.abort(new Error('cut')))
    }
    const slow = new SlowSource(source, 600_000).source
    await expect(revert(slow, { qmp: guest.qmp, incoming: incoming(guest), signal: abort.signal, onRunning })).rejects.toThrow('cut')
    expect(await recover(file, { qmp: guest.qmp, incoming: incoming(guest, 'again') })).toMatchObject({ mode: 'postcopy', state: 'running' })
    await guest.expectGoesOn((await memoryOf(file)).tick)
  })
})
