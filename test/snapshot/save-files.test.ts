/** Saving into files and reverting from them, with the manifest and the fault order beside the memory. */
import { closeSync, existsSync, lstatSync, mkdirSync, openSync, readdirSync, statSync, symlinkSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { expect, test } from 'vitest'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { faultsOf, parseFaultOrder } from '../../src/snapshot/fault-order.ts'
import { placeOf, readTextFile } from '../../src/snapshot/host-files.ts'
import type { MemoryTarget } from '../../src/snapshot/memory-target.ts'
import { readManifest, revertFile } from '../../src/snapshot/revert-file.ts'
import { revert, revertEagerly } from '../../src/snapshot/revert.ts'
import { save, type SaveOptions } from '../../src/snapshot/save-files.ts'
import { faultOrderPath, manifestPath } from '../../src/snapshot/saved-names.ts'
import { MigrationListener } from '../../src/snapshot/socket.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { memoryOf } from '../support/saves.ts'
import { tempFolder } from '../support/temp.ts'

test('what is beside a saved memory: nothing beside a device, and beside the file that a descriptor stands for', async () => {
  const folder = tempFolder()
  const [file, link] = [join(folder, 'warm'), join(folder, 'link')]
  const fd = openSync(file, 'w')
  try {
    symlinkSync(file, link)
    expect(await placeOf(file)).toBe(file)
    expect(await placeOf(link)).toBe(link)
    expect(await placeOf(join(folder, 'new'))).toBe(join(folder, 'new'))
    for (const name of [`/proc/self/fd/${fd}`, `/dev/fd/${fd}`]) expect(await placeOf(name), name).toBe(file)
    for (const device of ['/dev/null', '/dev/zero']) expect(await placeOf(device), device).toBe(undefined)
  } finally {
    closeSync(fd)
  }
})

test('a socket whose path is too long', async () => {
  const folder = join(tempFolder(), 'd'.repeat(100))
  mkdirSync(folder)
  const problem = { code: 'ERR_IO', message: expect.stringMatching(/a socket path has at most 107 bytes, this one has \d+/) as string }
  await expect(MigrationListener.open({ folder })).rejects.toMatchObject(problem)
  await expect(MigrationListener.open(join(folder, 'socket'))).rejects.toMatchObject(problem)
  expect(readdirSync(folder)).toEqual([])
})

describeWithQemu('files', (qemu) => {
  const revertTwice = async (file: string, snapshot?: string): Promise<void> => {
    const { tick } = await memoryOf(file)
    const known: number[] = []
    // on a busy machine the background may be done before the guest waits for anything
    for (let round = 0; round < 2 || (known.at(-2) === 0 && round < 8); round++) {
      const guest = await Guest.boot(qemu, { incoming: 'defer' })
      await revertFile(file, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming'), state: 'running' })
      await guest.expectGoesOn(tick)
      known.push([...faultsOf(parseFaultOrder((await readTextFile(faultOrderPath(file, snapshot)))!))].length)
      await guest.kill()
    }
    expect(known.at(-2)).toBeGreaterThan(0)
    expect(known.at(-1)).toBeGreaterThanOrEqual(known.at(-2)!)
  }

  test.each<[string, (folder: string) => MemoryTarget, string]>([
    ['RAM image', (folder) => join(folder, 'warm.qcow2'), 'warm.qcow2'],
    ['RAM image through the page cache', (folder) => join(folder, 'warm.qcow2'), 'warm.qcow2'],
    ['RAM image past the page cache', (folder) => join(folder, 'warm.qcow2'), 'warm.qcow2'],
    ['stream past the page cache', (folder) => ({ stream: join(folder, 'warm.mig') }), 'warm.mig'],
    ['stream', (folder) => ({ stream: join(folder, 'warm.mig') }), 'warm.mig'],
    ['stream through the page cache', (folder) => ({ stream: join(folder, 'warm.mig') }), 'warm.mig'],
    ['internal snapshot', (folder) => ({ image: join(folder, 'disk.qcow2'), snapshot: 'warm' }), 'disk.qcow2'],
  ])('%s', async (kind, target, name) => {
    const folder = tempFolder()
    if (kind === 'internal snapshot') await (await Qcow2Image.create(join(folder, 'disk.qcow2'), { size: 1 << 20 })).close()
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    const report = await save(guest.qmp, { memory: target(folder), direct: / (past|through) /.exec(kind) === null ? undefined : kind.includes('past') })
    await guest.run(3)
    expect(guest.errors).toEqual([])
    await guest.kill()
    const file = join(folder, name)
    expect(await readManifest(file, report.manifest.memory.snapshot)).toEqual(report.manifest)
    expect(report.manifest.memory.file).toBe(file)
    if (kind === 'internal snapshot') {
      expect(await qemu.imgOk('check', file)).toContain('No errors were found')
      expect(await qemu.imgOk('snapshot', '-l', file)).toContain('warm')
    }
    await revertTwice(file, report.manifest.memory.snapshot)
  })

  test('a descriptor: the manifest is beside its file, though that is replaced', async () => {
    const folder = tempFolder()
    const fd = openSync(join(folder, 'warm.mig'), 'w')
    try {
      const guest = await Guest.boot(qemu)
      await guest.run(1)
      await save(guest.qmp, { memory: { stream: `/proc/self/fd/${fd}` } })
      expect(readdirSync(folder).sort()).toEqual(['warm.mig', 'warm.mig.json'])
    } finally {
      closeSync(fd)
    }
  })

  test.each<[string, (folder: string) => MemoryTarget]>([
    ['RAM image', (folder) => join(folder, 'warm')],
    ['stream', (folder) => ({ stream: join(folder, 'warm') })],
    ['snapshot', (folder) => ({ image: join(folder, 'warm'), snapshot: 'warm' })],
  ])('%s: the memory alone tells that the guest ran, though it stood still for the save', async (kind, target) => {
    const folder = tempFolder()
    const [file, disk] = [join(folder, 'warm'), join(folder, 'disk.qcow2')]
    if (kind === 'snapshot') await (await Qcow2Image.create(file, { size: 1 << 20 })).close()
    await qemu.imgOk('create', '-f', 'qcow2', disk, '1M')
    const guest = await Guest.boot(qemu, { disks: [disk] })
    await guest.run(3)
    const how: Partial<SaveOptions> = kind === 'stream' ? { mode: 'stop', disks: 'none' } : { disks: 'all' }
    const { summary, manifest } = await save(guest.qmp, { memory: target(folder), manifest: false, ...how })
    await guest.kill()
    expect(manifest.disks.map(({ node, activeNode }) => [node, activeNode])).toEqual([['d0', kind === 'stream' ? 'd0' : 'd0-1']])
    if (kind === 'stream') expect(statSync(file).size).toBe(summary.length)
    const { tick } = await memoryOf(file)
    for (const bring of [revert, revertEagerly]) {
      const again = join(tempFolder(), 'again.qcow2')
      await qemu.imgOk('create', '-f', 'qcow2', '-b', disk, '-F', 'qcow2', again)
      const next = await Guest.boot(qemu, { disks: [again], incoming: 'defer' })
      expect(await bring(file, { qmp: next.qmp, incoming: join(next.folder, 'incoming') })).toMatchObject({ state: 'running' })
      await next.expectGoesOn(tick)
      await next.kill()
    }
  })

  test('on top of an earlier RAM image, only what changed is stored', async () => {
    const folder = tempFolder()
    const [base, top] = [join(folder, 'base.qcow2'), join(folder, 'top.qcow2')]
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    await save(guest.qmp, { memory: base })
    await guest.qmp.execute('stop')
    await save(guest.qmp, { memory: { ramImage: top, backing: 'base.qcow2' }, manifest: false })
    await guest.kill()
    expect(existsSync(manifestPath(top))).toBe(false)
    expect((await memoryOf(top)).tick).toBeGreaterThanOrEqual((await memoryOf(base)).tick)
    await revertTwice(base)
    await revertTwice(top)
  })

  test('a failed save leaves no saved VM and no manifest', async () => {
    const file = join(tempFolder(), 'warm.qcow2')
    const guest = await Guest.boot(qemu)
    const abort = new AbortController()
    const saving = save(guest.qmp, { memory: file, signal: abort.signal, onProgress: () => abort.abort(new Error('enough')) })
    await expect(saving).rejects.toThrow('enough')
    expect(existsSync(manifestPath(file))).toBe(false)
    expect(readdirSync(dirname(file))).toEqual([])
    await guest.run(3)
  })

  test.each<[string, (file: string) => MemoryTarget]>([
    ['RAM image', (file) => file],
    ['stream', (file) => ({ stream: file })],
  ])('a save in the place of an earlier %s: a failed one leaves it, a successful one replaces it', async (_kind, target) => {
    const file = join(tempFolder(), 'warm')
    const link = `${file}-link`
    symlinkSync(file, link)
    const guest = await Guest.boot(qemu)
    await guest.run(1)
    await save(guest.qmp, { memory: target(file) })
    const { tick } = await memoryOf(file)
    const abort = new AbortController()
    const failing = save(guest.qmp, { memory: target(link), signal: abort.signal, onProgress: () => abort.abort(new Error('enough')) })
    await expect(failing).rejects.toThrow('enough')
    expect((await memoryOf(file)).tick).toBe(tick)
    await guest.run(3)
    await save(guest.qmp, { memory: target(link) })
    expect((await memoryOf(file)).tick).toBeGreaterThan(tick)
    expect(lstatSync(link).isSymbolicLink()).toBe(true)
    expect(readdirSync(dirname(file)).sort()).toEqual(['warm', 'warm-link', 'warm-link.json', 'warm.json'])
  })

  test('a file below the new RAM image is not replaced by it', async () => {
    const folder = tempFolder()
    const [base, top] = [join(folder, 'base.qcow2'), join(folder, 'top.qcow2')]
    const guest = await Guest.boot(qemu)
    await guest.run(1)
    await save(guest.qmp, { memory: base })
    await save(guest.qmp, { memory: { ramImage: top, backing: 'base.qcow2' } })
    for (const [ramImage, backing] of [[base, 'base.qcow2'], [top, 'top.qcow2'], [base, top]] as const) {
      await expect(save(guest.qmp, { memory: { ramImage, backing } })).rejects.toMatchObject({ code: 'ERR_BUSY' })
    }
    await guest.run(3)
    await memoryOf(base)
    await memoryOf(top)
  })

  test('a disk of a running QEMU is not replaced by its memory', async () => {
    const disk = join(tempFolder(), 'disk.qcow2')
    await (await Qcow2Image.create(disk, { size: 1 << 20 })).close()
    const guest = await Guest.boot(qemu, { args: ['-blockdev', `driver=qcow2,node-name=d0,file.driver=file,file.filename=${disk}`] })
    await expect(save(guest.qmp, { memory: disk })).rejects.toMatchObject({ code: 'ERR_BUSY' })
    expect(await qemu.imgOk('info', '-U', disk)).toContain('virtual size: 1 MiB')
  })
})
