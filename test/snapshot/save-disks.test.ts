/** Which disks of a VM are frozen with its memory, with real QEMUs: names, places, refusals, and what the manifest tells. */
import { readFileSync, writeFileSync } from 'node:fs'
import { basename, dirname, join, relative } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { parseManifest } from '../../src/snapshot/parse-manifest.ts'
import { save } from '../../src/snapshot/save-files.ts'
import { manifestPath } from '../../src/snapshot/saved-names.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

/** A guest with disks of every kind of name: `d0` by node, one by `-drive id=`, one by nothing, one that is read only. */
async function guestWithDisks(qemu: Qemu): Promise<{ guest: Guest; folder: string; file: (name: string) => string }> {
  const folder = tempFolder()
  const file = (name: string): string => join(folder, name)
  for (const name of ['node.qcow2', 'drive.qcow2', 'shared.qcow2']) await qemu.imgOk('create', '-f', 'qcow2', file(name), '1M')
  await qemu.imgOk('create', '-f', 'raw', file('plain.img'), '1M')
  // a relative name that means another place, or nothing, from the folder of the overlays
  const before = process.cwd()
  process.chdir(dirname(folder))
  onTestFinished(() => process.chdir(before))
  const guest = await Guest.boot(qemu, {
    disks: [file('node.qcow2')],
    args: [
      ...['-drive', `if=none,id=named,file=${relative(process.cwd(), file('drive.qcow2'))}`, '-device', 'virtio-blk-pci,drive=named'],
      ...['-drive', `if=ide,file=${file('plain.img')},format=raw`],
      ...['-drive', `if=none,id=locked,readonly=on,file=${file('shared.qcow2')}`, '-device', 'virtio-blk-pci,drive=locked,id=locked'],
    ],
  })
  await guest.run(1)
  return { guest, folder, file }
}

describeWithQemu('disks of a save', (qemu) => {
  test('a VM with writable disks is not saved without a word about them', async () => {
    const { guest, file } = await guestWithDisks(qemu)
    const refusal = expect(save(guest.qmp, { memory: file('vm') })).rejects
    await refusal.toMatchObject({
      code: 'ERR_UNSUPPORTED',
      message: expect.stringMatching(/disk0 \(.*node\.qcow2\), .*named \(.*drive\.qcow2\).*plain\.img.*'all'.*'none'|named.*disk0.*'all'.*'none'/) as string,
    })
    await guest.run(2)
  })

  test('all: each goes on beside its file, again and again; the manifest tells absolute names', async () => {
    const { guest, file } = await guestWithDisks(qemu)
    for (const round of [1, 2]) {
      const { manifest } = await save(guest.qmp, { memory: file('vm'), disks: 'all' })
      const suffix = round === 1 ? undefined : `-${round - 1}.qcow2`
      const names = suffix === undefined ? ['drive.qcow2', 'node.qcow2', 'plain.img'] : ['drive', 'node', 'plain'].map((name) => name + suffix)
      expect(manifest.disks.map((disk) => disk.file).sort()).toEqual(names.map(file))
      for (const disk of manifest.disks) {
        expect(disk.frozen).toMatchObject({ overlay: file(basename(disk.file).replace(/(-\d)?\.\w+$/, `-${round}.qcow2`)), modified: expect.any(String) as string })
      }
      expect(parseManifest(readFileSync(manifestPath(file('vm')), 'utf8'))).toEqual(manifest)
    }
    await guest.run(2)
    await guest.kill()
    for (const name of ['drive', 'node', 'plain']) expect(await qemu.imgOk('info', '--backing-chain', file(`${name}-2.qcow2`))).toContain(`${name}-1.qcow2`)
  })

  test.each(['d0', 'disk0', 'named', 'ide0-hd0', 'node.qcow2', 'generated'])('%s goes on meaning the disk after each save', async (given) => {
    const { guest, file } = await guestWithDisks(qemu)
    const drives = await guest.qmp.execute('query-block')
    const generated = drives.find(({ device }) => device === 'named')!.inserted!['node-name']
    const name = given === 'generated' ? generated : given.endsWith('.qcow2') ? relative(process.cwd(), file(given)) : given
    const frozen: string[] = []
    for (let round = 0; round < 3; round++) {
      const { manifest } = await save(guest.qmp, { memory: file('vm'), disks: [name] })
      const [disk, ...more] = manifest.disks.filter((one) => one.frozen !== false)
      expect(more).toEqual([])
      expect(manifest.disks).toHaveLength(3)
      frozen.push(basename(disk!.file).replace(/(-\d)?\.\w+$/, ''))
    }
    expect(new Set(frozen).size).toBe(1)
    await guest.run(1)
  })

  test('a name of nothing, a name twice, an overlay that is there or for two disks: refused, and nothing happened', async () => {
    const { guest, file } = await guestWithDisks(qemu)
    writeFileSync(file('precious'), 'precious')
    for (const [disks, error] of [
      [['nothing'], { code: 'ERR_NOT_FOUND', message: expect.stringContaining('node.qcow2') as string }],
      [['locked'], { code: 'ERR_NOT_FOUND' }],
      [['d0', { node: 'disk0', internal: 'moment' }], { name: 'TypeError' }],
      [[{ node: 'd0', overlay: file('precious') }], { code: 'ERR_EXISTS' }],
      [[{ node: 'd0', overlay: file('drive.qcow2') }], { code: 'ERR_EXISTS', message: expect.stringContaining('choose another name') as string }],
      [[{ node: 'd0', overlay: file('one') }, { node: 'named', overlay: file('one') }], { name: 'TypeError' }],
    ] as const) {
      await expect(save(guest.qmp, { memory: file('vm'), disks, fallback: 'stop' })).rejects.toMatchObject(error)
    }
    expect(readFileSync(file('precious'), 'utf8')).toBe('precious')
    const { manifest } = await save(guest.qmp, { memory: file('vm'), disks: 'none' })
    expect(manifest.disks.map((disk) => [basename(disk.file), disk.frozen]).sort()).toEqual([['drive.qcow2', false], ['node.qcow2', false], ['plain.img', false]])
  })

  test('an overlay in another folder than the disk finds it, however QEMU called it', async () => {
    const { guest, file } = await guestWithDisks(qemu)
    const overlay = join(tempFolder(), 'after.qcow2')
    await save(guest.qmp, { memory: file('vm'), disks: [{ node: 'named', overlay: relative(process.cwd(), overlay) }] })
    await guest.run(1)
    await guest.kill()
    expect(await qemu.imgOk('info', '--backing-chain', overlay)).toContain('drive.qcow2')
    expect(dirname(overlay)).not.toBe(dirname(file('drive.qcow2')))
  })
})
