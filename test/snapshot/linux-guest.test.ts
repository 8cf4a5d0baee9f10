/** A real Linux guest, saved while it runs and started again: its counter, its memory, and its disk go on together. */
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { revert, revertEagerly } from '../../src/snapshot/revert.ts'
import { save } from '../../src/snapshot/save-files.ts'
import { Guest, type GuestOptions } from '../support/guest.ts'
import { describeWithLinux, expectLinuxGoesOn, roundsForAll, roundsTimeout } from '../support/linux.ts'
import { tempFolder } from '../support/temp.ts'

const long = process.env['QCOW2_LONG'] === '1'
const hash = (file: string): string => createHash('sha256').update(readFileSync(file)).digest('hex')

describeWithLinux('Linux guest', (qemu, linux) => {
  /** Boots, saves, lets the guest run on, and kills it. */
  async function saved(disks: readonly string[] = []): Promise<{ file: string; first: number; last: number }> {
    const folder = tempFolder()
    const file = join(folder, 'saved.qcow2')
    const guest = await Guest.boot(qemu, { ...linux, disks })
    await guest.run(1, roundsTimeout)
    const first = guest.ticks.at(-1)!
    const frozen = disks.map((_disk, index) => ({ node: `d${index}`, overlay: join(folder, `overlay-${index}.qcow2`) }))
    const report = await save(guest.qmp, { memory: file, disks: frozen })
    const last = guest.ticks.at(-1)!
    expect(report.mode).toBe('background')
    await guest.run(long ? roundsForAll : 2, roundsTimeout)
    expect(guest.errors).toEqual([])
    await guest.kill()
    return { file, first, last }
  }

  async function expectRevert(eager: boolean, { file, first, last }: { file: string; first: number; last: number }, options: GuestOptions): Promise<void> {
    const guest = await Guest.boot(qemu, { ...options, incoming: 'defer' })
    const how = { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') }
    await (eager ? revertEagerly(file, how) : revert(file, how))
    await expectLinuxGoesOn(guest, first, last)
    await guest.kill()
  }

  test('saved in the background, it goes on by postcopy and by ordinary migration', { timeout: (long ? 10 : 3) * roundsTimeout }, async () => {
    const state = await saved()
    const before = hash(state.file)
    await expectRevert(false, state, linux)
    await expectRevert(true, state, linux)
    expect(hash(state.file)).toBe(before)
  })

  test.runIf(long)('its disk is of the same instant, each time', async () => {
    const base = join(tempFolder(), 'disk.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', base, '8M')
    const state = await saved([base])
    const before = hash(base)
    for (let time = 0; time < 6; time++) {
      const disk = join(tempFolder(), 'again.qcow2')
      await qemu.imgOk('create', '-f', 'qcow2', '-b', base, '-F', 'qcow2', disk)
      await expectRevert(time % 3 === 2, state, { ...linux, disks: [disk] })
    }
    expect(hash(base)).toBe(before)
  })
})
