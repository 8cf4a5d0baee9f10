/** New images on NBD exports, whose size is fixed and whose old content must not show. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { NbdServer } from '../../src/nbd/server.ts'
import { listen } from '../../src/nbd/socket.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

const MiB = 1 << 20

/** An export of so many bytes, full of what looks like anything but an image. */
async function exported(size: number): Promise<{ uri: string; bytes: Uint8Array }> {
  const bytes = Uint8Array.from({ length: size }, (_, at) => (at * 37) % 251 | 1)
  const listener = await listen(new NbdServer([{ name: '', device: new MemoryDevice(bytes) }]), { path: join(tempFolder(), 'nbd') })
  onTestFinished(() => listener.close())
  return { uri: listener.uri(), bytes }
}

describeWithQemu('a new image on an export', (qemu) => {
  const source = async (): Promise<string> => {
    const path = join(tempFolder(), 'source')
    await qemu.imgOk('create', '-f', 'qcow2', path, '4M')
    await qemu.io('-c', 'write -P 7 1M 1M', path)
    return path
  }

  test.each([['1.1', []], ['0.10', ['-o', 'compat=0.10']], ['extended', ['-o', 'extended_l2=on']], ['preallocated', ['-o', 'preallocation=metadata']]])('create, %s', async (_name, options) => {
    const { uri } = await exported(16 * MiB)
    expect(await run(['create', '-q', '-f', 'qcow2', ...options, uri, '8M'])).toMatchObject({ code: 0, stderr: '' })
    await qemu.imgOk('check', '-f', 'qcow2', uri)
    expect((await qemu.io('-f', 'qcow2', uri, '-c', 'read -P 0 0 8M', '-c', 'write -P 3 5M 1M', '-c', 'read -P 3 5M 1M')).stdout).not.toContain('failed')
    await qemu.imgOk('check', '-f', 'qcow2', uri)
  })

  test.each([[[]], [['-c']], [['-o', 'cluster_size=4k']], [['-o', 'lazy_refcounts=on,refcount_bits=8']]])('convert %j', async (options) => {
    const { uri } = await exported(16 * MiB)
    const image = await source()
    expect(await run(['convert', '-O', 'qcow2', ...options, image, uri])).toMatchObject({ code: 0, stderr: '' })
    await qemu.imgOk('check', '-f', 'qcow2', uri)
    await qemu.imgOk('compare', '-f', 'qcow2', '-F', 'qcow2', image, uri)
  })

  test('raw, and by dd', async () => {
    const image = await source()
    const { uri, bytes } = await exported(4 * MiB)
    expect(await run(['convert', '-O', 'raw', image, uri])).toMatchObject({ code: 0, stderr: '' })
    expect([bytes[0], bytes[MiB], bytes[2 * MiB]]).toEqual([0, 7, 0])
    const other = await exported(16 * MiB)
    expect(await run(['dd', '-O', 'qcow2', `if=${image}`, `of=${other.uri}`])).toMatchObject({ code: 0, stderr: '' })
    await qemu.imgOk('compare', '-f', 'qcow2', '-F', 'qcow2', image, other.uri)
  })

  test('one that is too small, or the source itself, is refused', async () => {
    const image = await source()
    const { uri } = await exported(MiB)
    expect((await run(['convert', '-O', 'qcow2', image, uri])).code).toBe(1)
    expect((await run(['convert', '-O', 'raw', image, uri])).code).toBe(1)
    expect((await run(['create', '-f', 'raw', uri, '8M'])).code).toBe(1)
    const full = await exported(16 * MiB)
    await run(['convert', '-O', 'qcow2', image, full.uri])
    const before = Buffer.from(full.bytes)
    const self = await run(['convert', '-f', 'qcow2', '-O', 'qcow2', full.uri, full.uri])
    expect(self).toMatchObject({ code: 1 })
    expect(Buffer.compare(before, full.bytes)).toBe(0)
    const raw = join(tempFolder(), 'raw')
    writeFileSync(raw, 'x')
    expect((await run(['convert', '-O', 'qcow2', raw, 'http://127.0.0.1:1/x'])).stderr).toContain('files and on NBD exports only')
    expect(readFileSync(raw, 'utf8')).toBe('x')
  })
})
