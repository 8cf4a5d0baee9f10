/** Real NBD clients over real sockets: qemu-io, qemu-img, nbdinfo, nbdcopy. */
import { execFile } from 'node:child_process'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, onTestFinished, test } from 'vitest'
import { dirtyBitmapContext, type NbdExport } from '../../src/nbd/export.ts'
import { NbdServer } from '../../src/nbd/server.ts'
import { connectNbd, listen, type NbdListener } from '../../src/nbd/socket.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { blockSize, SparseDevice } from './support/sparse-device.ts'

const MiB = 1 << 20

async function serving(exports: readonly NbdExport[], tcp = false): Promise<NbdListener & { errors: unknown[] }> {
  const errors: unknown[] = []
  const server = new NbdServer(exports, { onConnectionError: (error) => errors.push(error) })
  const listener = await listen(server, tcp ? { port: 0 } : { path: join(tempFolder(), 'nbd') })
  onTestFinished(() => listener.close())
  return Object.assign(listener, { errors })
}

function patterned(size: number): SparseDevice {
  const device = new SparseDevice(size)
  for (let block = 0; block < device.states.length; block += 3) {
    device.bytes.fill(block % 255 + 1, block * blockSize, Math.min((block + 1) * blockSize, size))
    device.states[block] = 'data'
    if (block + 1 < device.states.length) device.states[block + 1] = block % 2 === 0 ? 'zero' : 'unallocated'
  }
  return device
}

function run(tool: string, ...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  return new Promise((resolve) => {
    execFile(tool, args, { timeout: 30_000, killSignal: 'SIGKILL', maxBuffer: 64 * MiB }, (error, stdout, stderr) => {
      resolve({ code: error === null ? 0 : typeof error.code === 'number' ? error.code : -1, stdout, stderr })
    })
  })
}

