/**
 * Saves in every run state in which a VM stands still, in every mode, with its disk and without, by real QEMUs: the VM is as it
 * was, did not run for an instruction, can be saved again, and goes on as its user would have it go on.
 */
import { createHash } from 'node:crypto'
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import type { Guest } from '../support/guest.ts'
import { checkGuestMemory, Guest as TinyGuest, mainMemory } from '../support/guest.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { guestIn, standingStates, stateOf, type StandingState } from '../support/run-states.ts'
import { tempFolder } from '../support/temp.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import type { SaveSink } from '../../src/snapshot/save-sink.ts'
import { deviceStreamSink } from '../../src/snapshot/save-sink.ts'
import type { SaveMode } from '../../src/snapshot/save-task.ts'
import { save } from '../../src/snapshot/save-files.ts'
import { saveTo } from '../../src/snapshot/save.ts'
import { MigrationListener } from '../../src/snapshot/socket.ts'

const modes: readonly SaveMode[] = ['background', 'stop', 'precopy']

async function newDisk(qemu: Qemu, folder: string): Promise<string> {
  const file = join(folder, 'disk.qcow2')
  await qemu.imgOk('create', '-f', 'qcow2', file, '1M')
  return file
}

/** Fills the first 64 KiB of the guest's disk, as the guest's device would. */
async function writeDisk(guest: Guest, pattern: number): Promise<void> {
  const said = await guest.qmp.execute('human-monitor-command', { 'command-line': `qemu-io -d /machine/peripheral/disk0/virtio-backend "write -P ${pattern} 0 64k"` })
  expect(said).not.toMatch(/error|fail|conflict/i)
}

async function expectDisk(qemu: Qemu, file: string, pattern: number): Promise<void> {
  expect(await qemu.io('-U', '-r', '-c', `read -P ${pattern} 0 64k`, file)).toMatchObject({ code: 0, stdout: expect.not.stringContaining('failed') as string })
}

/** What is saved of main memory; the guest's own formula holds in it if the guest has run. */
async function contentOf(file: string, ran: boolean): Promise<string> {
  await using saved = await openSaved(file)
  const { content } = saved.blocks.find(({ name }) => name === mainMemory)!
  if (ran) expect((await checkGuestMemory((offset, length) => content.read(offset, length))).problems).toEqual([])
  return createHash('sha256').update(await content.read(0, content.size)).digest('hex')
}

async function activeFile(guest: Guest): Promise<string | undefined> {
  return (await guest.qmp.execute('query-block')).find(({ qdev }) => qdev?.includes('disk0') === true)?.inserted?.file
}

async function expectNothingLeft(guest: Guest): Promise<void> {
  expect(await guest.qmp.execute('query-jobs')).toEqual([])
  const nodes = await guest.qmp.execute('query-named-block-nodes', { flat: true })
  expect(nodes.filter((node) => node['node-name'].startsWith('qcow2-save'))).toEqual([])
  const on = (await guest.qmp.execute('query-migrate-capabilities')).filter(({ state }) => state)
  expect(on).toEqual([])
}

