/** Where images are made: what is a target's own content, what is another's, and what a failure leaves. */
import { execFileSync } from 'node:child_process'
import { existsSync, linkSync, readFileSync, readdirSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { describe, expect, test } from 'vitest'
import { MemoryDevice, openFile, pad, slice, type BlockDevice } from '../../src/block.ts'
import { record, Recording } from '../../src/block/record.ts'
import { Qcow2Error } from '../../src/core/errors.ts'
import { LuksImage } from '../../src/luks/luks-image.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { convertStreamToQcow2 } from '../../src/qcow2/convert-stream.ts'
import { convertToQcow2 } from '../../src/qcow2/convert.ts'
import { copyDevice } from '../../src/qcow2/copy.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import type { CreateOptions } from '../../src/qcow2/new-image.ts'
import { powerCut, type Survival } from '../../src/testing/power-cut.ts'
import { expectBytes } from '../support/bytes.ts'
import { openPaths } from '../support/descriptors.ts'
import { loopDevice } from '../support/loop-device.ts'
import { tempFolder } from '../support/temp.ts'

const MiB = 1 << 20
const codeOf = (task: Promise<unknown>): Promise<string> =>
  task.then(() => 'no error', (error: unknown) => (Qcow2Error.is(error) ? error.code : (error as Error).name))

/** A device of fixed size, full of another owner's bytes. */
const usedDevice = (size: number): MemoryDevice => new MemoryDevice(new Uint8Array(size).fill(0x5a))

async function expectZeroes(disk: BlockDevice): Promise<void> {
  for (let at = 0; at < disk.size; at += MiB) expectBytes(await disk.read(at, Math.min(MiB, disk.size - at)), new Uint8Array(Math.min(MiB, disk.size - at)))
}

describe('a new image on a device with content', () => {
  const shapes: [string, CreateOptions][] = [
    ['plain', { size: 4 * MiB }],
    ['many tables', { size: 64 * MiB, clusterSize: 512 }],
    ['metadata', { size: 4 * MiB, preallocation: 'metadata' }],
    ['full', { size: 4 * MiB, preallocation: 'full' }],
    ['subclusters', { size: 4 * MiB, extendedL2: true, preallocation: 'metadata' }],
    ['LUKS', { size: 4 * MiB, encryption: { format: 'luks', passphrase: 'p', iterations: 1000 } }],
    ['LUKS, preallocated', { size: 4 * MiB, preallocation: 'metadata', encryption: { format: 'luks', passphrase: 'p', iterations: 1000 } }],
    ['version 2', { size: 4 * MiB, version: 2 }],
    ['narrow counters', { size: 4 * MiB, refcountBits: 1 }],
  ]
  test.each(shapes)('%s: sound, and all zeroes', async (_name, options) => {
    for (const device of [usedDevice(16 * MiB), new MemoryDevice(new Uint8Array(16 * MiB).fill(0x5a), { growable: true })]) {
      const image = await Qcow2Image.create(slice(device, 0, device.size, { keepOpen: true }), options)
      await expectZeroes(image)
      await image.close()
      expect(await checkImage(device)).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 })
    }
  })

  test('an external data file on it shows nothing of it either', async () => {
    const data = usedDevice(8 * MiB)
    const image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 4 * MiB, dataFile: 'device', dataFileRaw: true, references: () => data })
    await expectZeroes(image)
    await image.close()
  })

  test('a device that is too small is refused, and keeps its content', async () => {
    const device = usedDevice(2 * MiB)
    expect(await codeOf(Qcow2Image.create(device, { size: 4 * MiB, preallocation: 'full' }))).toBe('ERR_NO_SPACE')
    expect(await codeOf(LuksImage.create(device, { size: 4 * MiB, passphrase: 'p', iterations: 1000 }))).toBe('ERR_NO_SPACE')
    expectBytes(await device.read(0, device.size), new Uint8Array(device.size).fill(0x5a))
  })
})

describe('block devices', () => {
  test('keep their size, and take what fits', async ({ skip }) => {
    const { path } = loopDevice(8 * MiB, skip)
    execFileSync('dd', ['if=/dev/urandom', `of=${path}`, 'bs=1M', 'count=8'], { stdio: 'ignore' })
    await (await Qcow2Image.create(path, { size: 1024 * MiB })).close()
    expect(await checkImage(path)).toMatchObject({ corruptions: 0, leaks: 0 })
    await using device = await openFile(path)
    await device.resize(8 * MiB)
    await expect(device.resize(9 * MiB)).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', message: expect.stringContaining(path) as string })
    expect(await codeOf(openFile(path, { create: 'w' }))).toBe('ERR_BUSY')
  })

  test('that were extended since they were opened have the room', async ({ skip }) => {
    const { path, grow } = loopDevice(8 * MiB, skip)
    const image = await Qcow2Image.create(path, { size: 64 * MiB })
    const bytes = new Uint8Array(MiB).fill(7)
    for (let i = 0; i < 7; i++) await image.write(i * MiB, bytes)
    expect(await codeOf(image.write(7 * MiB, new Uint8Array(2 * MiB).fill(8)))).toBe('ERR_NO_SPACE')
    grow(24 * MiB)
    await image.write(7 * MiB, new Uint8Array(2 * MiB).fill(8))
    await image.write(9 * MiB, bytes)
    await image.close()
    expect(await checkImage(path)).toMatchObject({ corruptions: 0, checkErrors: 0 })
  })
})