describeWithQemu('NBD', (qemu) => {
  const io = async (uri: string, ...commands: string[]): Promise<string> => {
    const result = await qemu.io('-f', 'raw', uri, ...commands.flatMap((command) => ['-c', command]))
    expect(result).toMatchObject({ code: 0 })
    expect(result.stdout).not.toContain('verification failed')
    return result.stdout
  }

  test.each([['unix socket', false], ['loopback TCP', true]])('qemu-io over a %s', async (_name, tcp) => {
    const device = new SparseDevice(8 * MiB + 512)
    const listener = await serving([{ name: '', device }], tcp)
    await io(
      listener.uri(),
      'write -P 0x11 0 1M', 'write -f -P 0x22 1000 3000', 'aio_write -P 0x33 4M 2M', 'aio_flush', 'write -z 64k 64k',
      'write -z -u 256k 64k', 'discard 5M 512k', 'write -P 0x44 8M 512', 'flush',
      'read -P 0x11 0 1000', 'read -P 0x22 1000 3000', 'read -P 0x11 4000 61536', 'read -P 0 64k 64k', 'read -P 0x33 4M 1M',
      'read -P 0 5M 512k', 'read -P 0x44 8M 512',
    )
    expect(device.bytes[1000]).toBe(0x22)
    expect(device.bytes[4 * MiB]).toBe(0x33)
    expect(device.log).toContain(`zero ${64 * 1024} ${64 * 1024}`)
    expect(device.log).toContain(`zero ${256 * 1024} ${64 * 1024} unmap`)
    expect(device.log).toContain(`discard ${5 * MiB} ${512 * 1024}`)
    expect(device.flushes).toBeGreaterThanOrEqual(2)
    expect(listener.errors).toEqual([])
  })

  test('qemu-img info, map, convert and compare', async () => {
    const device = patterned(4 * MiB)
    const listener = await serving([{ name: 'disk a', device }])
    const uri = listener.uri('disk a')
    expect(JSON.parse(await qemu.imgOk('info', '--output=json', uri))).toMatchObject({ 'virtual-size': 4 * MiB, format: 'raw' })
    const map = JSON.parse(await qemu.imgOk('map', '--output=json', '-f', 'raw', uri)) as { start: number; length: number; zero: boolean; data: boolean }[]
    const expected: { start: number; length: number; zero: boolean; data: boolean }[] = []
    for await (const { start, length, zero, data } of device.map()) {
      const last = expected.at(-1)
      if (last?.zero === zero) last.length += length // NBD tells no preallocated zeroes from unallocated ones
      else expected.push({ start, length, zero, data })
    }
    expect(map.map(({ start, length, zero, data }) => ({ start, length, zero, data }))).toEqual(expected)
    const copy = join(tempFolder(), 'copy.raw')
    await qemu.imgOk('convert', '-f', 'raw', '-O', 'raw', uri, copy)
    expect(Buffer.compare(readFileSync(copy), device.bytes)).toBe(0)
    await qemu.imgOk('compare', '-f', 'raw', '-F', 'raw', uri, copy)
    expect(listener.errors).toEqual([])
  })

  test('qemu-img converts onto an export', async () => {
    const source = join(tempFolder(), 'source.raw')
    writeFileSync(source, patterned(4 * MiB).bytes)
    const device = new SparseDevice(4 * MiB)
    const listener = await serving([{ name: '', device }])
    await qemu.imgOk('convert', '-n', '-W', '-m', '16', '-f', 'raw', '-O', 'raw', source, listener.uri())
    expect(Buffer.compare(readFileSync(source), device.bytes)).toBe(0)
  })

  test('a qcow2 made by QEMU inside an export passes its check', async () => {
    const device = new SparseDevice(4 * MiB)
    const listener = await serving([{ name: '', device }])
    await qemu.imgOk('create', '-f', 'qcow2', listener.uri(), '64M')
    const result = await qemu.io('-f', 'qcow2', listener.uri(), '-c', 'write -P 7 32M 1M', '-c', 'read -P 7 32M 1M')
    expect(result).toMatchObject({ code: 0 })
    await qemu.imgOk('check', '-f', 'qcow2', listener.uri())
  })

  test('QEMU reads a dirty bitmap and the allocation depth through their contexts', async () => {
    const device = new SparseDevice(MiB)
    device.states.fill('data', 0, 16)
    device.states.fill('backing', 32, 48)
    const context = dirtyBitmapContext('b0', { ranges: () => [{ start: 65536, length: 65536 }, { start: 524288, length: 8192 }] })
    const listener = await serving([{ name: '', device, contexts: [context] }])
    const path = 'path' in listener.address ? listener.address.path : ''
    const map = async (extra: string): Promise<unknown> =>
      JSON.parse(await qemu.imgOk('map', '--output=json', '--image-opts', `driver=nbd,server.type=unix,server.path=${path}${extra}`))
    // QEMU shows a dirty range as one without data
    expect(await map(',x-dirty-bitmap=qemu:dirty-bitmap:b0')).toMatchObject([
      { start: 0, length: 65536, data: true },
      { start: 65536, length: 65536, data: false },
      { start: 131072, length: 393216, data: true },
      { start: 524288, length: 8192, data: false },
      { start: 532480, data: true },
    ])
  })

  test('a read-only export refuses QEMU as a writer', async () => {
    const listener = await serving([{ name: '', device: new SparseDevice(MiB), readOnly: true }])
    const result = await qemu.io('-f', 'raw', listener.uri(), '-c', 'write 0 512')
    expect(result.code).not.toBe(0)
    expect(result.stderr).toMatch(/read-only|Permission denied/)
    const reading = await qemu.io('-r', '-f', 'raw', listener.uri(), '-c', 'read -P 0 0 64k')
    expect(reading).toMatchObject({ code: 0 })
  })
})