describeWithQemu('a VM that stands still', (qemu) => {
  test.each(standingStates)('%s: saved in every mode, with its disk and without, it is as it was', async (state: StandingState) => {
    const folder = tempFolder()
    const image = await newDisk(qemu, folder)
    const { guest, leave } = await guestIn(qemu, state, { disks: [image] })
    const others = state === 'io-error' ? ['failing'] : []
    await writeDisk(guest, 1)
    const contents = new Set<string>()
    let active = image
    for (const [round, mode] of modes.entries()) {
      const [file, again] = [join(folder, `${mode}-1`), join(folder, `${mode}-2`)]
      const alone = await save(guest.qmp, { memory: file, mode, disks: 'none' })
      expect(alone.manifest).toMatchObject({ status: state, running: false })
      expect(alone.stoppedFor).toBe(0)
      expect(await stateOf(guest)).toBe(state)
      const both = await save(guest.qmp, { memory: { stream: again }, mode, disks: ['d0'] })
      expect(await stateOf(guest)).toBe(state)
      const frozen = both.manifest.disks.filter((disk) => disk.frozen !== false)
      expect(frozen.map((disk) => disk.file)).toEqual([active])
      expect(both.manifest.disks.filter((disk) => disk.frozen === false).map(({ node }) => node)).toEqual(others)
      // what the disk was at the instant of the save stays; what is written now goes to the overlay
      await writeDisk(guest, round + 2)
      await expectDisk(qemu, active, round + 1)
      active = join(folder, `disk-${round + 1}.qcow2`)
      expect(await activeFile(guest)).toBe(active)
      for (const saved of [file, again]) contents.add(await contentOf(saved, state !== 'prelaunch'))
    }
    expect(contents.size, 'the guest has not run').toBe(1)
    await expectNothingLeft(guest)
    await leave()
    if (state === 'shutdown') return
    await expect.poll(() => stateOf(guest), { timeout: 20_000 }).toBe('running')
    await guest.run(3)
    // a guest that wakes begins anew, in the middle of a line
    expect(guest.errors.filter((line) => /^[ES] /.test(line))).toEqual([])
  })

  test.each(standingStates)('%s: a save that fails leaves the VM and its disk as they were', async (state: StandingState) => {
    const folder = tempFolder()
    const image = await newDisk(qemu, folder)
    const { guest } = await guestIn(qemu, state, { disks: [image] })
    for (const mode of modes) {
      const full: SaveSink = { ...deviceStreamSink(new MemoryDevice(0, { growable: true })), finish: () => Promise.reject(new Error('no room')) }
      await expect(saveTo(guest.qmp, full, { mode, disks: ['disk0'] })).rejects.toThrow('no room')
      expect(await stateOf(guest)).toBe(state)
      expect(await activeFile(guest)).toBe(image)
      expect(readdirSync(folder)).toEqual(['disk.qcow2'])
    }
    await expectNothingLeft(guest)
    const again = await save(guest.qmp, { memory: join(folder, 'saved'), disks: ['disk0'] })
    expect(again.manifest.status).toBe(state)
    expect(await stateOf(guest)).toBe(state)
  })

  test('one that waits for another VM is refused', async () => {
    const guest = await TinyGuest.boot(qemu, { incoming: 'defer' })
    const file = join(tempFolder(), 'saved')
    await expect(save(guest.qmp, { memory: file })).rejects.toMatchObject({ code: 'ERR_BUSY', message: expect.stringContaining('inmigrate') as string })
    expect(existsSync(file)).toBe(false)
    expect(await stateOf(guest)).toBe('inmigrate')
  })

  test('one that was handed over is refused, and can be saved when it was taken back', async () => {
    const guest = await TinyGuest.boot(qemu)
    await guest.run(1)
    await using listener = await MigrationListener.open()
    const accepted = listener.accept()
    await guest.qmp.execute('migrate', { uri: listener.uri })
    for await (const _chunk of (await accepted) as unknown as AsyncIterable<Uint8Array>);
    await expect.poll(() => stateOf(guest), { timeout: 20_000 }).toBe('postmigrate')
    const file = join(tempFolder(), 'saved')
    await expect(save(guest.qmp, { memory: file })).rejects.toMatchObject({ code: 'ERR_BUSY', message: expect.stringContaining('cont') as string })
    await guest.qmp.execute('cont')
    await save(guest.qmp, { memory: file })
    await guest.run(2)
    expect(guest.errors).toEqual([])
  })

  test('what a killed save left in QEMU is removed by the next', async () => {
    const folder = tempFolder()
    const scratch = await newDisk(qemu, folder)
    const { guest } = await guestIn(qemu, 'paused')
    const node = 'qcow2-save-0123'
    await guest.qmp.execute('blockdev-add', { 'driver': 'qcow2', 'node-name': node, 'file': { driver: 'file', filename: scratch } })
    await guest.qmp.execute('snapshot-save', { 'job-id': node, 'tag': 'state', 'vmstate': node, 'devices': [node] })
    await expect.poll(async () => (await guest.qmp.execute('query-jobs'))[0]?.status).toBe('concluded')
    await save(guest.qmp, { memory: join(folder, 'saved'), mode: 'stop' })
    await expectNothingLeft(guest)
  })

  test('a guest that stops by itself while it is saved stays so', async () => {
    const { guest, leave } = await guestIn(qemu, 'guest-panicked', { memory: 64 })
    await leave()
    await guest.run(1)
    let panicked = false
    await save(guest.qmp, {
      memory: join(tempFolder(), 'saved'),
      onProgress: ({ done }) => {
        if (panicked || done < 1 << 20) return
        panicked = true
        void guest.qmp.execute('human-monitor-command', { 'command-line': 'o /b 0x505 1' })
      },
    })
    await expect.poll(() => stateOf(guest)).toBe('guest-panicked')
  })
})
