/** Saving into files and reverting from them, with the manifest and the fault order beside the memory. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { faultsOf, parseFaultOrder } from '../../src/snapshot/fault-order.ts'
import { readTextFile } from '../../src/snapshot/host-files.ts'
import { faultOrderPath, manifestPath, readManifest, revertFile, save, type MemoryTarget } from '../../src/snapshot/save-files.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { memoryOf } from '../support/saves.ts'
import { tempFolder } from '../support/temp.ts'

describeWithQemu('files', (qemu) => {
  const revertTwice = async (file: string): Promise<void> => {
    const { tick } = await memoryOf(file)
    const known: number[] = []
    for (let round = 0; round < 2; round++) {
      const guest = await Guest.boot(qemu, { incoming: 'defer' })
      await revertFile(file, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
      await guest.expectGoesOn(tick)
      known.push([...faultsOf(parseFaultOrder((await readTextFile(faultOrderPath(file)))!))].length)
      await guest.kill()
    }
    expect(known[0]).toBeGreaterThan(0)
    expect(known[1]).toBeGreaterThanOrEqual(known[0]!)
  }

  test.each<[string, (folder: string) => MemoryTarget, string]>([
    ['RAM image', (folder) => join(folder, 'warm.qcow2'), 'warm.qcow2'],
    ['RAM image past the page cache', (folder) => join(folder, 'warm.qcow2'), 'warm.qcow2'],
    ['stream past the page cache', (folder) => ({ stream: join(folder, 'warm.mig') }), 'warm.mig'],
    ['stream', (folder) => ({ stream: join(folder, 'warm.mig') }), 'warm.mig'],
    ['internal snapshot', (folder) => ({ image: join(folder, 'disk.qcow2'), snapshot: 'warm' }), 'disk.qcow2'],
  ])('%s', async (kind, target, name) => {
    const folder = tempFolder()
    if (kind === 'internal snapshot') await (await Qcow2Image.create(join(folder, 'disk.qcow2'), { size: 1 << 20 })).close()
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    const report = await save(guest.qmp, { memory: target(folder), direct: kind.endsWith('past the page cache') })
    await guest.run(3)
    expect(guest.errors).toEqual([])
    await guest.kill()
    const file = join(folder, name)
    expect(await readManifest(file)).toEqual(report.manifest)
    expect(report.manifest.memory.file).toBe(file)
    if (kind === 'internal snapshot') {
      expect(await qemu.imgOk('check', file)).toContain('No errors were found')
      expect(await qemu.imgOk('snapshot', '-l', file)).toContain('warm')
    }
    await revertTwice(file)
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
  })

  test('a failed save leaves no saved VM and no manifest', async () => {
    const file = join(tempFolder(), 'warm.qcow2')
    const guest = await Guest.boot(qemu)
    const abort = new AbortController()
    const saving = save(guest.qmp, { memory: file, signal: abort.signal, onProgress: () => abort.abort(new Error('enough')) })
    await expect(saving).rejects.toThrow('enough')
    expect(existsSync(manifestPath(file))).toBe(false)
    await expect(memoryOf(file)).rejects.toThrow()
    await guest.run(3)
  })
})
