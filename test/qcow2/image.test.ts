/** Rules of the engine that an operation sequence does not show: policies, states, damage, concurrency. */
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { open, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { describe, expect, test } from 'vitest'
import type { BlockDevice } from '../../src/block/device.ts'
import { fault } from '../../src/block/fault.ts'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { slice } from '../../src/block/slice.ts'
import type { Source } from '../../src/block/source.ts'
import { trace, type TracedRequest } from '../../src/block/trace.ts'
import { allocateAligned } from '../../src/block/slab.ts'
import { Qcow2Error } from '../../src/core/errors.ts'
import { amendImage } from '../../src/qcow2/amend.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { convertToQcow2 } from '../../src/qcow2/convert.ts'
import type { CheckReport } from '../../src/qcow2/check-report.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import type { CreateOptions } from '../../src/qcow2/new-image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { repairImage } from '../../src/qcow2/repair.ts'
import { codeOf } from '../support/code.ts'
import { qemus } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const KiB = 1024
const MiB = 1 << 20

/** A memory device that survives `close`, with its bytes. */
async function inMemory(options: CreateOptions, fill: (image: Qcow2Image) => Promise<void> = () => Promise.resolve()): Promise<Uint8Array> {
  const device = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(device, options)
  await fill(image)
  await image.close()
  return device.bytes
}

const again = (bytes: Uint8Array): MemoryDevice => new MemoryDevice(bytes, { growable: true })
const patch = (bytes: Uint8Array, offset: number, hex: string): Uint8Array => {
  bytes.set(Buffer.from(hex, 'hex'), offset)
  return bytes
}

test('facts and check of a file by its path, which is closed again', async () => {
  const path = join(tempFolder(), 'disk.qcow2')
  await (await Qcow2Image.create(path, { size: MiB })).close()
  expect(await readImageInfo(path)).toMatchObject({ version: 3, virtualSize: MiB })
  expect(await checkImage(path)).toMatchObject({ corruptions: 0, leaks: 0 })
  expect(await repairImage(path, { repair: 'all' })).toMatchObject({ corruptionsFixed: 0, leaksFixed: 0 })
  expect(await codeOf(readImageInfo(join(path, 'none')))).toBe('ERR_IO')
  expect(await codeOf(repairImage(new MemoryDevice(await readFile(path), { readOnly: true }), { repair: 'all' }))).toBe('ERR_READ_ONLY')
})

describe('references', () => {
  const overlay = async (folder: string, file: string, format = 'raw'): Promise<string> => {
    const path = join(folder, 'overlay.qcow2')
    await (await Qcow2Image.create(path, { size: MiB, references: 'none', backing: { file, format } }).catch(() => create(path, file, format))).close()
    return path
  }
  const create = async (path: string, file: string, format: string): Promise<Qcow2Image> =>
    Qcow2Image.create(path, { size: MiB, backing: { file, format }, references: () => new MemoryDevice(MiB) })

  test('by default only files in the tree of the image are opened', async () => {
    const folder = tempFolder()
    const inside = join(folder, 'images')
    mkdirSync(join(inside, 'base'), { recursive: true })
    writeFileSync(join(inside, 'base', 'disk.raw'), new Uint8Array(MiB).fill(1))
    writeFileSync(join(folder, 'secret.raw'), new Uint8Array(MiB).fill(2))
    symlinkSync(join(folder, 'secret.raw'), join(inside, 'link.raw'))
    const allowed = await Qcow2Image.open(await overlay(inside, 'base/disk.raw'))
    expect((await allowed.read(0, 1))[0]).toBe(1)
    await allowed.close()
    for (const outside of ['../secret.raw', join(folder, 'secret.raw'), 'link.raw', 'json:{"driver":"raw"}', 'nbd://host/x']) {
      const path = await overlay(inside, outside)
      expect([outside, await codeOf(Qcow2Image.open(path))]).toEqual([outside, 'ERR_UNSUPPORTED'])
    }
    const any = await Qcow2Image.open(await overlay(inside, '../secret.raw'), { references: 'any' })
    expect((await any.read(0, 1))[0]).toBe(2)
    await any.close()
    expect(await codeOf(Qcow2Image.open(await overlay(inside, 'missing.raw')))).toBe('ERR_NOT_FOUND')
  })

  test('a decision of the caller sees the reference and may give a device', async () => {
    const path = await overlay(tempFolder(), 'nbd://host/export')
    const seen: unknown[] = []
    const image = await Qcow2Image.open(path, {
      references: (reference) => {
        seen.push([reference.kind, reference.name, reference.format, reference.path])
        return new MemoryDevice(new Uint8Array(MiB).fill(9))
      },
    })
    expect(seen).toEqual([['backing file', 'nbd://host/export', 'raw', undefined]])
    expect((await image.read(MiB - 1, 1))[0]).toBe(9)
    await image.close()
  })

  test('a loop of backing files is found', async () => {
    const folder = tempFolder()
    const open = (): BlockDevice => new MemoryDevice(MiB)
    for (const [name, below] of [['a', 'b'], ['b', 'c'], ['c', 'd']] as const) {
      await (await Qcow2Image.create(join(folder, name), { size: MiB, backing: { file: below, format: 'qcow2' }, references: open })).close()
    }
    // no function of ours writes such a name
    const last = readFileSync(join(folder, 'c'))
    last.write('a', Number(last.readBigUInt64BE(8)))
    writeFileSync(join(folder, 'c'), last)
    await expect(Qcow2Image.open(join(folder, 'a'))).rejects.toThrow('loops')
  })

  test('a new image cannot take the place of a file below it, by whatever name', async () => {
    const folder = tempFolder()
    const base = join(folder, 'base')
    await (await Qcow2Image.create(base, { size: MiB })).close()
    await (await Qcow2Image.create(join(folder, 'middle'), { backing: { file: 'base', format: 'qcow2' } })).close()
    symlinkSync(base, join(folder, 'link'))
    const before = readFileSync(base)
    for (const name of ['base', 'link']) {
      await expect(Qcow2Image.create(join(folder, name), { backing: { file: 'middle', format: 'qcow2' } })).rejects.toThrow('loops')
    }
    expect(readFileSync(base).equals(before)).toBe(true)
  })

  test('the format of a backing file is never guessed unless asked', async () => {
    const folder = tempFolder()
    writeFileSync(join(folder, 'base'), new Uint8Array(MiB).fill(5))
    const path = await overlay(folder, 'base')
    const bytes = readFileSync(path)
    patch(bytes, 112, '00000000') // no backing format
    writeFileSync(path, bytes)
    expect(await codeOf(Qcow2Image.open(path))).toBe('ERR_UNSUPPORTED')
    await using image = await Qcow2Image.open(path, { probeBackingFormat: true })
    expect((await image.read(0, 1))[0]).toBe(5)
  })

  test('a backing file that is no image is named', async () => {
    const folder = tempFolder()
    writeFileSync(join(folder, 'base'), 'junk'.repeat(1000))
    const failure = Qcow2Image.create(join(folder, 'overlay.qcow2'), { size: MiB, backing: { file: 'base', format: 'qcow2' } })
    await expect(failure).rejects.toThrow(/^backing file base: header: not a qcow2 image/)
    await expect(failure).rejects.toMatchObject({ code: 'ERR_FORMAT', structure: 'header', offset: 0 })
  })

  test('an overlay may leave its size to its backing file', async () => {
    const folder = tempFolder()
    writeFileSync(join(folder, 'base.raw'), new Uint8Array(MiB + 512).fill(5))
    await using image = await Qcow2Image.create(join(folder, 'overlay.qcow2'), { backing: { file: 'base.raw', format: 'raw' } })
    expect(image.size).toBe(MiB + 512)
    expect((await image.read(MiB, 1))[0]).toBe(5)
    expect(await codeOf(Qcow2Image.create(join(folder, 'other.qcow2'), {}))).toBe('TypeError')
  })

  test('options that do not exist are refused before anything is made or opened', async () => {
    const path = join(tempFolder(), 'disk.qcow2')
    await expect(Qcow2Image.create(path, { size: MiB, clustersize: 4096 } as CreateOptions)).rejects.toThrow("Qcow2Image.create: there is no option 'clustersize'")
    await expect(openFile(path)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    await (await Qcow2Image.create(path, { size: MiB })).close()
    await expect(Qcow2Image.open(path, { readonly: true } as object)).rejects.toThrow(TypeError)
    await expect(convertToQcow2(new MemoryDevice(512), `${path}.copy`, { compress: true } as object)).rejects.toThrow(TypeError)
    await expect(amendImage(path, { refcountbits: 8 } as object)).rejects.toThrow(TypeError)
    await expect(repairImage(path, { repair: 'leak' as 'leaks' })).rejects.toThrow("repair must be 'leaks' or 'all', not \"leak\"")
  })

  test('a deep chain reads through, and tells where', async () => {
    const folder = tempFolder()
    let below: { file: string; format: string } | undefined
    for (let depth = 0; depth < 6; depth++) {
      const name = `${depth}.qcow2`
      const image = await Qcow2Image.create(join(folder, name), { size: MiB, clusterSize: 4096 << (depth % 3), ...(below === undefined ? {} : { backing: below }) })
      await image.write(depth * 64 * KiB, new Uint8Array(64 * KiB).fill(depth + 1))
      await image.close()
      below = { file: name, format: 'qcow2' }
    }
    await using top = await Qcow2Image.open(join(folder, '5.qcow2'))
    const extents: [number, number, number, boolean][] = []
    for await (const { start, length, depth, present } of top.map()) extents.push([start / KiB, length / KiB, depth, present])
    expect(extents).toEqual([[0, 64, 5, true], [64, 64, 4, true], [128, 64, 3, true], [192, 64, 2, true], [256, 64, 1, true], [320, 64, 0, true], [384, 640, 5, false]])
    expect([...(await top.read(64 * KiB - 1, 2))]).toEqual([1, 2])
  })
})

describe('what an image says of itself', () => {
  test('an unknown incompatible feature is refused, an unknown compatible one kept, unknown autoclear bits cleared before the first write', async () => {
    const bytes = await inMemory({ size: MiB })
    expect(await codeOf(Qcow2Image.open(again(patch(bytes.slice(), 72, '0000010000000000'))))).toBe('ERR_UNSUPPORTED')
    const marked = patch(patch(bytes.slice(), 80, '0800000000000000'), 88, '4000000000000000')
    const device = again(marked)
    const image = await Qcow2Image.open(device)
    await image.read(0, 512)
    expect(Buffer.from(device.bytes.subarray(80, 96)).toString('hex')).toBe('08000000000000004000000000000000')
    await image.write(0, new Uint8Array(1))
    expect(Buffer.from(device.bytes.subarray(80, 96)).toString('hex')).toBe('08000000000000000000000000000000')
    await image.close()
  })

  test('unknown extensions, longer headers and unknown snapshot data survive a rewrite', async () => {
    const bytes = await inMemory({ size: MiB, clusterSize: 4096 })
    // a header of 120 bytes with a field nobody knows, then an extension nobody knows
    patch(bytes, 100, '00000078')
    patch(bytes, 112, '1122334455667788' + '0badcafe00000003616263000000000000000000')
    const device = again(bytes)
    const image = await Qcow2Image.open(device)
    await image.snapshots.create({ name: 'one' })
    await image.close()
    expect(Buffer.from(device.bytes.subarray(100, 136)).toString('hex')).toBe('000000780000000000000000' + '1122334455667788' + '0badcafe0000000361626300' + '00000000')
  })

  test('the corrupt bit is honoured, the dirty bit repaired', async () => {
    const bytes = await inMemory({ size: MiB }, (image) => image.write(0, new Uint8Array(100_000).fill(3)))
    const corrupt = patch(bytes.slice(), 72, '0000000000000002')
    expect(await codeOf(Qcow2Image.open(again(corrupt)))).toBe('ERR_CORRUPT')
    const readable = await Qcow2Image.open(again(corrupt), { readOnly: true })
    expect((await readable.read(0, 1))[0]).toBe(3)
    await readable.close()

    const dirty = patch(bytes.slice(), 72, '0000000000000001')
    patch(dirty, 0x20000 + 8, '00000000') // two clusters the last writer did not count
    const device = again(dirty)
    const reports: CheckReport[] = []
    const image = await Qcow2Image.open(device, { onRepair: (report) => reports.push(report) })
    // the old refcount table and block were given up
    expect(reports).toMatchObject([{ corruptionsFixed: 2, corruptions: 0, freedRefcountClusters: [0x10000, 0x20000] }])
    expect((await image.read(99_999, 1))[0]).toBe(3)
    await image.write(200_000, new Uint8Array(10))
    await image.close()
    expect(device.bytes[79]).toBe(0)
    expect(await checkImage(again(device.bytes))).toMatchObject({ corruptions: 0, leaks: 0 })
  })

  test('an encrypted image is refused, never read as it is', async () => {
    const bytes = await inMemory({ size: MiB })
    expect(await codeOf(Qcow2Image.open(again(patch(bytes, 32, '00000001')), { readOnly: true }))).toBe('ERR_UNSUPPORTED')
  })

  test('a write that would hit metadata is stopped, and the image marked', async () => {
    const bytes = await inMemory({ size: MiB }, (image) => image.write(0, new Uint8Array(100).fill(3)))
    const l2 = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0x30004)
    patch(bytes, l2, '8000000000010000') // the refcount table
    const device = again(bytes)
    const image = await Qcow2Image.open(device)
    expect(await codeOf(image.write(0, new Uint8Array(10)))).toBe('ERR_CORRUPT')
    expect(await codeOf(image.write(500_000, new Uint8Array(10)))).toBe('ERR_CORRUPT')
    await image.close()
    expect(device.bytes[79]).toBe(2)
    expect(Buffer.from(device.bytes.subarray(0x10000, 0x10008)).toString('hex')).toBe('0000000000020000')
  })

  test('a cluster that metadata uses but nobody counts is not given out', async () => {
    const bytes = await inMemory({ size: MiB })
    patch(bytes, 0x20002, '0000') // the refcount table itself
    const device = again(bytes)
    const image = await Qcow2Image.open(device)
    expect(await codeOf(image.write(0, new Uint8Array(10)))).toBe('ERR_CORRUPT')
    await image.close()
    expect(device.bytes[79]).toBe(2)
  })

  test('damaged entries are errors with a place, in bounded time', async () => {
    const bytes = await inMemory({ size: MiB }, (image) => image.write(0, new Uint8Array(100).fill(3)))
    const l2 = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0x30004)
    for (const entry of ['8000000000050200', '80ffffffffff0000', '4000000000000000', '7fffffffffffffff']) {
      const image = await Qcow2Image.open(again(patch(bytes.slice(), l2, entry)), { readOnly: true })
      expect([entry, await codeOf(image.read(0, 10))]).toEqual([entry, 'ERR_CORRUPT'])
    }
    const device = again(patch(bytes.slice(), l2, '8000000000050200'))
    const writable = await Qcow2Image.open(device)
    expect(await codeOf(writable.read(0, 10))).toBe('ERR_CORRUPT')
    expect(await codeOf(writable.write(500_000, new Uint8Array(1)))).toBe('ERR_CORRUPT')
    await writable.close()
    expect(device.bytes[79]).toBe(2)
    const far = await Qcow2Image.open(again(patch(bytes.slice(), l2, '8000100000000000')), { readOnly: true })
    expect((await far.read(0, 1))[0]).toBe(0)
    const table = await Qcow2Image.open(again(patch(bytes.slice(), 0x30000, '8000000000040200')), { readOnly: true })
    expect(await codeOf(table.read(0, 10))).toBe('ERR_CORRUPT')
  })

  test('damage in a backing file is not damage of the overlay', async () => {
    const base = await inMemory({ size: MiB }, (image) => image.write(0, new Uint8Array(100).fill(3)))
    patch(base, new DataView(base.buffer, base.byteOffset).getUint32(0x30004), '8000000000050200')
    const device = new MemoryDevice(0, { growable: true })
    const backing = { file: 'base', format: 'qcow2' }
    const references = async (): Promise<BlockDevice> => Qcow2Image.open(again(base), { readOnly: true })
    const image = await Qcow2Image.create(device, { size: MiB, backing, references })
    await expect(image.read(0, 10)).rejects.toThrow(/^backing file: L2 table/)
    expect(await codeOf(image.read(0, 10))).toBe('ERR_CORRUPT')
    await image.write(500_000, new Uint8Array(65536).fill(4))
    expect(await codeOf(image.write(10, new Uint8Array(10)))).toBe('ERR_CORRUPT')
    await image.close()
    expect(device.bytes[79]).toBe(0)
  })

  test('what a stale bitmaps extension names is not metadata', async () => {
    const bytes = await inMemory({ size: 4 * MiB }, (image) => image.bitmaps.add({ name: 'b' }))
    patch(bytes, 88, '0000000000000000')
    const device = again(bytes)
    await using image = await Qcow2Image.open(device)
    expect((await image.check({ repair: 'leaks' })).leaksFixed).toBeGreaterThan(0)
    await image.write(0, new Uint8Array(4 * MiB).fill(3))
    await image.flush()
    expect(device.bytes[79]).toBe(0)
    expect(await checkImage(again(device.bytes.slice()))).toMatchObject({ corruptions: 0 })
  })

  test('a new refcount block that could not be counted is not given out', async () => {
    const device = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(device, { size: MiB, clusterSize: 512, refcountBits: 64 })
    const { refcounts, refcountBlocks } = image.engine
    const [adjust, create] = [refcounts.adjust.bind(refcounts), refcountBlocks.create.bind(refcountBlocks)]
    let fails = false
    refcountBlocks.create = (...args) => {
      fails = true
      create(...args)
    }
    refcounts.adjust = async (...args) => {
      if (!fails) return adjust(...args)
      fails = false
      throw new Qcow2Error('ERR_IO', 'no counter')
    }
    const codes = new Set<string>()
    for (let at = 0; at < 64 * KiB; at += 512) codes.add(await codeOf(image.write(at, new Uint8Array(512).fill(1))))
    expect([...codes]).toEqual(['no error', 'ERR_IO'])
    await codeOf(image.close())
    expect(await checkImage(again(device.bytes.slice()))).toMatchObject({ overlaps: 0 })
  })

  test('repairing an open image', async () => {
    const bytes = new Uint8Array(8 * 65536)
    bytes.set(await inMemory({ size: MiB }, (image) => image.write(0, new Uint8Array(100).fill(3))))
    patch(bytes, 0x20000 + 2 * 6, '0001') // a leaked cluster
    await using image = await Qcow2Image.open(again(bytes))
    expect(await image.check()).toMatchObject({ leaks: 1, corruptions: 0 })
    expect(await image.check({ repair: 'leaks' })).toMatchObject({ leaks: 0, leaksFixed: 1 })
    await image.write(300_000, new Uint8Array(100_000).fill(4))
    await image.flush()
    expect(await image.check()).toMatchObject({ leaks: 0, corruptions: 0 })
    expect((await image.read(0, 1))[0]).toBe(3)
  })
})

