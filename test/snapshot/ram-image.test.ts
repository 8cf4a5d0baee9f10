import { join } from 'node:path'
import { statSync, writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { FilterDevice } from '../../src/block/filter.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { ramFlag } from '../../src/migration/format.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import type { RamBlock, RamPagesRecord } from '../../src/migration/records.ts'
import { plainStream } from '../../src/migration/convert.ts'
import { diffVmStates } from '../../src/migration/diff.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { RamImage } from '../../src/snapshot/ram-image.ts'
import { RamImageWriter, type NewRamImageOptions } from '../../src/snapshot/ram-image-writer.ts'
import { capture, expected, guestProblems, sha256, wholeStreams } from '../migration/captures.ts'
import { checkGuestMemory, Guest } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { captureStream } from '../support/saved.ts'
import { tempFolder } from '../support/temp.ts'

const long = process.env['QCOW2_LONG'] === '1'
/** Streams whose pages are all whole. */
const storable = wholeStreams.filter((name) => !name.includes('xbzrle') && !name.includes('mappedram'))

async function store(stream: Uint8Array, target: MemoryDevice | string, options: NewRamImageOptions & { chunk?: number } = {}): Promise<RamImageWriter> {
  const writer = RamImageWriter.to(target, options)
  const parser = new MigrationParser()
  const chunk = options.chunk ?? 65_536
  for (let at = 0; at < stream.length; at += chunk) {
    for (const record of parser.push(stream.subarray(at, at + chunk))) writer.record(record)
    await writer.settle()
  }
  parser.end()
  await writer.finish()
  return writer
}

function memoryImage(): MemoryDevice {
  return new MemoryDevice(0, { growable: true })
}

/** Of the writes of two clusters, fails the first at once, ends the others late, and looks whether their bytes stay as they were. */
class LateWrites extends FilterDevice {
  failed = false
  running = 0
  changed = false

  protected override async onWrite(offset: number, source: Uint8Array): Promise<void> {
    if (source.length !== 131_072) return this.inner.write(offset, source)
    if (!this.failed) {
      this.failed = true
      throw new Error('the medium failed')
    }
    this.running++
    const before = sha256(source)
    await new Promise((wake) => setTimeout(wake, 50))
    this.changed ||= sha256(source) !== before
    this.running--
  }
}

/** The bytes of a device that the image closed. */
function reopened(device: MemoryDevice): MemoryDevice {
  return new MemoryDevice(device.bytes.slice(), { growable: true })
}

async function bytesOf(chunks: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const pieces: Uint8Array[] = []
  for await (const chunk of chunks) pieces.push(chunk.slice())
  return Buffer.concat(pieces)
}

describe('captures', () => {
  test.each(storable)('%s: RAM and devices come out as they went in', async (name) => {
    const stream = capture(name)
    const device = memoryImage()
    await store(stream, device)
    await using ram = await RamImage.open(reopened(device))
    await using vm = await VmState.index(new MemoryDevice(stream))
    expect(ram.machine).toBe(vm.machine)
    for (const { name: block, length } of ram.blocks) {
      expect(sha256(await ram.read(block, 0, length))).toBe(expected[name]!.ram_sha256![block])
    }
    await using again = await VmState.index(new MemoryDevice(await bytesOf(ram.stream())))
    for (const { name: block, length } of again.ram.blocks) {
      expect(sha256(await again.ram.read(block, 0, length))).toBe(expected[name]!.ram_sha256![block])
      const absent = (from: VmState): number[] =>
        Array.from({ length: length / 4096 }, (_, page) => page).filter((page) => from.ram.pageKind(block, page * 4096) === 'absent')
      expect(absent(again)).toEqual(absent(vm))
    }
    expect(again.ram.counts.duplicate).toBe(0)
    expect(await again.decodeDevices()).toEqual(await vm.decodeDevices())
  })

  test.each(storable)('%s: looked into, it is the VM of its stream', async (name) => {
    const stream = capture(name)
    const device = memoryImage()
    await store(stream, device)
    await using ram = await RamImage.open(reopened(device))
    await using stored = await ram.vmState()
    await using vm = await VmState.index(new MemoryDevice(stream))
    expect(stored.pagesBeside).toBe(true)
    expect(stored.configuration).toEqual({ ...vm.configuration })
    expect(await stored.decodeDevices()).toEqual(await vm.decodeDevices())
    const comparison = await diffVmStates(vm, stored)
    expect(comparison).toMatchObject({ ram: [], devices: [] })
    for (const { name: block, length } of vm.ram.blocks) {
      expect(sha256(await stored.ram.read(block, 0, length))).toBe(expected[name]!.ram_sha256![block])
      for (let offset = 0; offset < length; offset += 4096) {
        const kind = vm.ram.pageKind(block, offset)
        // a stored cluster may have pages of zeroes in it
        if (kind !== 'zero') expect(stored.ram.pageKind(block, offset)).toBe(kind)
        else expect(stored.ram.pageKind(block, offset)).not.toBe('absent')
      }
    }
    await using again = await VmState.index(new MemoryDevice(await bytesOf(plainStream(stored))))
    expect(await diffVmStates(vm, again)).toMatchObject({ ram: [], devices: [] })
  })

  test.each(['qemu100-bgsnap.mig', 'qemu72-bgsnap.mig'])('%s: each cluster with content is written once, though pages come out of order', async (name) => {
    const stream = capture(name)
    const device = memoryImage()
    const writer = await store(stream, device)
    await using vm = await VmState.index(new MemoryDevice(stream))
    let clusters = 0
    for (const { name: block, length } of vm.ram.blocks) {
      const content = await vm.ram.read(block, 0, length)
      for (let at = 0; at < length; at += 65_536) clusters += Number(content.subarray(at, at + 65_536).some((byte) => byte !== 0))
    }
    expect(writer.statistics.written).toBe(clusters * 65_536)
    expect(device.size).toBeLessThan(clusters * 65_536 + (1 << 20))
  })

  test('while a write is late, nothing else changes its bytes, also when another one failed', async () => {
    const device = new LateWrites(memoryImage())
    const writer = RamImageWriter.to(device, { inFlight: 0 })
    const data = Array.from({ length: 1024 }, (_, page): [number, number] => [page, page % 64 < 32 ? 1 : 0])
    feed(writer, 4096 * 4096, data)
    await expect(writer.settle()).rejects.toThrow('the medium failed')
    feedPages(writer, { index: 0, name: 'ram', length: 4096 * 4096 }, data.map(([page]) => [page + 1024, 2]))
    await writer.abort()
    expect(device.running).toBe(0)
    expect(device.changed).toBe(false)
  })

  test('XBZRLE deltas are refused', async () => {
    await expect(store(capture('qemu100-xbzrle.mig'), memoryImage())).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
  })

  test('a stream cut short leaves no saved VM', async () => {
    const device = memoryImage()
    const writer = RamImageWriter.to(device)
    const parser = new MigrationParser()
    for (const record of parser.push(capture('qemu100-bgsnap.mig').subarray(0, 2_000_000))) writer.record(record)
    await writer.settle()
    await writer.abort()
    if (device.size > 0) await expect(RamImage.open(reopened(device))).rejects.toThrow()
  })

  test('an image without RAM is refused', async () => {
    const device = memoryImage()
    await using image = await Qcow2Image.create(device, { size: 1 << 20 })
    await expect(RamImage.open(image)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    await image.snapshots.create({ name: 'other', vmState: [new Uint8Array(100)] })
    await expect(RamImage.open(image)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    await expect(RamImage.open(image, { snapshot: 'other' })).rejects.toThrow(/snapshot 'other' is not a RAM image/)
    expect(image.closed).toBe(false)
  })
})

/** Records of a stream with one block and the given pages, in the order given. */
function feed(writer: RamImageWriter, blockLength: number, pages: readonly (readonly [page: number, fill: number])[]): void {
  const block: RamBlock = { index: 0, name: 'ram', length: blockLength }
  const parser = new MigrationParser()
  const frame = (hex: string): void => {
    for (const record of parser.push(Buffer.from(hex, 'hex'))) writer.record(record)
  }
  const total = (blockLength + 4).toString(16).padStart(16, '0')
  frame(`5145564d00000003 01 00000001 03 72616d 00000000 00000004 ${total} 03 72616d ${blockLength.toString(16).padStart(16, '0')} 0000000000000010 7e00000001`.replaceAll(' ', ''))
  frame('0200000001')
  feedPages(writer, block, pages)
  frame('0000000000000010 7e00000001 03 00000001 0000000000000010 7e00000001 00'.replaceAll(' ', ''))
  parser.end()
}

function feedPages(writer: RamImageWriter, block: RamBlock, pages: readonly (readonly [page: number, fill: number])[]): void {
  for (let first = 0; first < pages.length; first += 7) {
    const some = pages.slice(first, first + 7)
    const bytes = new Uint8Array(some.length * 4096)
    some.forEach(([, fill], i) => bytes.fill(fill, i * 4096, (i + 1) * 4096))
    const record: RamPagesRecord = {
      kind: 'ram-pages', offset: 0, length: 0, block, pageSize: 4096, count: some.length,
      flags: Uint16Array.from(some, ([, fill]) => (fill === 0 ? ramFlag.zero : ramFlag.page)),
      pageOffsets: Float64Array.from(some, ([page]) => page * 4096),
      positions: Uint32Array.from(some, (_, i) => i * 4096),
      lengths: Uint32Array.from(some, () => 4096),
      bytes, bytesOffset: 0,
    }
    writer.record(record)
  }
}

describe('against a plain model', () => {
  const pageCount = 1500
  const pages = fc.array(
    fc.oneof(
      fc.tuple(fc.nat(pageCount - 1), fc.integer({ min: 0, max: 3 })).map((page) => [page]),
      fc.tuple(fc.nat(pageCount - 1), fc.integer({ min: 1, max: 300 }), fc.integer({ min: 0, max: 3 })).map(([first, count, fill]) =>
        Array.from({ length: Math.min(count, pageCount - first) }, (_, i) => [first + i, fill] as [number, number]),
      ),
    ),
    { maxLength: 20 },
  ).map((lists) => lists.flat())

  const shapes: NewRamImageOptions[] = [{}, { clusterSize: 4096 }, { clusterSize: 2 << 20 }, { extendedL2: true }]

  test.each(shapes)('pages in any order, any number of times: %j', async (shape) => {
    await fc.assert(
      fc.asyncProperty(pages, async (list) => {
        const device = memoryImage()
        const writer = RamImageWriter.to(device, shape)
        feed(writer, pageCount * 4096, list)
        await writer.settle()
        await writer.finish()
        const model = new Map(list)
        await using ram = await RamImage.open(reopened(device))
        const content = await ram.read('ram', 0, pageCount * 4096)
        for (let page = 0; page < pageCount; page++) {
          const fill = model.get(page) ?? 0
          expect(content[page * 4096] === fill && content[page * 4096 + 4095] === fill, `page ${page}`).toBe(true)
        }
        const absent = ram.blocks[0]!.absent.reduce((sum, [, length]) => sum + length, 0)
        expect(absent).toBe((pageCount - model.size) * 4096)
      }),
      { numRuns: long ? 500 : 5 },
    )
  })

  test('a later image on top of an earlier one holds the later content, and only what changed', async () => {
    await fc.assert(
      fc.asyncProperty(pages, pages, async (first, second) => {
        const folder = tempFolder()
        const base = RamImageWriter.to(join(folder, 'base.qcow2'))
        feed(base, pageCount * 4096, first)
        await base.finish()
        const top = RamImageWriter.to(join(folder, 'top.qcow2'), { backing: { file: 'base.qcow2', format: 'qcow2' } })
        feed(top, pageCount * 4096, second)
        await top.finish()
        const before = new Map(first)
        const after = new Map(second)
        await using ram = await RamImage.open(join(folder, 'top.qcow2'))
        const content = await ram.read('ram', 0, pageCount * 4096)
        await using vm = await ram.vmState()
        expect(sha256(await vm.ram.read('ram', 0, pageCount * 4096))).toBe(sha256(content))
        let changed = 0
        for (let page = 0; page < pageCount; page++) {
          const fill = after.get(page) ?? 0
          expect(content[page * 4096] === fill && content[page * 4096 + 4095] === fill, `page ${page}`).toBe(true)
          if (after.has(page) && fill !== (before.get(page) ?? 0)) changed++
        }
        const duplicates = second.length - after.size
        if (duplicates === 0) expect(top.statistics.written).toBeLessThanOrEqual(changed * 4096)
      }),
      { numRuns: long ? 200 : 5 },
    )
  })
})

describeWithQemu('real QEMU', (qemu) => {
  test('goes on from a background snapshot that was kept as a RAM image', async () => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    const folder = tempFolder()
    await store(await captureStream(guest), join(folder, 'ram.qcow2'))
    await guest.kill()
    await using ram = await RamImage.open(join(folder, 'ram.qcow2'))
    const { tick, consistent } = await checkGuestMemory((offset, length) => ram.read('pc.ram', offset, length))
    expect(consistent).toBe(true)
    writeFileSync(join(folder, 'stream'), await bytesOf(ram.stream()))
    const again = await Guest.boot(qemu, { incoming: `exec:cat ${join(folder, 'stream')}` })
    await again.expectGoesOn(tick)
  })

  test('finds a RAM image and an incremental one clean', async () => {
    const folder = tempFolder()
    await store(capture('qemu100-bgsnap.mig'), join(folder, 'a.qcow2'))
    await store(capture('qemu100-savevm.vmstate'), join(folder, 'b.qcow2'), { backing: { file: 'a.qcow2', format: 'qcow2' } })
    for (const name of ['a.qcow2', 'b.qcow2']) {
      const file = join(folder, name)
      const check = JSON.parse(await qemu.imgOk('check', '--output=json', file)) as { 'image-end-offset': number }
      expect(statSync(file).size, 'the file ends with its last cluster').toBe(check['image-end-offset'])
      expect(statSync(file).size, 'and there is no hole before it').toBeLessThan(5 << 20)
    }
    await using ram = await RamImage.open(join(folder, 'b.qcow2'))
    expect(guestProblems(await ram.read('pc.ram', 0, 4 << 20))).toEqual([])
    await qemu.imgOk('convert', '-O', 'raw', join(folder, 'b.qcow2'), join(folder, 'b.raw'))
    expect(statSync(join(folder, 'b.raw')).size).toBeGreaterThanOrEqual(4 << 20)
    const info = JSON.parse(await qemu.imgOk('info', '--output=json', join(folder, 'a.qcow2'))) as { snapshots: { name: string }[] }
    expect(info.snapshots.map(({ name }) => name)).toEqual(['ram'])
  })
})
