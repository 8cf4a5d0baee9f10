import { createCipheriv } from 'node:crypto'
import { readFileSync, writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { legacyAesCipher } from '../../../src/codec/crypto/legacy-aes.ts'
import { createLuks, openLuks } from '../../../src/codec/crypto/luks.ts'
import { decodeLuksHeader, encodeLuksHeader } from '../../../src/codec/crypto/luks-header.ts'
import { aesSectorCipher } from '../../../src/codec/crypto/sector-cipher.ts'
import { describeWithQemu } from '../../support/qemu.ts'
import { tempFolder } from '../../support/temp.ts'

const pattern = (length: number): Uint8Array => Uint8Array.from({ length }, (_, i) => (i * 7 + (i >>> 8)) & 255)

/** The plain way: one cipher object of node:crypto for each sector. */
function reference(name: string, key: Uint8Array, data: Uint8Array, sector: number): Buffer {
  const parts: Buffer[] = []
  for (let at = 0; at < data.length; at += 512, sector++) {
    const iv = Buffer.alloc(16)
    iv.writeBigUInt64LE(BigInt(sector))
    const cipher = createCipheriv(name, key, iv).setAutoPadding(false)
    parts.push(cipher.update(data.subarray(at, at + 512)))
  }
  return Buffer.concat(parts)
}

describe('sector ciphers', () => {
  test.each([
    ['xts-plain64', 64, 'aes-256-xts'],
    ['xts-plain64', 32, 'aes-128-xts'],
    ['cbc-plain64', 32, 'aes-256-cbc'],
    ['cbc-plain64', 16, 'aes-128-cbc'],
  ])('%s with a key of %d bytes equals node:crypto, sector by sector', (mode, keyLength, name) => {
    const key = pattern(keyLength)
    const cipher = aesSectorCipher(mode, key)
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 9 }), fc.integer({ min: 0, max: 2 ** 44 }), fc.nat(3), fc.uint8Array(), (sectors, first, skew, noise) => {
        const plain = pattern(sectors * 512)
        plain.set(noise.subarray(0, 512))
        const data = new Uint8Array(plain.length + skew).subarray(skew)
        data.set(plain)
        cipher.encrypt(data, first)
        expect(Buffer.compare(data, reference(name, key, plain, first))).toBe(0)
        cipher.decrypt(data, first)
        expect(Buffer.compare(data, plain)).toBe(0)
      }),
    )
  })

  test('essiv and plain differ from plain64 and come back', () => {
    const plain = pattern(2048)
    const results = ['cbc-plain64', 'cbc-plain', 'cbc-essiv:sha256'].map((mode) => {
      const cipher = aesSectorCipher(mode, pattern(32))
      const data = plain.slice()
      cipher.encrypt(data, 2 ** 32 + 5)
      const encrypted = Buffer.from(data).toString('hex')
      cipher.decrypt(data, 2 ** 32 + 5)
      expect(data).toEqual(plain)
      return encrypted
    })
    expect(new Set(results).size).toBe(3)
  })

  test('what is not supported is refused', () => {
    expect(() => aesSectorCipher('xts-plain64', new Uint8Array(48))).toThrow(/48 bytes/)
    expect(() => aesSectorCipher('ctr-plain64', new Uint8Array(32))).toThrow(/ctr/)
    expect(() => aesSectorCipher('cbc-random', new Uint8Array(32))).toThrow(/random/)
  })
})

describe('LUKS1', () => {
  test('a created area opens with its passphrase and no other', async () => {
    const { area, cipher } = await createLuks('secret', { iterations: 1000 })
    expect(area.length).toBe(0x1f9000)
    const opened = await openLuks(area, 'secret')
    const data = pattern(1024)
    cipher.encrypt(data, 77)
    opened.decrypt(data, 77)
    expect(data).toEqual(pattern(1024))
    await expect(openLuks(area, 'Secret')).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  })

  test('the header survives decode and encode', async () => {
    const { area } = await createLuks('x', { iterations: 1000 })
    const header = decodeLuksHeader(area)
    expect(header).toMatchObject({ cipherName: 'aes', cipherMode: 'xts-plain64', hash: 'sha256', keyBytes: 64 })
    expect(Buffer.compare(encodeLuksHeader(header), area.subarray(0, 592))).toBe(0)
  })

  test('hostile headers are refused before they cost anything', async () => {
    const { area } = await createLuks('x', { iterations: 1000 })
    const change = (at: number, ...bytes: number[]): Uint8Array => {
      const copy = area.slice()
      copy.set(bytes, at)
      return copy
    }
    for (const damaged of [
      area.subarray(0, 591),
      change(0, 0),
      change(108, 0xff, 0xff, 0xff, 0xff),
      change(208, 1),
      change(212, 0, 0, 0, 0),
      change(208 + 40, 0xff, 0xff, 0xff, 0xff),
      change(208 + 44, 0xff, 0xff, 0xff, 0xff),
      change(164, 0, 0, 0, 0),
    ]) {
      await expect(openLuks(damaged, 'x')).rejects.toMatchObject({ code: 'ERR_FORMAT' })
    }
    for (const foreign of [change(7, 2), change(8, 0x78), change(72, 0x78), change(212, 0xff, 0xff, 0xff, 0xff)]) {
      await expect(openLuks(foreign, 'x')).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
    }
    expect(() => decodeLuksHeader(change(164, 0, 0, 0, 0), 4096)).toThrow('digest iterations is 0 (offset 4260)')
  })

  test('the iterations of all key slots together are bounded, before any is tried', async () => {
    const { area } = await createLuks('x', { iterations: 1000 })
    const header = decodeLuksHeader(area)
    const slot = header.slots[0]!
    const withSlots = (count: number, iterations: number, digestIterations = header.digestIterations): Uint8Array => {
      const slots = header.slots.map((each, i) => (i < count ? { ...slot, iterations } : each))
      const copy = area.slice()
      copy.set(encodeLuksHeader({ ...header, digestIterations, slots }))
      return copy
    }
    // each alone would be allowed: 2 hashes for an iteration of a 64-byte key, and the digest's for every slot
    for (const hostile of [withSlots(8, 7_000_000), withSlots(1, 50_000_000), withSlots(8, 1, 13_000_000)]) {
      await expect(openLuks(hostile, 'x')).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', message: expect.stringContaining('at most 100000000') as string })
    }
    await expect(openLuks(withSlots(8, 1000), 'y')).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  })

  test('the search for the key slot ends when it is aborted', async () => {
    const { area } = await createLuks('x', { iterations: 1000 })
    const header = decodeLuksHeader(area)
    const slots = header.slots.map((each, i) => (i < 2 ? { ...header.slots[0]!, iterations: 1000 } : each))
    area.set(encodeLuksHeader({ ...header, slots }))
    const abort = new AbortController()
    const opening = openLuks(area, 'y', { signal: abort.signal })
    abort.abort(new Error('enough'))
    await expect(opening).rejects.toThrow('enough')
    await expect(openLuks(area, 'x', { signal: abort.signal })).rejects.toThrow('enough')
  })
})