describe('writing into is not replacing', () => {
  test('what a larger target has after the end of the source stays', async () => {
    const source = new MemoryDevice(new Uint8Array(MiB).fill(1))
    const path = join(tempFolder(), 'target')
    writeFileSync(path, new Uint8Array(3 * MiB).fill(9))
    await using file = await openFile(path)
    for (const target of [file, new MemoryDevice(new Uint8Array(3 * MiB).fill(9), { growable: true })]) {
      await copyDevice(source, target)
      expect(target.size).toBe(3 * MiB)
      expectBytes(await target.read(0, MiB), new Uint8Array(MiB).fill(1))
      expectBytes(await target.read(MiB, 2 * MiB), new Uint8Array(2 * MiB).fill(9))
    }
  })

  test.each([65536 + 512, 1000, 4096, 5000])('a direct target ends where the source of %i bytes does', async (size) => {
    const source = new MemoryDevice(new Uint8Array(size).fill(3))
    const path = join(tempFolder(), 'target')
    const padded = pad(await openFile(path, { create: 'wx', direct: true }))
    await copyDevice(source, padded)
    expect(statSync(path).size).toBe(size)
    await padded.close()
    await using bare = await openFile(path, { create: 'w', direct: true })
    await copyDevice(source, bare)
    expect(statSync(path).size).toBe(size)
    expect(new Set(readFileSync(path))).toEqual(new Set([3]))
  })
})

describe('a source is not its own target', () => {
  async function chain(): Promise<{ folder: string; base: string; top: string; data: string; before: Map<string, Buffer> }> {
    const folder = tempFolder()
    const [base, top, data] = [join(folder, 'base.qcow2'), join(folder, 'top.qcow2'), join(folder, 'data.raw')]
    const image = await Qcow2Image.create(base, { size: MiB, dataFile: data })
    await image.write(0, new Uint8Array(MiB).fill(5))
    await image.close()
    await (await Qcow2Image.create(top, { backing: { file: 'base.qcow2', format: 'qcow2' } })).close()
    linkSync(base, join(folder, 'hard'))
    symlinkSync('data.raw', join(folder, 'soft'))
    return { folder, base, top, data, before: new Map([base, top, data].map((path) => [path, readFileSync(path)])) }
  }

  test.each(['base.qcow2', 'top.qcow2', 'data.raw', 'hard', 'soft'])('convert, copy and create refuse %s', async (name) => {
    const { folder, top, before } = await chain()
    const target = join(folder, name)
    {
      await using source = await Qcow2Image.open(top, { readOnly: true })
      for (const disk of [source, slice(source, 0, 65536, { keepOpen: true })]) {
        expect(await codeOf(openFile(target, { create: 'w' }))).toBe('ERR_BUSY')
        expect(await codeOf(Qcow2Image.create(target, { size: MiB }))).toBe('ERR_BUSY')
        expect(await codeOf(LuksImage.create(target, { size: MiB, passphrase: 'p', iterations: 1000 }))).toBe('ERR_BUSY')
        await using open = await openFile(target)
        expect(await codeOf(copyDevice(disk, open))).toBe('ERR_BUSY')
        expect(await codeOf(convertToQcow2(disk, open))).toBe('ERR_BUSY')
      }
    }
    // not open: a new image on top of its own chain
    const backing = { file: 'top.qcow2', format: 'qcow2' }
    const creations: [string, CreateOptions][] = [
      [target, { size: MiB, backing }],
      [target, { backing: { file: top, format: 'qcow2' } }],
      [target, { size: MiB, backing, references: () => new MemoryDevice(MiB) }],
      [join(folder, 'new'), { size: MiB, backing: { file: top, format: 'qcow2' }, dataFile: target }],
    ]
    for (const [path, options] of creations) expect(['ERR_BUSY', 'ERR_FORMAT']).toContain(await codeOf(Qcow2Image.create(path, options)))
    for (const [path, content] of before) expect(readFileSync(path).equals(content), path).toBe(true)
    expect(readdirSync(folder).sort()).toEqual(['base.qcow2', 'data.raw', 'hard', 'soft', 'top.qcow2'])
  })

  test('a data file has one writer: not an image and a second one, not another image, not itself', async () => {
    const { folder, base, data } = await chain()
    await using image = await Qcow2Image.open(base, { references: 'any' })
    expect(image.readOnly).toBe(false)
    const other = join(folder, 'other.qcow2')
    expect(await codeOf(Qcow2Image.create(other, { size: MiB, dataFile: data }))).toBe('ERR_BUSY')
    expect(await codeOf(Qcow2Image.open(data))).toBe('ERR_BUSY')
    expect(existsSync(other)).toBe(false)
  })
})

