/**
 * A Linux guest that writes each round to its disk and to its memory, and checks that both agree: saved in every run state and
 * mode, its disk named in every way, and started again from what was saved. It finds the same round in both, each time.
 */
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { revertFile, revertFileEagerly } from '../../src/snapshot/revert-file.ts'
import { save } from '../../src/snapshot/save-files.ts'
import type { SaveMode } from '../../src/snapshot/save-task.ts'
import { Guest, type GuestOptions } from '../support/guest.ts'
import { describeWithLinux, roundsTimeout } from '../support/linux.ts'
import { stateOf, waysInto, type StandingState, type WaysInto } from '../support/run-states.ts'
import { tempFolder } from '../support/temp.ts'

/** Those that Linux gets out of without being prepared for them: `suspended` and `shutdown` are in run-states.test.ts. */
const standing: readonly StandingState[] = ['paused', 'guest-panicked', 'watchdog', 'debug', 'io-error']
type State = StandingState | 'running'

/** One saved VM, and between which rounds of the guest it is. */
interface Saved {
  readonly state: State
  readonly memory: string
  readonly frozen: string
  readonly first: number
  readonly last: number
}

describeWithLinux('memory and disk', (qemu, linux) => {
  // QEMU 7.2 without KVM has no safe precopy of a guest that runs
  const modesOf = (state: State): SaveMode[] => (state === 'running' && qemu.major < 8 ? ['background', 'stop'] : ['background', 'stop', 'precopy'])

  /** One guest goes through all states and is saved in each, in each mode; it runs on in between. */
  async function saveAll(options: GuestOptions, ways: WaysInto, folder: string): Promise<Saved[]> {
    const guest = await Guest.boot(qemu, { ...options, args: ways.args })
    const saves: Saved[] = []
    await guest.run(1, roundsTimeout)
    for (const state of ['running', ...standing] as const) {
      if (state !== 'running') await ways.enter(guest, state)
      for (const mode of modesOf(state)) {
        const memory = join(folder, `${state}-${mode}`)
        const first = guest.ticks.at(-1)!
        const name = { background: 'disk0', stop: options.disks![0]!, precopy: 'd0' }[mode]
        const { manifest } = await save(guest.qmp, { memory: mode === 'stop' ? { stream: memory } : memory, mode, disks: [name] })
        expect(manifest.status).toBe(state)
        expect(await stateOf(guest)).toBe(state)
        saves.push({ state, memory, frozen: manifest.disks.find(({ qdev }) => qdev?.includes('disk0'))!.file, first, last: guest.ticks.at(-1)! })
        if (state === 'running') await guest.run(1, roundsTimeout)
      }
      if (state !== 'running') await ways.leave(guest, state)
      await guest.run(2, roundsTimeout)
      expect(guest.errors, `after ${state}`).toEqual([])
    }
    await guest.kill()
    return saves
  }

  /** A new QEMU with a new overlay on `frozen`, and the saved VM in it. */
  async function revertOnto(frozen: string, { memory }: Saved, options: GuestOptions, { eager = false, ignoreDifferences = false }): Promise<Guest> {
    const disk = join(tempFolder(), 'again.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', '-b', frozen, '-F', 'qcow2', disk)
    const guest = await Guest.boot(qemu, { ...options, disks: [disk], incoming: 'defer' })
    await (eager ? revertFileEagerly : revertFile)(memory, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming'), ignoreDifferences })
    return guest
  }

  /** Lets the guest go on, as its user would, until it has finished some rounds. */
  async function goOn(guest: Guest, { state, memory }: Saved, ways: WaysInto): Promise<void> {
    const deadline = Date.now() + roundsTimeout
    while (guest.ticks.length < 3 && Date.now() < deadline) {
      // the failing disk fails once in each QEMU, at any moment after that
      if (state !== 'running' && (await stateOf(guest)) !== 'running') await ways.leave(guest, state)
      await new Promise((wake) => setTimeout(wake, 50))
    }
    expect(guest.ticks.length, `${memory}: rounds of a guest that is ${await stateOf(guest)}`).toBeGreaterThanOrEqual(3)
  }

  // QEMU 10.0 leaves `cont` unanswered now and then, once in about ten runs; the cause is not known yet
  test('go on together, from every run state and mode', { timeout: 3 * roundsTimeout, retry: 2 }, async () => {
    const folder = tempFolder()
    const base = join(folder, 'disk.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', base, '8M')
    const saves = await saveAll({ ...linux, disks: [base] }, await waysInto(qemu, standing), folder)
    const disks = [...new Set(saves.map(({ frozen }) => frozen))]
    expect(disks).toHaveLength(saves.length)
    for (const [index, saved] of saves.entries()) {
      const ways = await waysInto(qemu, standing)
      const guest = await revertOnto(saved.frozen, saved, { ...linux, args: ways.args }, { eager: index % 2 === 1 })
      // a debugger is not saved
      expect(await stateOf(guest), saved.memory).toBe(saved.state === 'debug' ? 'paused' : saved.state)
      await goOn(guest, saved, ways)
      expect(guest.errors, saved.memory).toEqual([])
      expect(guest.ticks[0], saved.memory).toBeGreaterThanOrEqual(saved.first)
      expect(guest.ticks[0], saved.memory).toBeLessThanOrEqual(saved.last + 1)
      await guest.kill()
    }
    // the guest would notice: memory of an early save, the disk of the last; not if it was about to write its own round there
    let noticed = false
    for (const saved of saves.slice(0, 5)) {
      const ways = await waysInto(qemu, standing)
      const wrong = await revertOnto(disks.at(-1)!, saved, { ...linux, args: ways.args }, { ignoreDifferences: true })
      await goOn(wrong, saved, ways)
      noticed = wrong.errors.some((line) => line.startsWith('D '))
      await wrong.kill()
      if (noticed) break
    }
    expect(noticed).toBe(true)
  })
}, { memory: 96, pieces: 8 })
