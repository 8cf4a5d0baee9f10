/** What a revert finds out about a QEMU and its disks before anything starts, beside what the manifest says. */
import { copyFileSync, mkdirSync, renameSync, utimesSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { UnsupportedError } from '../../src/core/errors.ts'
import { namesOfMoved } from '../../src/snapshot/host-files.ts'
import { readManifest, revertFile } from '../../src/snapshot/revert-file.ts'
import { manifestPath } from '../../src/snapshot/saved-names.ts'
import { save, type SaveOptions } from '../../src/snapshot/save-files.ts'
import { Guest, type GuestOptions } from '../support/guest.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { memoryOf } from '../support/saves.ts'
import { tempFolder } from '../support/temp.ts'

/** Why a revert is refused; empty if it goes through, and the guest goes on. */
async function refusals(qemu: Qemu, memory: string, options: GuestOptions, how: { ignoreDifferences?: boolean } = {}): Promise<readonly string[]> {
  const guest = await Guest.boot(qemu, { ...options, incoming: 'defer' })
  try {
    await revertFile(memory, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming'), ...how })
    await guest.expectGoesOn((await memoryOf(memory)).tick)
    return []
  } catch (error) {
    if (!(error instanceof UnsupportedError)) throw error
    expect(await guest.qmp.execute('query-status')).toMatchObject({ status: 'inmigrate' })
    expect(error.message).toContain('--force')
    return error.features
  } finally {
    await guest.kill()
  }
}

async function saved(qemu: Qemu, folder: string, options: GuestOptions, how: Partial<SaveOptions> = {}): Promise<string> {
  const memory = join(folder, 'warm.qcow2')
  const guest = await Guest.boot(qemu, options)
  await guest.run(3)
  await save(guest.qmp, { memory, ...how })
  await guest.run(2)
  await guest.kill()
  return memory
}

test('where a file that moved may be', () => {
  expect(namesOfMoved('/a/disks/d', '/a/m/warm', '/b/m/warm')).toEqual(['/a/disks/d', '/b/disks/d', '/b/m/d'])
  expect(namesOfMoved('/a/d', 'warm', '/b/warm')).toEqual(['/a/d', '/b/d'])
  expect(namesOfMoved('/a/d', undefined, undefined)).toEqual(['/a/d'])
  expect(namesOfMoved('nbd://host/d', '/a/warm', '/b/warm')).toEqual(['nbd://host/d'])
})

describeWithQemu('comparing', (qemu) => {
  test('CPUs, their model, devices', async () => {
    const memory = await saved(qemu, tempFolder(), {})
    expect(await refusals(qemu, memory, { args: ['-smp', '2'] })).toEqual(['CPUs: saved 1, here 2 (start QEMU with -smp 1)'])
    expect(await refusals(qemu, memory, { args: ['-cpu', 'Nehalem'] })).toEqual(['CPU model: saved qemu64, here Nehalem (start QEMU with -cpu qemu64)'])
    expect(await refusals(qemu, memory, { args: ['-device', 'virtio-rng-pci'] })).toEqual([
      expect.stringMatching(/devices here that the saved VM did not have: PCI 0:\d.0 1af4:1005, virtio-rng-pci/),
      expect.stringContaining('addr='),
    ])
    expect(await refusals(qemu, memory, {})).toEqual([])
  })

  test('a device that is missing or elsewhere; behind bridges, by its type', async () => {
    const rng = (addr: string): string[] => ['-device', `virtio-rng-pci,addr=${addr}`]
    const memory = await saved(qemu, tempFolder(), { args: rng('7') })
    expect((await refusals(qemu, memory, {}))[0]).toMatch(/not here: PCI 0:7.0 1af4:1005, virtio-rng-pci/)
    expect((await refusals(qemu, memory, { args: rng('8') })).join()).toMatch(/not here: PCI 0:7.0 1af4:1005,devices here.*PCI 0:8.0 1af4:1005/)
    const behind: GuestOptions = { machine: 'q35', args: ['-device', 'pcie-root-port,id=rp0', '-device', 'virtio-rng-pci,bus=rp0'] }
    const q35 = await saved(qemu, tempFolder(), behind)
    expect(await refusals(qemu, q35, behind)).toEqual([])
    expect((await refusals(qemu, q35, { machine: 'q35', args: ['-device', 'pcie-root-port,id=rp0'] })).join()).toMatch(/not here: virtio-rng-pci/)
  })

  test('the frozen disk, or an overlay directly on it that is as it was made', async () => {
    const folder = tempFolder()
    const [frozen, after, fresh, second] = ['frozen.qcow2', 'after.qcow2', 'fresh.qcow2', 'second.qcow2'].map((name) => join(folder, name)) as [string, string, string, string]
    await qemu.imgOk('create', '-f', 'qcow2', frozen, '4M')
    const memory = await saved(qemu, folder, { disks: [frozen] }, { disks: [{ node: 'd0', overlay: after }] })
    await qemu.imgOk('create', '-f', 'qcow2', '-b', frozen, '-F', 'qcow2', fresh)
    await qemu.imgOk('create', '-f', 'qcow2', '-b', fresh, '-F', 'qcow2', second)
    expect(await refusals(qemu, memory, { disks: [fresh] })).toEqual([])
    expect(await refusals(qemu, memory, { disks: [frozen] })).toEqual([])
    expect((await refusals(qemu, memory, { disks: [after] })).join()).toMatch(/disk disk0: .*after.qcow2 is the overlay that the guest went on with/)
    expect((await refusals(qemu, memory, { disks: [second] })).join()).toMatch(/lies 2 layers above/)
    const other = join(folder, 'other.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', other, '4M')
    expect((await refusals(qemu, memory, { disks: [other] })).join()).toMatch(/disk disk0: saved with .*frozen.qcow2, here .*other.qcow2 \(start QEMU with that file, or with a new overlay on it: qemu-img create -f qcow2 -b .*frozen.qcow2 -F qcow2/)
    expect(await refusals(qemu, memory, { disks: [other] }, { ignoreDifferences: true })).toEqual([])
    expect((await qemu.io('-c', 'write 0 64k', fresh)).code).toBe(0)
    expect((await refusals(qemu, memory, { disks: [fresh] })).join()).toMatch(/holds changes of its own/)
  })

  test('a frozen disk that an earlier revert has written to', async () => {
    const folder = tempFolder()
    const [frozen, fresh] = [join(folder, 'frozen.qcow2'), join(folder, 'fresh.qcow2')]
    await qemu.imgOk('create', '-f', 'qcow2', frozen, '4M')
    const memory = await saved(qemu, folder, { disks: [frozen] }, { disks: [{ node: 'd0', overlay: join(folder, 'after.qcow2') }] })
    expect((await qemu.io('-c', 'write 0 64k', frozen)).code).toBe(0)
    await qemu.imgOk('create', '-f', 'qcow2', '-b', frozen, '-F', 'qcow2', fresh)
    for (const disk of [frozen, fresh]) expect((await refusals(qemu, memory, { disks: [disk] })).join()).toMatch(/was written to since it was saved/)
  })

  test('a disk that moved with the memory, or alone', async () => {
    const [old, now] = [tempFolder(), join(tempFolder(), 'unpacked')]
    const frozen = join(old, 'frozen.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', frozen, '4M')
    const memory = await saved(qemu, old, { disks: [frozen] }, { disks: [{ node: 'd0', overlay: join(old, 'after.qcow2') }] })
    mkdirSync(now)
    for (const name of ['warm.qcow2', 'warm.qcow2.json']) copyFileSync(join(old, name), join(now, name))
    renameSync(frozen, join(now, 'frozen.qcow2'))
    utimesSync(join(now, 'frozen.qcow2'), new Date(), new Date()) // as an archive or a cache sets it
    const overlay = join(tempFolder(), 'job.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', '-b', join(now, 'frozen.qcow2'), '-F', 'qcow2', overlay)
    expect(await refusals(qemu, join(now, 'warm.qcow2'), { disks: [overlay] })).toEqual([])
    expect(await refusals(qemu, memory, { disks: [overlay] })).toEqual([])
    const other = join(now, 'other.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', other, '4M')
    expect((await refusals(qemu, join(now, 'warm.qcow2'), { disks: [other] })).join()).toMatch(/saved with .*frozen.qcow2, here .*other.qcow2/)
  })

  test('of a disk that was not frozen its owner took care: a copy of it is a warning', async () => {
    const folder = tempFolder()
    const [disk, copy] = [join(folder, 'disk.qcow2'), join(folder, 'copy.qcow2')]
    await qemu.imgOk('create', '-f', 'qcow2', disk, '4M')
    const memory = await saved(qemu, folder, { disks: [disk] }, { disks: 'none' })
    copyFileSync(disk, copy)
    const guest = await Guest.boot(qemu, { disks: [copy], incoming: 'defer' })
    const { warnings } = await revertFile(memory, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
    expect(warnings).toEqual([expect.stringMatching(/disk disk0: it was not frozen; saved with .*disk.qcow2, here .*copy.qcow2/)])
    await guest.expectGoesOn((await memoryOf(memory)).tick)
  })

  test('a disk frozen by an internal snapshot is set back to it', async () => {
    const folder = tempFolder()
    const disk = join(folder, 'disk.qcow2')
    await qemu.imgOk('create', '-f', 'qcow2', disk, '4M')
    expect((await qemu.io('-c', 'write -P 1 0 64k', disk)).code).toBe(0)
    const memory = await saved(qemu, folder, { disks: [disk] }, { disks: [{ node: 'd0', internal: 'one' }] })
    expect(await refusals(qemu, memory, { disks: [disk] })).toEqual([])
    expect((await qemu.io('-c', 'write -P 2 0 64k', disk)).code).toBe(0)
    expect((await refusals(qemu, memory, { disks: [disk] })).join()).toMatch(/is not at its snapshot one \(qemu-img snapshot -a one /)
    await qemu.imgOk('snapshot', '-a', 'one', disk)
    expect(await refusals(qemu, memory, { disks: [disk] })).toEqual([])
  })

  test('a manifest of another VM is left out of account, a damaged one is not', async () => {
    const [one, other] = [await saved(qemu, tempFolder(), {}), await saved(qemu, tempFolder(), { memory: 8 })]
    copyFileSync(manifestPath(other), manifestPath(one))
    expect((await readManifest(one))!.ramBlocks).toEqual((await readManifest(other))!.ramBlocks)
    const guest = await Guest.boot(qemu, { incoming: 'defer' })
    const report = await revertFile(one, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
    expect(report.warnings).toEqual([expect.stringContaining('tells of another VM')])
    copyFileSync(one, manifestPath(one))
    await expect(revertFile(one, { incoming: '/nowhere' })).rejects.toMatchObject({ code: 'ERR_FORMAT' })
    expect(await refusals(qemu, one, {}, { ignoreDifferences: true })).toEqual([])
  })
})
