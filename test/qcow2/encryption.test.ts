import { statSync, writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { repairImage } from '../../src/qcow2/repair.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const write = fc.record({ sector: fc.nat(255), sectors: fc.integer({ min: 1, max: 40 }), value: fc.nat(255) })

test.each(['luks', 'aes'] as const)('an image encrypted with %s reads what was written, after opening it again, and holds no plain text', async (format) => {
  await fc.assert(
    fc.asyncProperty(fc.array(write, { maxLength: 8 }), fc.constantFrom(512, 4096, 65536), fc.constantFrom('off' as const, 'metadata' as const, 'full' as const), async (writes, clusterSize, preallocation) => {
      const host = new MemoryDevice(0, { growable: true })
      const encryption = { format, passphrase: 'geheim', iterations: 1000 }
      const model = Buffer.alloc(1 << 18)
      const image = await Qcow2Image.create(host, { size: model.length, clusterSize, preallocation, encryption })
      for (const { sector, sectors, value } of writes) {
        const offset = sector * 512
        const bytes = Buffer.alloc(Math.min(sectors * 512, model.length - offset), Buffer.from([value, value ^ 1, 77, 78]))
        await image.write(offset, bytes)
        bytes.copy(model, offset)
      }
      await image.flush()
      const reopened = await Qcow2Image.open(new MemoryDevice(host.bytes.slice()), { readOnly: true, passphrase: 'geheim' })
      expect(Buffer.compare(await reopened.read(0, model.length), model)).toBe(0)
      for (const { value } of writes) expect(Buffer.from(host.bytes).includes(Buffer.alloc(64, Buffer.from([value, value ^ 1, 77, 78])))).toBe(false)
    }),
    { numRuns: 12 },
  )
})

test('without a key an encrypted image is refused, with a wrong one too, and its facts can be read', async () => {
  const host = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(host, { size: 1 << 20, encryption: { format: 'luks', passphrase: 'a', iterations: 1000 } })
  await image.flush()
  const open = (passphrase?: string): Promise<Qcow2Image> => Qcow2Image.open(host.bytes.slice(), { readOnly: true, passphrase })
  await expect(open()).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', message: expect.stringContaining('needs a key') as string })
  await expect(open('b')).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  expect((await open('a')).size).toBe(1 << 20)
  expect(await readImageInfo(new MemoryDevice(host.bytes))).toMatchObject({ encryption: 'luks', luks: { cipherName: 'aes', cipherMode: 'xts-plain64', hash: 'sha256' } })
  await expect(Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 512, version: 2, preallocation: 'metadata', encryption: { format: 'aes', passphrase: 'a' } })).rejects.toThrow(TypeError)
})

test('without its pointer the LUKS header is no leak: freed, it would be lost, and the data with it', async () => {
  const host = new MemoryDevice(0, { growable: true })
  await (await Qcow2Image.create(host, { size: 1 << 20, encryption: { format: 'luks', passphrase: 'a', iterations: 1000 } })).flush()
  const bytes = host.bytes.slice()
  const at = Buffer.from(bytes).indexOf(Buffer.of(0x05, 0x37, 0xbe, 0x77))
  bytes[at] = 0x55 // an extension nobody knows
  const file = new MemoryDevice(bytes.slice(), { growable: true })
  await expect(checkImage(file)).rejects.toMatchObject({ code: 'ERR_FORMAT', field: 'crypt_method' })
  for (const repair of ['leaks', 'all'] as const) await expect(repairImage(file, { repair })).rejects.toMatchObject({ code: 'ERR_FORMAT' })
  expect(Buffer.compare(file.bytes, bytes)).toBe(0)
})

