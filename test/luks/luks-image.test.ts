/** LUKS volumes in files of their own: the contract of devices, damage, and real QEMU in both directions. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { pad } from '../../src/block/pad.ts'
import { LuksImage, readLuksHeader } from '../../src/luks/luks-image.ts'
import { run } from '../cli/run.ts'
import { blockDeviceSuite, pattern } from '../suites/block-device.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const iterations = 1000

async function holding(content: Uint8Array): Promise<LuksImage> {
  const image = await LuksImage.create(new MemoryDevice(0, { growable: true }), { size: content.length, passphrase: 'a', iterations })
  await image.write(0, content)
  return image
}

blockDeviceSuite('LUKS volume', holding, { numRuns: 15, resizable: true })
blockDeviceSuite('padded LUKS volume', async (content) => pad(await holding(content)), { numRuns: 10, resizable: true })

test('what was written reads the same when opened again, and is not in the file', async () => {
  const host = new MemoryDevice(0, { growable: true })
  const content = pattern(3 << 20)
  const image = await LuksImage.create(host, { size: content.length, passphrase: 'a', iterations })
  await image.write(0, content)
  const bytes = Buffer.from(host.bytes)
  expect(bytes.includes(Buffer.from(content.subarray(4096, 4160)))).toBe(false)
  await using again = await LuksImage.open(bytes, { passphrase: 'a', readOnly: true })
  expect(Buffer.compare(await again.read(0, again.size), content)).toBe(0)
  expect(await readLuksHeader(new MemoryDevice(bytes))).toMatchObject({ cipherName: 'aes', payloadOffset: 0x1f9000 })
  await expect(LuksImage.open(bytes, { passphrase: 'b' })).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
})

test('a header that is cut short, or points past the file, is refused before memory is taken for it', async () => {
  const { header } = await holding(new Uint8Array(512))
  expect(header.payloadOffset).toBe(0x1f9000)
  const host = new MemoryDevice(0, { growable: true })
  await LuksImage.create(host, { size: 512, passphrase: 'a', iterations })
  const bytes = host.bytes.slice()
  for (const [length, offset, value] of [[100, 0, 0x4c], [4096, 0, 0x4c], [bytes.length, 104, 0xff], [bytes.length, 106, 0], [bytes.length, 6, 1]] as const) {
    const damaged = bytes.slice(0, length)
    damaged[offset] = value
    await expect(LuksImage.open(damaged, { passphrase: 'a' }), `${length} ${offset}`).rejects.toMatchObject({ code: expect.stringMatching(/ERR_(FORMAT|UNSUPPORTED)/) as string })
  }
  await expect(LuksImage.create(new MemoryDevice(0, { growable: true }), { size: 100, passphrase: 'a' })).rejects.toThrow(RangeError)
})

describeWithQemu('luks as a format', (qemu) => {
  const secret = ['--object', 'secret,id=key,data=geheim']
  const volume = (path: string): string => `driver=luks,key-secret=key,file.filename=${path}`

  test('QEMU reads what is made here', async () => {
    const folder = tempFolder()
    const [raw, path] = [join(folder, 'raw'), join(folder, 'volume')]
    writeFileSync(raw, pattern(300 << 10))
    expect(await run(['convert', '-f', 'raw', '-O', 'luks', ...secret, '-o', 'key-secret=key,iter-time=10', raw, path])).toMatchObject({ code: 0 })
    expect(await qemu.imgOk('compare', ...secret, '--image-opts', volume(path), `driver=raw,file.filename=${raw}`)).toContain('identical')
    const theirs = JSON.parse(await qemu.imgOk('info', '--output=json', path)) as Record<string, unknown>
    const ours = JSON.parse((await run(['info', '--output=json', path])).stdout) as Record<string, unknown>
    if (qemu.major >= 10) expect(ours).toEqual(theirs)
    else expect(ours).toMatchObject({ format: 'luks', 'virtual-size': theirs['virtual-size'] })
  })

  test('what QEMU makes and writes is read, written and grown here', async () => {
    const folder = tempFolder()
    const [raw, path] = [join(folder, 'raw'), join(folder, 'volume')]
    await qemu.imgOk('create', '-q', '-f', 'luks', ...secret, '-o', 'key-secret=key,iter-time=10', path, '1M')
    const io = (...commands: string[]): Promise<unknown> => qemu.io(...secret, '--image-opts', ...commands.flatMap((command) => ['-c', command]), volume(path))
    expect(await io('write -P 7 0 1M', 'write -P 9 4k 512')).toMatchObject({ code: 0 })
    expect(await run(['convert', ...secret, '--image-opts', volume(path), raw])).toMatchObject({ code: 0 })
    const expected = Buffer.alloc(1 << 20, 7).fill(9, 4096, 4608)
    expect(Buffer.compare(readFileSync(raw), expected)).toBe(0)
    expect(await run(['resize', ...secret, '--image-opts', volume(path), '+64k'])).toMatchObject({ code: 0 })
    await using image = await LuksImage.open(path, { passphrase: 'geheim' })
    await image.write(1 << 20, new Uint8Array(65536).fill(5))
    await image.close()
    const { code, stdout } = (await io('read -P 5 1M 64k', 'read -P 9 4k 512')) as { code: number; stdout: string }
    expect({ code, failed: stdout.includes('failed') }).toEqual({ code: 0, failed: false })
  })

  test('an overlay over one is made without the key', async () => {
    const folder = tempFolder()
    const [path, overlay] = [join(folder, 'volume'), join(folder, 'overlay')]
    await run(['create', '-q', '-f', 'luks', ...secret, '-o', 'key-secret=key,iter-time=10', path, '1M'])
    expect(await run(['create', '-f', 'qcow2', '-b', path, '-F', 'luks', overlay])).toMatchObject({ code: 0 })
    expect(JSON.parse(await qemu.imgOk('info', '--output=json', overlay))).toMatchObject({ 'virtual-size': 1 << 20, 'backing-filename-format': 'luks' })
  })

  test.each([
    ['convert', 'VOLUME', 'OTHER'],
    ['map', '--object', 'secret,id=key,data=wrong', '--image-opts', 'driver=luks,key-secret=key,file.filename=VOLUME'],
    ['map', '--output=json', ...secret, '--image-opts', 'driver=luks,key-secret=key,file.filename=VOLUME'],
    ['check', ...secret, '--image-opts', 'driver=luks,key-secret=key,file.filename=VOLUME'],
    ['create', '-f', 'luks', 'OTHER', '1M'],
    ['measure', '-O', 'luks', '--size', '10M', ...secret, '-o', 'key-secret=key'],
  ])('says what qemu-img says: %s %s %s', async (...args) => {
    const folder = tempFolder()
    const path = join(folder, 'volume')
    await run(['create', '-q', '-f', 'luks', ...secret, '-o', 'key-secret=key,iter-time=1', path, '1M'])
    const named = args.map((word) => word.replace('VOLUME', path).replace('OTHER', join(folder, 'other')))
    const theirs = await qemu.img(...named)
    const { code, stdout, stderr } = await run(named, { program: 'qemu-img' })
    if (qemu.major >= 10) expect({ code, stdout, stderr }).toEqual(theirs)
    else expect(code).toBe(theirs.code)
  })
})
