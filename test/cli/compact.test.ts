/** `compact`, encryption and URLs from end to end. */
import { appendFileSync, readFileSync, statSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { describe, expect, onTestFinished, test } from 'vitest'
import { qemus } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

const newest = qemus.at(-1)

describe.skipIf(newest === undefined)('compact', () => {
  const qemu = newest!
  test('cuts what a deleted snapshot left, and the image stays as it was', async () => {
    const folder = tempFolder()
    const image = join(folder, 'image')
    const copy = join(folder, 'copy')
    await qemu.imgOk('create', '-q', '-f', 'qcow2', image, '8M')
    await qemu.io('-c', 'write -P 1 0 2M', image)
    await run(['snapshot', '-c', 's', image])
    await qemu.io('-c', 'write -P 2 0 2M', image)
    await run(['snapshot', '-a', 's', image])
    await run(['snapshot', '-d', 's', image])
    await qemu.imgOk('convert', '-O', 'raw', image, copy)
    appendFileSync(image, Buffer.alloc(2 << 20, 7)) // as a crash in the middle of a write leaves it
    const before = statSync(image).size
    const { code, stdout } = await run(['compact', '--output=json', image])
    expect(code).toBe(0)
    const { freed, after } = JSON.parse(stdout) as { freed: number; after: number }
    expect(freed).toBe(before - after)
    expect(statSync(image).size).toBe(after)
    expect(after).toBeLessThanOrEqual(before - (2 << 20))
    await qemu.imgOk('check', image)
    await qemu.imgOk('compare', '-f', 'qcow2', '-F', 'raw', image, copy)
  })
})

describe.skipIf(newest === undefined)('encrypted images', () => {
  const qemu = newest!
  test('made here are read by QEMU, and the other way round', async () => {
    const folder = tempFolder()
    const [ours, theirs, raw] = ['ours', 'theirs', 'raw'].map((name) => join(folder, name)) as [string, string, string]
    const secret = ['--object', 'secret,id=s,data=correct horse']
    const options = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10'
    expect(await run(['create', '-q', '-f', 'qcow2', ...secret, '-o', options, ours, '2M'])).toMatchObject({ code: 0, stderr: '' })
    const opts = (file: string): string => `driver=qcow2,file.filename=${file},encrypt.key-secret=s`
    expect(await qemu.io('--object', 'secret,id=s,data=correct horse', '--image-opts', opts(ours), '-c', 'write -P 9 64k 1M')).toMatchObject({ code: 0 })
    expect(await run(['convert', ...secret, '--image-opts', opts(ours), raw])).toMatchObject({ code: 0, stderr: '' })
    expect(readFileSync(raw).subarray(65536, 65536 + (1 << 20)).every((byte) => byte === 9)).toBe(true)
    await qemu.imgOk('create', '-q', '-f', 'qcow2', ...secret, '-o', options, theirs, '2M')
    expect(await run(['convert', '-n', ...secret, '--target-image-opts', raw, opts(theirs)])).toMatchObject({ code: 0, stderr: '' })
    await qemu.imgOk('compare', ...secret, '--image-opts', opts(theirs), `driver=raw,file.filename=${raw}`)
  })

  test('need their secret', async () => {
    const image = join(tempFolder(), 'image')
    await run(['create', '-q', '-f', 'qcow2', '--object', 'secret,id=s,data=a', '-o', 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10', image, '1M'])
    expect((await run(['map', image])).code).toBe(1)
    const wrong = await run(['map', '--object', 'secret,id=s,data=b', '--image-opts', `driver=qcow2,file.filename=${image},encrypt.key-secret=s`])
    expect(wrong.code).toBe(1)
    expect(wrong.stderr).toMatch(/^qcow2: Could not open .*\n$/)
    expect((await run(['map', '--image-opts', `driver=qcow2,file.filename=${image},encrypt.key-secret=s`])).stderr).toContain("No secret with id 's'")
  })
})

describe('an image on a web server', () => {
  test('is read by info, map and compare', async () => {
    const image = join(tempFolder(), 'image')
    await run(['create', '-q', '-f', 'qcow2', image, '4M'])
    const bytes = readFileSync(image)
    const server = createServer((request, response) => {
      const [, from = '0', to = ''] = /bytes=(\d+)-(\d*)/.exec(request.headers.range ?? '') ?? []
      const end = to === '' ? bytes.length - 1 : Math.min(Number(to), bytes.length - 1)
      const part = bytes.subarray(Number(from), end + 1)
      response.writeHead(206, { 'content-range': `bytes ${from}-${end}/${bytes.length}`, 'content-length': part.length, 'accept-ranges': 'bytes', etag: '"1"' })
      response.end(request.method === 'HEAD' ? undefined : part)
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    onTestFinished(() => {
      server.close()
      server.closeAllConnections()
    })
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/image`
    const info = await run(['info', '--output=json', url])
    expect(info).toMatchObject({ code: 0, stderr: '' })
    expect(JSON.parse(info.stdout)).toMatchObject({ filename: url, 'virtual-size': 4 << 20, format: 'qcow2' })
    expect(await run(['compare', url, image])).toMatchObject({ code: 0, stdout: 'Images are identical.\n' })
    expect((await run(['resize', url, '8M'])).code).toBe(1)
  })
})