describe('one file', () => {
  test('has one image that writes in this process; readers are let in', async () => {
    const path = join(tempFolder(), 'disk.qcow2')
    const other = join(tempFolder(), 'link.qcow2')
    const image = await Qcow2Image.create(path, { size: MiB })
    symlinkSync(path, other)
    expect(await codeOf(Qcow2Image.open(other))).toBe('ERR_BUSY')
    expect(await codeOf(Qcow2Image.create(path, { size: MiB }))).toBe('ERR_BUSY')
    for (const file of [other, pathToFileURL(path), await open(path, 'r+')]) expect(await codeOf(openFile(file))).toBe('ERR_BUSY')
    const sources: Exclude<Source, string>[] = [
      pathToFileURL(path),
      await open(path, 'r+'),
      await openFile(path, { locking: false }),
      await openFile(await open(path, 'r+'), { locking: false }),
      trace(fault(await openFile(other, { direct: true, locking: false }).catch(() => openFile(other, { locking: false })), () => undefined), []),
    ]
    for (const [index, source] of sources.entries()) {
      expect([index, await codeOf(Qcow2Image.open(source))]).toEqual([index, 'ERR_BUSY'])
      if ('readInto' in source) expect([index, await codeOf(Qcow2Image.create(source, { size: MiB }))]).toEqual([index, 'ERR_BUSY'])
      if ('readInto' in source) await source.close()
    }
    await (await Qcow2Image.open(other, { readOnly: true })).close()
    await image.write(0, new Uint8Array(10).fill(1))
    await image.close()
    await using reopened = await Qcow2Image.open(path)
    expect((await reopened.read(0, 1))[0]).toBe(1)
  })

  test('holds an image in each of its parts', async () => {
    const file = await openFile(join(tempFolder(), 'parts'), { create: 'w' })
    await file.resize(2 * MiB)
    const parts = [0, MiB].map((offset) => slice(file, offset, MiB, { keepOpen: true }))
    const images = await Promise.all(parts.map((part) => Qcow2Image.create(part, { size: 128 * KiB })))
    for (const [index, image] of images.entries()) await image.write(0, new Uint8Array(10).fill(1 + index))
    for (const [index, image] of images.entries()) expect((await image.read(0, 1))[0]).toBe(1 + index)
    for (const image of images) await image.close()
    await file.close()
  })

  test('is free again after opening or closing it failed', async () => {
    const path = join(tempFolder(), 'disk.qcow2')
    writeFileSync(path, new Uint8Array(4096))
    for (let i = 0; i < 2; i++) expect(await codeOf(Qcow2Image.open(path))).toBe('ERR_FORMAT')
    const image = await Qcow2Image.create(path, { size: MiB })
    await image.write(0, new Uint8Array(512).fill(1))
    image.engine.flush = () => Promise.reject(new Qcow2Error('ERR_IO', 'no flush'))
    expect(await codeOf(image.close())).toBe('ERR_IO')
    await (await Qcow2Image.open(path)).close()
  })
})

