/** Requests that fail because the user asked for it, and what commands make of them. */
import { copyFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

async function image(path: string, size: number, at: number): Promise<string> {
  await using made = await Qcow2Image.create(path, { size })
  await made.write(at, new Uint8Array(65536).fill(7))
  return path
}

const failing = (path: string, ...rules: object[]): string =>
  `json:${JSON.stringify({ driver: 'qcow2', file: { driver: 'blkdebug', 'inject-error': rules, image: { driver: 'file', filename: path } } })}`

describe('blkdebug', () => {
  test('a sector of the file that cannot be read', async () => {
    const path = await image(join(tempFolder(), 'disk'), 1 << 20, 0)
    const raw = `${path}.raw`
    expect(await run(['convert', failing(path, { event: 'none', iotype: 'read', sector: (5 * 65536) / 512, errno: 5 }), raw])).toMatchObject({ code: 1, stderr: expect.stringContaining('EIO') as string })
    expect(await run(['convert', failing(path, { event: 'none', iotype: 'read', sector: 4000 }), raw])).toMatchObject({ code: 0 })
  })

  test('a full disk under a commit, once', async () => {
    const folder = tempFolder()
    const base = await image(join(folder, 'base'), 1 << 20, 0)
    const overlay = join(folder, 'overlay')
    const below = failing(base, { event: 'write_aio', errno: 28, once: true })
    const made = await run(['create', '-f', 'qcow2', '-b', below, '-F', 'qcow2', overlay])
    // a comma is written twice, as -o takes it
    expect(made).toMatchObject({ code: 0, stdout: expect.stringContaining(`backing_file=${below.replaceAll(',', ',,')} `) as string })
    expect(await run(['commit', '--references=any', overlay])).toMatchObject({ code: 0 })
    expect(await run(['bench', '--references=any', '-w', '-c', '1', '-s', '65536', overlay])).toMatchObject({ code: 0 })
    expect(await run(['commit', '--references=any', overlay])).toMatchObject({ code: 1, stderr: 'qcow2: Block job failed: No space left on device\n' })
  })

  test('a configuration file; what is not known is refused', async () => {
    const folder = tempFolder()
    const path = await image(join(folder, 'disk'), 1 << 20, 0)
    const conf = join(folder, 'conf')
    writeFileSync(conf, '# data\n[inject-error]\nevent = "read_aio"\nerrno = "5"\nonce = "off"\n')
    copyFileSync(path, `${path}.2`)
    const named = `blkdebug:${conf}:${path}`
    expect(await run(['compare', named, `${path}.2`])).toMatchObject({ code: 4, stderr: `qcow2: Error while reading offset 0 of ${named}: Input/output error\n` })
    expect(await run(['compare', `blkdebug::${path}`, `${path}.2`])).toMatchObject({ code: 0 })
    for (const text of ['[set-state]\nevent = "read_aio"', '[inject-error]\nevent = "l1_update"', '[inject-error]\nevent = "none"\nstate = "2"', '[inject-error]\nevent = "read_aio"\nsector = "1"', 'nonsense']) {
      writeFileSync(conf, text)
      expect(await run(['compare', named, `${path}.2`]), text).toMatchObject({ code: 2, stderr: expect.stringContaining('not supported') as string })
    }
  })
})

describeWithQemu('compare where the disks differ in size, or fail', (qemu) => {
  test('exit codes, lines and their place', async () => {
    const folder = tempFolder()
    const [long, short, other] = [await image(join(folder, 'long'), 1 << 20, 768 << 10), join(folder, 'short'), await image(join(folder, 'other'), 512 << 10, 0)]
    await qemu.imgOk('create', '-q', '-f', 'qcow2', short, '512k')
    for (const args of [[long, short], [short, long], [long, other], ['-s', long, other], ['-q', long, short], [short, short]]) {
      const { code, stdout, stderr } = await run(['compare', ...args], { program: 'qemu-img' })
      expect({ code, stdout, stderr }, args.join(' ')).toEqual(await qemu.img('compare', ...args))
    }
    const status = (path: string): string =>
      `json:${JSON.stringify({ driver: 'blkdebug', 'inject-error': [{ event: 'none', iotype: 'block-status', sector: 0 }], image: { driver: 'qcow2', file: { driver: 'file', filename: path } } })}`
    const theirs = await qemu.img('compare', status(long), other)
    const ours = await run(['compare', status(long), other], { program: 'qemu-img' })
    expect(theirs.code).toBe(3)
    expect(ours).toMatchObject({ code: 3, stderr: expect.stringContaining('Sector allocation test failed for ') as string })
  })
})