describe.skipIf(!existsSync('/usr/bin/nbdinfo'))('libnbd', () => {
  test('nbdinfo lists exports, their sizes and what they can do', async () => {
    const device = patterned(4 * MiB)
    const other = new SparseDevice(1000, { readOnly: true })
    const listener = await serving([
      { name: '', device, description: 'the first' },
      { name: 'other', device: other, contexts: [dirtyBitmapContext('b', { ranges: () => [] })] },
    ])
    const list = await run('nbdinfo', '--json', '--list', listener.uri())
    expect(list).toMatchObject({ code: 0 })
    expect(JSON.parse(list.stdout)).toMatchObject({
      protocol: 'newstyle-fixed',
      structured: true,
      exports: [
        {
          'export-name': '', description: 'the first', 'export-size': 4 * MiB, is_read_only: false, can_df: true, can_fast_zero: true, can_flush: true, can_fua: true, can_multi_conn: true, can_trim: true, can_zero: true,
          contexts: ['base:allocation', 'qemu:allocation-depth'],
        },
        {
          'export-name': 'other', 'export-size': 1000, is_read_only: true, can_trim: false, can_zero: false,
          contexts: ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:b'],
        },
      ],
    })
    expect(listener.errors).toEqual([])
  })

  test('nbdinfo maps allocation, depth and a dirty bitmap', async () => {
    const device = new SparseDevice(16 * blockSize)
    device.states.splice(0, 4, 'data', 'backing', 'zero', 'unallocated')
    const ranges = { ranges: () => [{ start: blockSize, length: 2 * blockSize }] }
    const listener = await serving([{ name: '', device, contexts: [dirtyBitmapContext('b', ranges)] }])
    const map = async (context: string): Promise<unknown> => {
      const { code, stdout } = await run('nbdinfo', '--json', `--map=${context}`, listener.uri())
      expect(code).toBe(0)
      return (JSON.parse(stdout) as { offset: number; length: number; type: number }[]).map(({ offset, length, type }) => [offset / blockSize, length / blockSize, type])
    }
    expect(await map('base:allocation')).toEqual([[0, 2, 0], [2, 14, 3]])
    expect(await map('qemu:allocation-depth')).toEqual([[0, 1, 1], [1, 1, 2], [2, 1, 1], [3, 13, 0]])
    expect(await map('qemu:dirty-bitmap:b')).toEqual([[0, 1, 0], [1, 2, 1], [3, 13, 0]])
  })

  test('nbdcopy reads and writes a whole export over several connections', async () => {
    const folder = tempFolder()
    const source = patterned(16 * MiB)
    const listener = await serving([{ name: '', device: source }])
    const copy = join(folder, 'copy.raw')
    expect(await run('nbdcopy', '--connections=4', listener.uri(), copy)).toMatchObject({ code: 0 })
    expect(Buffer.compare(readFileSync(copy), source.bytes)).toBe(0)
    const target = new SparseDevice(16 * MiB)
    const back = await serving([{ name: '', device: target }])
    expect(await run('nbdcopy', '--connections=4', '--flush', copy, back.uri())).toMatchObject({ code: 0 })
    expect(Buffer.compare(target.bytes, source.bytes)).toBe(0)
    expect([...listener.errors, ...back.errors]).toEqual([])
  })
})

describe.skipIf(!existsSync('/usr/bin/nbdkit'))('nbdkit', () => {
  test('our client reads, writes and maps its memory disk', async () => {
    const { spawn } = await import('node:child_process')
    const path = join(tempFolder(), 'nbdkit')
    const kit = spawn('nbdkit', ['-f', '-U', path, 'memory', '4M'], { stdio: 'ignore' })
    onTestFinished(() => void kit.kill('SIGKILL'))
    for (let tries = 0; !existsSync(path) && tries < 200; tries++) await new Promise((resolve) => setTimeout(resolve, 25))
    await using client = await connectNbd({ path })
    expect(client.size).toBe(4 * MiB)
    await client.write(MiB, new Uint8Array(MiB).fill(5))
    await client.writeZeroes(MiB, 65536, { unmap: true })
    await client.flush()
    expect((await client.read(MiB + 65536, 100)).every((byte) => byte === 5)).toBe(true)
    expect((await client.read(MiB, 65536)).every((byte) => byte === 0)).toBe(true)
    const kinds = []
    for await (const extent of client.map()) kinds.push([extent.start, extent.zero])
    expect(kinds[0]).toEqual([0, true])
    expect(kinds.at(-1)).toEqual([2 * MiB, true])
  })
})

test('connecting to nobody is ERR_IO', async () => {
  await expect(connectNbd({ path: join(tempFolder(), 'nobody') })).rejects.toMatchObject({ code: 'ERR_IO' })
})

test('listening where a file is already is ERR_IO', async () => {
  const path = join(tempFolder(), 'taken')
  writeFileSync(path, '')
  await expect(listen(new NbdServer([]), { path })).rejects.toMatchObject({ code: 'ERR_IO' })
})

test('closing the listener ends clients and removes the socket', async () => {
  const listener = await serving([{ name: '', device: new SparseDevice(MiB) }])
  const path = 'path' in listener.address ? listener.address.path : ''
  const client = await connectNbd({ path })
  expect(existsSync(path)).toBe(true)
  await listener.close()
  expect(existsSync(path)).toBe(false)
  await expect(client.read(0, 1)).rejects.toMatchObject({ code: 'ERR_IO' })
  await client.close()
})