describe('requests', () => {
  test('allocating writes to one cluster do not lose each other', async () => {
    await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 4 * MiB })
    await Promise.all(Array.from({ length: 1000 }, (_, i) => image.write(i * 1000, new Uint8Array(1000).fill(i % 251))))
    const content = await image.read(0, 1_000_000)
    for (let i = 0; i < 1000; i++) expect([content[i * 1000], content[i * 1000 + 999]]).toEqual([i % 251, i % 251])
  })

  test('a sequential write is one host request for each run, and whole clusters read nothing', async () => {
    const log: TracedRequest[] = []
    const image = await Qcow2Image.create(trace(new MemoryDevice(0, { growable: true }), log), { size: 16 * MiB })
    await image.write(0, new Uint8Array(65536))
    log.length = 0
    await image.write(65536, new Uint8Array(4 * MiB).fill(1))
    const requests = log.map((event) => [event.operation, event.offset, event.length])
    expect(requests).toEqual([['write', expect.any(Number), 4 * MiB]])
    log.length = 0
    expect(Buffer.compare(await image.read(65536, 4 * MiB), Buffer.alloc(4 * MiB, 1))).toBe(0)
    expect(log.map((event) => [event.operation, event.length])).toEqual([['read', 4 * MiB]])
    await image.close()
  })

  test('a read that began before a cluster was freed still gets its bytes', async () => {
    const device = new MemoryDevice(0, { growable: true })
    let hold: Promise<void> | undefined
    const slow = new Proxy(device, {
      get(target, key) {
        if (key === 'readInto') {
          return async (offset: number, bytes: Uint8Array) => {
            await hold
            return target.readInto(offset, bytes)
          }
        }
        const value: unknown = Reflect.get(target, key, target)
        return typeof value === 'function' ? (value as () => unknown).bind(target) : value
      },
    })
    const image = await Qcow2Image.create(slow, { size: 4 * MiB })
    await image.write(0, new Uint8Array(65536).fill(1))
    await image.flush()
    let free!: () => void
    hold = new Promise((resolve) => (free = resolve))
    const reading = image.read(0, 65536)
    await image.discard(0, 65536)
    await image.flush()
    for (let i = 1; i < 20; i++) await image.write(i * 65536, new Uint8Array(65536).fill(2))
    free()
    expect(new Set(await reading)).toEqual(new Set([1]))
    hold = undefined
    await image.close()
  })

  test('freed clusters are found again', async () => {
    const device = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(device, { size: 64 * MiB })
    for (let round = 0; round < 10; round++) {
      await image.write(0, new Uint8Array(8 * MiB).fill(round))
      await image.discard(0, 8 * MiB)
      await image.flush()
    }
    await image.close()
    expect(device.size).toBeLessThan(18 * MiB)
  })

  test('narrow metadata caches work, and direct I/O', async () => {
    const file = join(tempFolder(), 'image.qcow2')
    const opened = await Qcow2Image.create(file, { size: 64 * MiB, clusterSize: 4096, cacheSize: 1, direct: true }).catch((error: unknown) => error)
    if (Qcow2Error.is(opened, 'ERR_UNSUPPORTED')) return
    const image = opened as Qcow2Image
    const bytes = allocateAligned(MiB).fill(7)
    for (let at = 0; at < 64; at += 3) await image.write(at * MiB, bytes)
    await image.write(12_345_678, bytes.subarray(0, 77))
    await image.snapshots.create({ name: 'one' })
    await image.write(12_345_678, bytes.subarray(0, 500_000))
    expect(await image.check()).toMatchObject({ leaks: 0, corruptions: 0 })
    await image.close()
    const buffered = await Qcow2Image.open(await openFile(file, { readOnly: true }))
    expect([...(await buffered.read(12_345_677, 3))]).toEqual([0, 7, 7])
    await buffered.close()
  })

  test('refcount table and blocks grow', async () => {
    const device = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(device, { size: 24 * MiB, clusterSize: 512, refcountBits: 64 })
    for (let at = 0; at < 24; at++) await image.write(at * MiB, new Uint8Array(MiB).fill(at + 1))
    await image.close()
    expect(await checkImage(again(device.bytes))).toMatchObject({ leaks: 0, corruptions: 0 })
    const reopened = await Qcow2Image.open(again(device.bytes))
    for (let at = 0; at < 24; at++) expect((await reopened.read(at * MiB + 77, 1))[0]).toBe(at + 1)
    await reopened.close()
  })

  test('wrong requests are refused', async () => {
    await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: MiB })
    expect(await codeOf(image.read(MiB, 1))).toBe('RangeError')
    expect(await codeOf(image.write(-1, new Uint8Array(1)))).toBe('RangeError')
    expect(await codeOf(image.writeCompressed(1, new Uint8Array(65536)))).toBe('ERR_ALIGNMENT')
    expect(await codeOf(image.resize(1000))).toBe('RangeError')
    expect(await codeOf(image.snapshots.apply('nothing'))).toBe('ERR_NOT_FOUND')
    const image2 = await Qcow2Image.open(again(await inMemory({ size: MiB })), { readOnly: true })
    expect(await codeOf(image2.write(0, new Uint8Array(1)))).toBe('ERR_READ_ONLY')
    expect(await codeOf(image2.snapshots.create({ name: 'x' }))).toBe('ERR_READ_ONLY')
  })
})

