/** A loop device and its file are two names of the same bytes: what is refused for one is refused for the other. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { copyFileSync, readFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { checkImageLocks } from '../../src/block/file-lock.ts'
import { copyDevice } from '../../src/qcow2/copy.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { run } from '../cli/run.ts'
import { loopDevice, loopOver, type LoopDevice } from '../support/loop-device.ts'
import { qemus } from '../support/qemu.ts'

const MiB = 1 << 20

/** A device with an image on it, which is in its file too. */
async function withImage(skip: (why: string) => never): Promise<LoopDevice> {
  const device = loopDevice(4 * MiB, skip)
  const image = await Qcow2Image.create(device.path, { size: MiB })
  await image.write(0, new Uint8Array(100_000).fill(7))
  await image.close()
  return device
}

describe('a loop device and its file', () => {
  test('are one to every command that writes one and reads the other', async ({ skip }) => {
    const { path, file } = await withImage(skip)
    const before = readFileSync(file)
    for (const [from, to] of [[path, file], [file, path]] as const) {
      for (const line of [`convert -f qcow2 -O qcow2 ${from} ${to}`, `convert -f qcow2 -O raw ${from} ${to}`, `convert -n -f qcow2 -O raw ${from} ${to}`, `dd -f qcow2 -O raw if=${from} of=${to}`, `create -q -f qcow2 -b ${from} -F qcow2 ${to} 1M`, `rebase -u -b ${from} -F qcow2 ${to}`]) {
        expect((await run(line)).code, line).toBe(1)
        expect(readFileSync(file).equals(before), line).toBe(true)
      }
    }
  })

  test('are one to the library', async ({ skip }) => {
    const { path, file } = await withImage(skip)
    const before = readFileSync(file)
    for (const [from, to] of [[path, file], [file, path]] as const) {
      await using image = await Qcow2Image.open(from)
      await expect(Qcow2Image.open(to)).rejects.toMatchObject({ code: 'ERR_BUSY' })
      await expect(Qcow2Image.create(to, { size: MiB })).rejects.toMatchObject({ code: 'ERR_BUSY' })
      await expect(openFile(to, { create: 'w' })).rejects.toMatchObject({ code: 'ERR_BUSY' })
      await expect(openFile(to)).rejects.toMatchObject({ code: 'ERR_BUSY' })
      await using target = await openFile(to, { locking: false })
      await expect(copyDevice(image, target)).rejects.toMatchObject({ code: 'ERR_BUSY' })
    }
    expect(readFileSync(file).equals(before)).toBe(true)
  })

  test('are one where devices stand on devices', async ({ skip }) => {
    const { path, file } = await withImage(skip)
    const { path: upper } = loopOver(path, [], skip)
    expect((await run(`convert -n -f qcow2 -O raw ${upper} ${file}`)).code).toBe(1)
    expect((await run(`convert -n -f qcow2 -O raw ${file} ${upper}`)).code).toBe(1)
  })

  test('are not one where the device begins inside the file', async ({ skip }) => {
    const { path, file } = await withImage(skip)
    const { path: inner } = loopOver(file, ['--offset', String(2 * MiB)], skip)
    const copy = `${file}.copy`
    copyFileSync(file, copy)
    expect(await run(`convert -n -f qcow2 -O raw ${path} ${inner}`)).toMatchObject({ code: 0 })
    expect(readFileSync(file).subarray(0, MiB).equals(readFileSync(copy).subarray(0, MiB))).toBe(true)
    expect(readFileSync(file)[2 * MiB]).toBe(7)
  })

  for (const qemu of qemus) {
    test(`are one to a QEMU ${qemu.version} that holds either`, async ({ skip }) => {
      const { path, file } = await withImage(skip)
      for (const [held, other] of [[path, file], [file, path]] as const) {
        const holder = spawn(qemu.path('qemu-io'), ['-f', 'raw', held], { stdio: ['pipe', 'pipe', 'ignore'] })
        try {
          holder.stdin.write('length\n')
          await once(holder.stdout, 'data')
          await expect(checkImageLocks(other, 'write')).rejects.toMatchObject({ code: 'ERR_BUSY' })
          await expect(openFile(other)).rejects.toMatchObject({ code: 'ERR_BUSY' })
          await expect(Qcow2Image.open(other)).rejects.toMatchObject({ code: 'ERR_BUSY' })
          await expect(Qcow2Image.create(other, { size: MiB })).rejects.toMatchObject({ code: 'ERR_BUSY' })
          expect((await run(`resize -f raw ${other} 4M`)).code).toBe(1)
        } finally {
          holder.stdin.end('quit\n')
          if (holder.exitCode === null) await once(holder, 'exit')
        }
      }
      await (await Qcow2Image.open(path)).close()
    })
  }
})
