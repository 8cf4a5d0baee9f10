/** Our client at qemu-nbd: what each version of it serves is read, written and mapped as the image says. */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { pad } from '../../src/block/pad.ts'
import { connectNbd } from '../../src/nbd/socket.ts'
import { run } from '../cli/run.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const MiB = 1 << 20

async function served(qemu: Qemu, ...args: string[]): Promise<string> {
  const path = join(tempFolder(), 'nbd')
  const server = spawn(qemu.path('qemu-nbd'), ['-t', '-e', '4', '-k', path, ...args], { stdio: ['ignore', 'ignore', 'inherit'] })
  onTestFinished(() => void server.kill('SIGKILL'))
  await expect.poll(() => existsSync(path), { timeout: 20_000 }).toBe(true)
  return path
}

describeWithQemu('qemu-nbd as the server', (qemu) => {
  test('an overlay: bytes, holes, depth, a write and a discard', async () => {
    const folder = tempFolder()
    const [base, image] = [join(folder, 'base'), join(folder, 'image')]
    await qemu.imgOk('create', '-f', 'qcow2', base, '8M')
    await qemu.io('-c', 'write -P 1 0 1M', base)
    await qemu.imgOk('create', '-f', 'qcow2', '-b', base, '-F', 'qcow2', image)
    await qemu.io('-c', 'write -P 2 4M 1M', '-c', 'write -z 5M 64k', image)
    const path = await served(qemu, '-f', 'qcow2', '--discard=unmap', '-A', image)
    const client = await connectNbd({ path })
    const disk = pad(client)
    expect(disk.size).toBe(8 * MiB)
    expect((await disk.read(MiB - 10, 20)).join()).toBe([...Array.from({ length: 10 }, () => 1), ...Array.from({ length: 10 }, () => 0)].join())
    await disk.write(7 * MiB + 1, new Uint8Array(1000).fill(9))
    await disk.writeZeroes(0, 65536, { unmap: true })
    await disk.flush()
    const extents = []
    for await (const { start, zero, depth } of disk.map()) extents.push([start / 65536, zero, depth])
    expect(extents.slice(0, 3)).toEqual([[0, true, 0], [1, false, 1], [16, true, 0]])
    expect(extents).toContainEqual([64, false, 0])
    await disk.close()
    expect((await qemu.io('-U', '-r', '-f', 'qcow2', image, '-c', `read -P 9 ${7 * MiB + 1} 1000`, '-c', 'read -P 0 0 64k', '-c', 'read -P 1 64k 64k')).stdout).not.toContain('failed')
  })

  test('a dirty bitmap, and a read-only export by its name', async () => {
    const image = join(tempFolder(), 'image')
    await qemu.imgOk('create', '-f', 'qcow2', image, '4M')
    await qemu.imgOk('bitmap', '--add', image, 'b0')
    await qemu.io('-c', 'write 1M 64k', image)
    const path = await served(qemu, '-f', 'qcow2', '-r', '-x', 'a disk', '-B', 'b0', image)
    await using client = await connectNbd({ path }, { name: 'a disk', context: 'qemu:dirty-bitmap:b0' })
    expect(client.readOnly).toBe(true)
    const dirty = []
    for await (const { start, length, data } of client.map()) if (!data) dirty.push([start, length])
    expect(dirty).toEqual([[MiB, 65536]])
    await expect(connectNbd({ path }, { name: 'another' })).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    await expect(client.write(0, new Uint8Array(512))).rejects.toMatchObject({ code: 'ERR_READ_ONLY' })
  })

  test('our command converts from it and into it', async () => {
    const folder = tempFolder()
    const [image, target, copy] = ['image', 'target', 'copy'].map((name) => join(folder, name)) as [string, string, string]
    await qemu.imgOk('create', '-f', 'qcow2', image, '4M')
    await qemu.io('-c', 'write -P 5 1M 1M', image)
    await qemu.imgOk('create', '-f', 'qcow2', target, '4M')
    const from = `nbd+unix:///?socket=${await served(qemu, '-r', '-f', 'qcow2', image)}`
    const into = `nbd+unix:///?socket=${await served(qemu, '-f', 'qcow2', target)}`
    expect(await run(['convert', '-O', 'qcow2', from, copy])).toMatchObject({ code: 0, stderr: '' })
    expect(await run(['convert', '-n', '-f', 'raw', '-O', 'raw', from, into])).toMatchObject({ code: 0, stderr: '' })
    await qemu.imgOk('compare', '-U', image, copy)
    await qemu.imgOk('compare', '-U', image, target)
  })
})