describe('a conversion that fails', () => {
  test('leaves nothing, so that it can be tried again', async () => {
    const folder = tempFolder()
    const [raw, target] = [join(folder, 'disk.raw'), join(folder, 'o.qcow2')]
    writeFileSync(raw, new Uint8Array(MiB).fill(6))
    const before = openPaths()
    expect(await codeOf(convertToQcow2(undefined as never, target))).toBe('TypeError')
    expect(await codeOf(convertToQcow2(new MemoryDevice(1), target, { clusterSize: 7 }))).toBe('RangeError')
    expect(await codeOf(convertToQcow2(join(folder, 'none'), target))).toBe('ERR_NOT_FOUND')
    const abort = new AbortController()
    const chunks = Readable.from([Buffer.alloc(MiB, 1), Buffer.alloc(MiB, 2)])
    await expect(convertStreamToQcow2(chunks, target, { signal: abort.signal, onProgress: () => abort.abort(new Error('enough')) })).rejects.toThrow('enough')
    expect(await codeOf(convertStreamToQcow2(Readable.from(['text', 'text']), target))).toBe('TypeError')
    expect(readdirSync(folder)).toEqual(['disk.raw'])
    await convertToQcow2(raw, target)
    await using image = await Qcow2Image.open(target, { readOnly: true })
    expectBytes(await image.read(0, MiB), new Uint8Array(MiB).fill(6))
    await image.close()
    expect(await codeOf(convertToQcow2(target, join(folder, 'p.qcow2')))).toBe('ERR_UNSUPPORTED')
    expect(readdirSync(folder).sort()).toEqual(['disk.raw', 'o.qcow2'])
    expect(openPaths()).toEqual(before)
  })

  test('ends the stream it was given, read or not', async () => {
    const path = join(tempFolder(), 'there')
    writeFileSync(path, '')
    const stream = Readable.from([Buffer.alloc(10)])
    expect(await codeOf(convertStreamToQcow2(stream, path))).toBe('ERR_EXISTS')
    expect(stream.destroyed).toBe(true)
    let cancelled = false
    const web = new ReadableStream<Uint8Array>({ cancel: () => void (cancelled = true) })
    expect(await codeOf(convertStreamToQcow2(web, path))).toBe('ERR_EXISTS')
    expect(cancelled).toBe(true)
  })
})

test('an image that exists is replaced whole: a failed create leaves it, links and other names keep their meaning', async () => {
  const folder = tempFolder()
  const [path, link, hard] = [join(folder, 'a.qcow2'), join(folder, 'link'), join(folder, 'hard')]
  const image = await Qcow2Image.create(path, { size: MiB })
  await image.write(0, new Uint8Array(512).fill(1))
  await image.close()
  const before = readFileSync(path)
  linkSync(path, hard)
  symlinkSync('a.qcow2', link)
  const failing: CreateOptions[] = [
    { size: MiB, backing: { file: 'none', format: 'qcow2' } },
    { size: MiB, dataFile: join(folder, 'no-folder/data') },
    { size: MiB, signal: AbortSignal.abort() },
  ]
  for (const options of failing) await expect(Qcow2Image.create(link, options)).rejects.toThrow()
  expect(readFileSync(path).equals(before)).toBe(true)
  await (await Qcow2Image.create(link, { size: 2 * MiB })).close()
  await using made = await Qcow2Image.open(path, { readOnly: true })
  expect(made.size).toBe(2 * MiB)
  expect(readFileSync(hard).equals(before)).toBe(true)
  expect(readdirSync(folder).sort()).toEqual(['a.qcow2', 'hard', 'link'])
})

test.each(['empty', 'fixed', 'growable'] as const)('the power goes while an image is made in a device (%s, with an older image): none is there, the old one or a whole new one', async (kind) => {
  const old = new MemoryDevice(0, { growable: true })
  const earlier = await Qcow2Image.create(old, { size: 4 * MiB, clusterSize: 512 })
  await earlier.write(MiB, new Uint8Array(4096).fill(7))
  await earlier.flush()
  await old.resize(64 << 10)
  const before = kind === 'empty' ? new Uint8Array(0) : await old.read(0, old.size)
  const recording = new Recording()
  const device = new MemoryDevice(before.slice(), { growable: kind !== 'fixed' })
  const image = await Qcow2Image.create(record(device, recording), { size: 4 * MiB, clusterSize: 4096 })
  const created = recording.events
  await image.close()
  const survivals: Survival[] = [() => false, () => true, (_, sector) => sector % 2 === 0, (_, sector) => sector % 2 === 1, ({ submitted }) => submitted % 2 === 0, ({ submitted }) => submitted % 3 === 0]
  let whole = 0
  for (let at = 0; at <= recording.events; at++) {
    for (const survives of survivals) {
      const left = powerCut(before, recording, { at, survives })
      const isImage = left.length > 4 && left[0] === 0x51 && left[1] === 0x46 && left[2] === 0x49
      expect(at < created || isImage, 'durable when it is made').toBe(true)
      if (!isImage) continue
      whole++
      expect(await checkImage(new MemoryDevice(left)), `cut at ${at}`).toMatchObject({ corruptions: 0, checkErrors: 0 })
    }
  }
  expect(whole).toBeGreaterThan(0)
})