describe('snapshots', () => {
  test('two VM states are written at once while the disk is written', async () => {
    const device = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(device, { size: 64 * MiB })
    await image.write(0, new Uint8Array(MiB).fill(1))
    const one = await image.snapshots.begin({ name: 'one' })
    const two = await image.snapshots.begin({ name: 'two' })
    await one.captureDisk()
    for (let i = 0; i < 60; i++) {
      await Promise.all([
        one.write(new Uint8Array(131_328).fill(i)),
        two.write(new Uint8Array(131_328).fill(100 + i)),
        image.write(i * 100_000, new Uint8Array(100_000).fill(2)),
      ])
    }
    await two.finish({ vmClock: 5n, icount: 7n, date: new Date(1_700_000_000_123) })
    await image.write(0, new Uint8Array(10).fill(3))
    await one.finish()
    expect([...image.snapshots].map(({ name, vmClock, icount, id }) => [id, name, vmClock, icount])).toEqual([['1', 'two', 5n, 7n], ['2', 'one', 0n, undefined]])
    expect([...image.snapshots][0]!.date.getTime()).toBe(1_700_000_000_123)
    for (const [name, first, start] of [['one', 1, 0], ['two', 2, 100]] as const) {
      await using snapshot = await image.snapshots.open(name)
      expect((await snapshot.read(0, 1))[0]).toBe(first)
      expect(snapshot.vmState.size).toBe(60 * 131_328)
      for (const i of [0, 31, 59]) expect((await snapshot.vmState.read(i * 131_328, 1))[0]).toBe(start + i)
      expect(await codeOf(image.snapshots.delete(name))).toBe('ERR_BUSY')
    }
    await image.close()
    expect(await checkImage(again(device.bytes))).toMatchObject({ leaks: 0, corruptions: 0 })
  })

  test('a snapshot that is given up leaves nothing', async () => {
    const device = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(device, { size: 64 * MiB })
    await image.write(0, new Uint8Array(MiB).fill(1))
    const writer = await image.snapshots.begin({ name: 'one' })
    await writer.write(new Uint8Array(5 * MiB))
    await writer.captureDisk()
    await writer.abort()
    const left = await image.snapshots.begin({ name: 'two' })
    await left.write(new Uint8Array(5 * MiB))
    await image.close()
    expect(await codeOf(left.finish())).toBe('ERR_CLOSED')
    expect(await checkImage(again(device.bytes))).toMatchObject({ leaks: 0, corruptions: 0 })
  })

  test('hundreds of them', async () => {
    const device = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(device, { size: 8 * MiB })
    for (let i = 0; i < 300; i++) {
      await image.write((i % 100) * 65536, new Uint8Array(1000).fill(i % 251))
      await image.snapshots.create({ name: `s${i}` })
    }
    expect(image.snapshots.count).toBe(300)
    await image.snapshots.apply('s150')
    expect((await image.read(50 * 65536, 1))[0]).toBe(150)
    await image.snapshots.rename('s299', 'last')
    for (let i = 0; i < 299; i += 2) await image.snapshots.delete(`s${i}`)
    expect(image.snapshots.find('last')).toMatchObject({ name: 'last', id: '300' })
    await image.close()
    expect(await checkImage(again(device.bytes))).toMatchObject({ leaks: 0, corruptions: 0 })
  }, 120_000)

  test('growing after applying a snapshot with VM state does not show the state', async () => {
    const device = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(device, { size: 8 * MiB, clusterSize: 4096 })
    await image.snapshots.create({ name: 'vm', vmState: [new Uint8Array(3 * MiB).fill(0x51)] })
    await image.snapshots.apply('vm')
    await image.resize(32 * MiB)
    expect(new Set(await image.read(8 * MiB, 24 * MiB))).toEqual(new Set([0]))
    await image.close()
    expect(await checkImage(again(device.bytes))).toMatchObject({ leaks: 0, corruptions: 0 })
  })

  test('have a name, not always one of their own', async () => {
    await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: MiB })
    for (const nameless of ['text', {}, { name: '' }] as unknown as { name: string }[]) {
      await expect(image.snapshots.create(nameless)).rejects.toThrow('a snapshot needs a name')
    }
    const [first, second] = [await image.snapshots.create({ name: 'same' }), await image.snapshots.create({ name: 'same' })]
    expect(image.snapshots.find('same')).toEqual(first)
    expect(image.snapshots.find(second.id)).toEqual(second)
    await expect(image.snapshots.apply('other')).rejects.toThrow('the image has no snapshot "other"; it has same, same')
  })

  test('an external data file has none', async () => {
    const folder = tempFolder()
    await using image = await Qcow2Image.create(join(folder, 'image.qcow2'), { size: MiB, dataFile: join(folder, 'data.raw') })
    expect(await codeOf(image.snapshots.create({ name: 'x' }))).toBe('ERR_UNSUPPORTED')
  })
})

