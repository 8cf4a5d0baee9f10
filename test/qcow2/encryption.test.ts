import { statSync, writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { fault } from '../../src/block/fault.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { repairImage } from '../../src/qcow2/repair.ts'
import { keepOpen } from '../../src/testing/build-image.ts'
import { pattern } from '../suites/block-device.ts'
import { expectBytes } from '../support/bytes.ts'
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

/** Requests that fit no sector, many at once: none may overlap another of its batch. */
const request = fc.record({ kind: fc.constantFrom('write', 'write', 'writeZeroes', 'discard'), at: fc.nat(100_000), length: fc.oneof(fc.integer({ min: 1, max: 1500 }), fc.integer({ min: 1, max: 30_000 })), value: fc.integer({ min: 1, max: 255 }) })
const batches = fc.array(fc.array(request, { minLength: 1, maxLength: 12 }), { maxLength: 5 })

test.each(['luks', 'aes'] as const)('an image encrypted with %s takes requests of any length at any offset, many at once', async (format) => {
  const shapes = fc.constantFrom({ clusterSize: 512 }, { clusterSize: 4096 }, { clusterSize: 16384, extendedL2: true }, { clusterSize: 65536, preallocation: 'metadata' as const })
  await fc.assert(
    fc.asyncProperty(batches, shapes, fc.boolean(), fc.constantFrom(0, 3, 20), async (list, shape, overlay, delay) => {
      const over = overlay && !('preallocation' in shape)
      const host = new MemoryDevice(0, { growable: true })
      const base = pattern(100_352)
      const below = { backing: { file: 'base', format: 'raw' }, references: () => new MemoryDevice(base.slice()) }
      const slow = fault(keepOpen(host), ({ index }) => (delay > 0 && index % delay === 0 ? { kind: 'delay', until: new Promise((go) => setImmediate(go)) } : undefined))
      const image = await Qcow2Image.create(slow, { size: base.length, ...shape, ...(over ? below : {}), encryption: { format, passphrase: 'geheim', iterations: 1000 } })
      expect(image.limits.requestAlignment).toBe(1)
      const model = over ? base.slice() : new Uint8Array(base.length)
      for (const batch of list) {
        let end = 0
        const running: Promise<unknown>[] = []
        for (const { kind, at, length, value } of batch.map((each) => ({ ...each, at: each.at % model.length })).sort((a, b) => a.at - b.at)) {
          const offset = Math.max(at, end)
          const part = model.subarray(offset, offset + length)
          if (part.length === 0 || kind === 'discard') continue
          part.fill(kind === 'write' ? value : 0)
          running.push(kind === 'write' ? image.write(offset, part.slice()) : image.writeZeroes(offset, part.length))
          end = offset + part.length
        }
        await Promise.all(running)
        for (const { at, length } of batch) {
          const offset = at % model.length
          expectBytes(await image.read(offset, Math.min(length, model.length - offset)), model.subarray(offset, offset + length))
        }
      }
      await image.close()
      await using again = await Qcow2Image.open(host.bytes.slice(0, host.size), { readOnly: true, passphrase: 'geheim', backing: new MemoryDevice(over ? base : 0) })
      expectBytes(await again.read(0, model.length), model)
    }),
    { numRuns: 25 },
  )
})

test.each(['luks', 'aes'] as const)('VM state of any length in an image encrypted with %s reads back from anywhere', async (format) => {
  await fc.assert(
    fc.asyncProperty(fc.oneof(fc.integer({ min: 1, max: 300_000 }), fc.integer({ min: 1, max: 1000 })), fc.constantFrom(512, 4096, 65536), fc.array(fc.tuple(fc.nat(), fc.nat(5000)), { maxLength: 5 }), async (length, clusterSize, reads) => {
      const host = new MemoryDevice(0, { growable: true })
      const image = await Qcow2Image.create(keepOpen(host), { size: 1 << 20, clusterSize, encryption: { format, passphrase: 'geheim', iterations: 1000 } })
      const state = pattern(length)
      await image.write(1000, pattern(5000, 3))
      await image.snapshots.create({ name: 'a', vmState: [state.subarray(0, length >> 1), state.subarray(length >> 1)] })
      await image.close()
      expect(await checkImage(host)).toMatchObject({ corruptions: 0, leaks: 0 })
      await using again = await Qcow2Image.open(host.bytes.slice(0, host.size), { passphrase: 'geheim' })
      await using snapshot = await again.snapshots.open('a')
      expectBytes(await snapshot.vmState.read(0, length), state)
      expectBytes(await snapshot.read(1000, 5000), pattern(5000, 3))
      for (const [at, count] of reads) expectBytes(await snapshot.vmState.read(at % length, Math.min(count, length - (at % length))), state.subarray(at % length, (at % length) + count))
    }),
    { numRuns: 15 },
  )
})

test('legacy AES ties VM state to the size of the disk: one that changes meanwhile is an error, not wrong bytes', async () => {
  const image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 1 << 20, clusterSize: 512, encryption: { format: 'aes', passphrase: 'geheim' } })
  const writer = await image.snapshots.begin({ name: 'a' })
  await writer.write(pattern(10_000))
  await image.resize(2 << 20)
  await expect(writer.finish()).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
  await writer.close()
  expect(await image.check()).toMatchObject({ corruptions: 0, leaks: 0 })
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

  test.each(['luks', 'aes'] as const)('VM state saved here in an image encrypted with %s is what QEMU reads', async (format) => {
    const path = `${tempFolder()}/v.qcow2`
    const image = await Qcow2Image.create(path, { size: 1 << 20, encryption: { format, passphrase: 'pass word', iterations: 1000 } })
    await image.snapshots.create({ name: 'a', vmState: [new Uint8Array(71_680).fill(0x11), new Uint8Array(30_001).fill(0x22)] })
    await image.close()
    await qemu.imgOk('snapshot', ...secret, '--image-opts', '-a', 'a', spec(path))
    const commands = ['read -b -P 0x11 0 71680', 'read -b -P 0x22 71680 29696'].flatMap((command) => ['-c', command])
    expect(await qemu.io(...secret, '--image-opts', ...commands, spec(path))).toMatchObject({ code: 0, stdout: expect.not.stringMatching(/failed/) as string })
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