test('subclusters that are preallocated and encrypted leave the backing file in sight', async () => {
  const below = new MemoryDevice(new Uint8Array(1 << 20).fill(9))
  const options = { extendedL2: true, preallocation: 'metadata', backing: { file: 'base', format: 'raw' }, references: () => below } as const
  await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 1 << 20, ...options, encryption: { format: 'luks', passphrase: 'a', iterations: 1000 } })
  await image.write(71_680, new Uint8Array(512).fill(1))
  const bytes = await image.read(0, 1 << 20)
  expect([bytes[0], bytes[71_679], bytes[71_680], bytes[72_192], bytes.at(-1)]).toEqual([9, 9, 1, 9, 9])
})

describeWithQemu('encryption', (qemu) => {
  const secret = ['--object', 'secret,id=s,data=pass word']
  const spec = (path: string): string => `driver=qcow2,encrypt.key-secret=s,file.filename=${path}`

  test.each(['luks', 'aes'] as const)('qemu-io reads and writes an image encrypted here with %s', async (format) => {
    const path = `${tempFolder()}/a.qcow2`
    {
      await using image = await Qcow2Image.create(path, { size: 1 << 20, encryption: { format, passphrase: 'pass word', iterations: 1000 } })
      await image.write(65536, new Uint8Array(100 * 1024).fill(0x5a))
    }
    const commands = ['read -P 0x5a 64k 100k', 'write -P 0x33 128k 8k', 'write -P 0x44 512k 3k'].flatMap((command) => ['-c', command])
    const result = await qemu.io(...secret, '--image-opts', ...commands, spec(path))
    expect(result).toMatchObject({ code: 0, stdout: expect.not.stringMatching(/failed/) as string })
    expect(await qemu.img('check', ...secret, '--image-opts', spec(path))).toMatchObject({ code: 0 })
    await using image = await Qcow2Image.open(path, { passphrase: 'pass word' })
    expect((await image.read(64 << 10, 64 << 10)).every((byte) => byte === 0x5a)).toBe(true)
    expect((await image.read(128 << 10, 8 << 10)).every((byte) => byte === 0x33)).toBe(true)
    expect((await image.read(512 << 10, 3 << 10)).every((byte) => byte === 0x44)).toBe(true)
  })

  test.each([{}, { extendedL2: true }, { clusterSize: 512 }])('what is preallocated in an encrypted image has its space and reads as zeroes: %o', async (shape) => {
    const path = `${tempFolder()}/p.qcow2`
    await (await Qcow2Image.create(path, { size: 1 << 20, ...shape, preallocation: 'metadata', encryption: { format: 'luks', passphrase: 'pass word', iterations: 1000 } })).close()
    const before = (await readImageInfo(path)).virtualSize
    const commands = ['read -P 0 0 1M', 'write -P 7 300k 5k', 'read -P 0 0 300k', 'read -P 0 305k 719k'].flatMap((command) => ['-c', command])
    const length = statSync(path).size
    expect(await qemu.io(...secret, '--image-opts', ...commands, spec(path))).toMatchObject({ code: 0, stdout: expect.not.stringMatching(/failed/) as string })
    expect(await qemu.img('check', ...secret, '--image-opts', spec(path))).toMatchObject({ code: 0 })
    expect([before, statSync(path).size]).toEqual([1 << 20, length])
    expect(length).toBeGreaterThan(1 << 20)
  })

  test('an image encrypted by qemu-img with legacy AES is read', async () => {
    const path = `${tempFolder()}/b.qcow2`
    await qemu.imgOk('create', '-q', ...secret, '-f', 'qcow2', '-o', 'encrypt.format=aes,encrypt.key-secret=s', path, '1M')
    expect(await qemu.io(...secret, '--image-opts', '-c', 'write -P 0x77 64k 96k', spec(path))).toMatchObject({ code: 0 })
    await using image = await Qcow2Image.open(path, { readOnly: true, passphrase: 'pass word' })
    expect((await image.read(64 << 10, 96 << 10)).every((byte) => byte === 0x77)).toBe(true)
    writeFileSync(path, '')
  })
})