describe('bitmaps of other writers', () => {
  const qemu = qemus[qemus.length - 1]
  test.skipIf(qemu === undefined)('are marked before the first write, and not before', async () => {
    const file = join(tempFolder(), 'image.qcow2')
    await qemu!.imgOk('create', '-f', 'qcow2', file, '4M')
    await qemu!.imgOk('bitmap', '--add', file, 'tracking')
    await qemu!.imgOk('bitmap', '--add', '--disable', file, 'frozen')
    const flags = async (): Promise<unknown> => {
      const info = JSON.parse(await qemu!.imgOk('info', '--output=json', file)) as { 'format-specific': { data: { bitmaps: { name: string; flags: string[] }[] } } }
      return info['format-specific'].data.bitmaps.map(({ name, flags: set }) => [name, set])
    }
    const image = await Qcow2Image.open(file)
    await image.read(0, 512)
    await image.close()
    expect(await flags()).toEqual([['tracking', ['auto']], ['frozen', []]])
    const writer = await Qcow2Image.open(file)
    await writer.write(0, new Uint8Array(512).fill(1))
    await writer.close()
    expect(await flags()).toEqual([['tracking', ['in-use', 'auto']], ['frozen', []]])
    expect(await qemu!.img('check', file)).toMatchObject({ code: 0 })
    const resized = await Qcow2Image.open(file)
    await resized.resize(8 * MiB)
    await resized.close()
    expect(await flags()).toEqual([['tracking', ['in-use', 'auto']], ['frozen', ['in-use']]])
  })
})