describeWithQemu('encryption', (qemu) => {
  const secret = ['--object', 'secret,id=s,data=pass word']

  async function createLuksVolume(options: string, path: string): Promise<void> {
    await qemu.imgOk('create', '-q', ...secret, '-f', 'luks', '-o', `key-secret=s,iter-time=10${options}`, path, '1M')
  }

  test('a LUKS volume made by qemu-img is decrypted', async () => {
    const path = `${tempFolder()}/a.luks`
    await createLuksVolume('', path)
    const spec = `driver=luks,key-secret=s,file.filename=${path}`
    const written = await qemu.io(...secret, '--image-opts', '-c', 'write -P 0xab 8192 4096', spec)
    expect(written).toMatchObject({ code: 0 })
    const bytes = readFileSync(path)
    const { payloadOffset } = decodeLuksHeader(bytes)
    const cipher = await openLuks(bytes.subarray(0, payloadOffset), 'pass word')
    const data = bytes.subarray(payloadOffset + 8192, payloadOffset + 12288)
    cipher.decrypt(data, 16)
    expect(Buffer.compare(data, Buffer.alloc(4096, 0xab))).toBe(0)
  })

  // qemu-img measures key derivation for two seconds each time, however few iterations are asked for
  const foreign: [string, string, string, string][] = [
    ['aes-128', 'cbc', 'plain64', 'sha1'],
    ['aes-256', 'cbc', 'essiv', 'sha512'],
    ['aes-128', 'xts', 'plain', 'sha256'],
  ]
  const long = process.env['QCOW2_LONG'] === '1'
  test.each(long ? foreign : foreign.slice(1, 2))('so is %s %s %s %s', async (algorithm, mode, iv, hash) => {
    const path = `${tempFolder()}/a.luks`
    const options = `,cipher-alg=${algorithm},cipher-mode=${mode},ivgen-alg=${iv},hash-alg=${hash}`
    await createLuksVolume(iv === 'essiv' ? `${options},ivgen-hash-alg=sha256` : options, path)
    const spec = `driver=luks,key-secret=s,file.filename=${path}`
    expect(await qemu.io(...secret, '--image-opts', '-c', 'write -P 0xcd 0 65536', spec)).toMatchObject({ code: 0 })
    const bytes = readFileSync(path)
    const { payloadOffset } = decodeLuksHeader(bytes)
    const cipher = await openLuks(bytes.subarray(0, payloadOffset), 'pass word')
    const data = bytes.subarray(payloadOffset, payloadOffset + 65536)
    cipher.decrypt(data, 0)
    expect(Buffer.compare(data, Buffer.alloc(65536, 0xcd))).toBe(0)
  })

  test('a LUKS volume made here is read by qemu-io', async () => {
    const path = `${tempFolder()}/b.luks`
    const { area, cipher } = await createLuks('pass word', { iterations: 1000 })
    const data = Buffer.alloc(65536, 0x5a)
    cipher.encrypt(data, 0)
    writeFileSync(path, Buffer.concat([area, data]))
    const spec = `driver=luks,key-secret=s,file.filename=${path}`
    const read = await qemu.io(...secret, '--image-opts', '-r', '-c', 'read -P 0x5a 0 65536', spec)
    expect(read).toMatchObject({ code: 0, stdout: expect.not.stringContaining('failed') as string })
  })

  test('legacy AES in a qcow2 image made by qemu-img', async () => {
    const path = `${tempFolder()}/c.qcow2`
    await qemu.imgOk('create', '-q', ...secret, '-f', 'qcow2', '-o', 'encrypt.format=aes,encrypt.key-secret=s', path, '1M')
    const spec = `driver=qcow2,encrypt.key-secret=s,file.filename=${path}`
    expect(await qemu.io(...secret, '--image-opts', '-c', 'write -P 0x77 65536 65536', spec)).toMatchObject({ code: 0 })
    const bytes = readFileSync(path)
    const l2 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40))) & 0xffffffffffff00n)
    const at = Number(bytes.readBigUInt64BE(l2 + 8) & 0xffffffffffff00n)
    const data = bytes.subarray(at, at + 65536)
    legacyAesCipher('pass word').decrypt(data, 128)
    expect(Buffer.compare(data, Buffer.alloc(65536, 0x77))).toBe(0)
  })
})
