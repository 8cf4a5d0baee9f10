/** Small files that claim much: a typed error, or an answer, without the time and memory that they claim. */
import { describe, expect, test } from 'vitest'
import { BaseDevice, anyRequest } from '../../src/block/device.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import type { MigrationRecord, RamBlock } from '../../src/migration/records.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { encodeRecord } from '../../src/migration/writer.ts'
import { capture as storeStream } from '../../src/snapshot/capture.ts'
import { RamImage } from '../../src/snapshot/ram-image.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { tempFolder } from '../support/temp.ts'
import { capture } from './captures.ts'

const MiB = 1 << 20
const stream = Uint8Array.from(capture('qemu72-precopy.mig'))

/** Runs `task` and expects it to take little time and memory. */
async function bounded<T>(task: () => Promise<T>): Promise<T> {
  const [started, before] = [performance.now(), process.memoryUsage().rss]
  try {
    return await task()
  } finally {
    expect(performance.now() - started).toBeLessThan(10_000)
    expect(process.memoryUsage().rss - before).toBeLessThan(300 * MiB)
  }
}

/** A few bytes at their offsets, zeroes everywhere else. */
class SparseDevice extends BaseDevice {
  readonly readOnly = true
  readonly limits = anyRequest
  readonly size: number
  readonly #pieces: readonly (readonly [offset: number, bytes: Uint8Array])[]

  constructor(size: number, pieces: readonly (readonly [number, Uint8Array])[]) {
    super()
    this.size = size
    this.#pieces = pieces
  }

  protected override async onRead(offset: number, target: Uint8Array): Promise<void> {
    await new Promise((resolve) => setImmediate(resolve))
    target.fill(0)
    for (const [at, bytes] of this.#pieces) {
      const [from, to] = [Math.max(at, offset), Math.min(at + bytes.length, offset + target.length)]
      if (from < to) target.set(bytes.subarray(from - at, to - at), from - offset)
    }
  }

  protected onWrite(): Promise<void> {
    return Promise.reject(new Error('read-only'))
  }

  protected onFlush(): Promise<void> {
    return Promise.resolve()
  }

  protected onClose(): Promise<void> {
    return Promise.resolve()
  }
}

const records: MigrationRecord[] = []
for (const record of new MigrationParser().push(stream)) records.push({ ...record })
const firstPages = records.find(({ kind }) => kind === 'ram-pages')!

/** The stream up to its pages, with a main memory of so many bytes. */
function headOf(length: number): Uint8Array {
  const parts: Uint8Array[] = []
  for (const record of records) {
    if (record.offset >= firstPages.offset) break
    if (record.kind === 'ram-size') parts.push(encodeRecord({ ...record, total: record.total + length - (4 << 20) }))
    else if (record.kind === 'ram-block' && record.block.name === 'pc.ram') parts.push(encodeRecord({ ...record, block: { ...record.block, length } }))
    else if (record.kind !== 'bytes' && record.kind !== 'ram-pages') parts.push(encodeRecord(record))
  }
  return Buffer.concat(parts)
}

function pageRecord(flags: number, offset: number, payload: readonly number[], name?: string): Uint8Array {
  const bytes = new Uint8Array(8 + (name === undefined ? 0 : 1 + name.length) + payload.length)
  new DataView(bytes.buffer).setBigUint64(0, BigInt(offset) | BigInt(flags | (name === undefined ? 0x20 : 0)))
  if (name !== undefined) bytes.set([name.length, ...Buffer.from(name)], 8)
  bytes.set(payload, bytes.length - payload.length)
  return bytes
}

test('more values than there are bytes: elements of empty fields', async () => {
  const u32 = (value: number): Buffer => Buffer.from([value >>> 24, (value >>> 16) & 255, (value >>> 8) & 255, value & 255])
  const fields = [{ name: 'b', type: 'uint8', size: 1 }, ...Array.from({ length: 10_000 }, (_, i) => ({ name: `f${i}`, type: 'x', size: 0 }))]
  for (const claimed of [1, 2]) {
    // of a structure whose length is not that of its field, only the length is asked for
    const struct = { vmsd_name: 's', version: 1, fields: claimed === 1 ? fields : [...fields, { name: 'c', type: 'uint8', size: 1 }] }
    const json = Buffer.from(JSON.stringify({ page_size: 4096, devices: [{ name: 'd', instance_id: 0, vmsd_name: 'd', version: 1, fields: [{ name: 'a', type: 'struct', size: 1, array_len: 10_000, struct }] }] }))
    const bytes = Buffer.concat([headOf(4 << 20).subarray(0, records.find(({ kind }) => kind === 'section')!.offset), Buffer.from([4]), u32(1), Buffer.from([1, 0x64]), u32(0), u32(1), Buffer.alloc(10_000), Buffer.from([0x7e]), u32(1), Buffer.from([0, 6]), u32(json.length), json])
    await bounded(async () => {
      await using vm = await VmState.index(new MemoryDevice(Uint8Array.from(bytes)))
      const decoded = vm.decodeDevices()
      if (claimed === 1) await expect(decoded).rejects.toMatchObject({ code: 'ERR_STREAM', message: expect.stringContaining('more values') as string })
      else expect(Object.keys(await decoded)).toEqual(['d (0)'])
    })
  }
})

test.each([33, 36])('a RAM block that claims 2^%i bytes, through a RAM image', async (bits) => {
  const image = `${tempFolder()}/claim.qcow2`
  const tail = stream.subarray(firstPages.offset)
  const whole = Buffer.concat([headOf(2 ** bits), tail])
  await bounded(async () => {
    await storeStream(Uint8Array.from(whole), RamImageWriter.to(image))
    await using ram = await RamImage.open(image)
    await using vm = await ram.vmState()
    const block = vm.ram.blocks.find(({ name }) => name === 'pc.ram')!
    let pages = 0
    for (const { length, zero } of vm.ram.extents(block, 0, block.length)) if (!zero) pages += length / 4096
    expect(pages).toBe(vm.ram.counts.normal - normalOutside(vm, block))
  })
})

function normalOutside(vm: VmState, main: RamBlock): number {
  let pages = 0
  for (const block of vm.ram.blocks) {
    if (block.name === main.name) continue
    for (const { length, zero } of vm.ram.extents(block, 0, block.length)) if (!zero) pages += length / 4096
  }
  return pages
}

test('XBZRLE: three million empty deltas', async () => {
  const delta = pageRecord(0x40, 0, [1, 0, 0])
  const bytes = Buffer.concat([headOf(4 << 20), pageRecord(0x02, 0, [0], 'pc.ram'), Buffer.alloc(delta.length * 3_000_000, delta)])
  await bounded(() => expect(VmState.index(new MemoryDevice(new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.length)))).rejects.toMatchObject({ code: 'ERR_STREAM' }))
})

test('zero pages far from each other', async () => {
  const pages = Array.from({ length: 300_000 }, (_, i) => pageRecord(0x02, i * 1024 * 4096, [0], i === 0 ? 'pc.ram' : undefined))
  const bytes = Buffer.concat([headOf(2 ** 42), ...pages])
  await bounded(() => expect(VmState.index(new MemoryDevice(Uint8Array.from(bytes)))).rejects.toMatchObject({ code: 'ERR_STREAM', message: expect.stringContaining('scattered') as string }))
})

test.each([30, 36, 50])('a file, or the VM state of a snapshot, of 2^%i bytes of which most are zero', async (bits) => {
  await bounded(async () => {
    await using vm = await VmState.index(new SparseDevice(2 ** bits, [[0, stream]]))
    expect(vm.streamLength).toBe(stream.length)
  })
  await bounded(async () => {
    // cut within its devices: what is left has no end
    await using vm = await VmState.index(new SparseDevice(2 ** bits, [[0, stream.subarray(0, stream.length - 5000)]]))
    expect(vm.cut).toBeDefined()
  })
  await bounded(() => expect(VmState.index(new SparseDevice(2 ** bits, [[2 ** bits - 1, Uint8Array.of(0x7d)]]))).rejects.toMatchObject({ code: 'ERR_STREAM' }))
})

describe('zstd (the bundled decoder)', () => {
  const rle = (blocks: number, windowLog: number): Uint8Array => {
    const bytes = Buffer.alloc(6 + blocks * 4)
    bytes.set([0x28, 0xb5, 0x2f, 0xfd, 0x00, (windowLog - 10) << 3])
    for (let i = 0; i < blocks; i++) bytes.writeUIntLE((i === blocks - 1 ? 1 : 0) | 2 | (131_072 << 3), 6 + i * 4, 3)
    return Uint8Array.from(bytes)
  }

  test.each([[200_000, 17], [12_000, 20], [12_000, 23], [2, 30], [2, 31]])('%i blocks, a window of 2^%i', async (blocks, windowLog) => {
    let turned = 0
    const timer = setInterval(() => turned++, 20)
    await bounded(() => expect(VmState.index(new MemoryDevice(rle(blocks, windowLog)))).rejects.toMatchObject({ name: expect.stringMatching(/Error$/) as string, code: expect.stringMatching(/^ERR_(UNSUPPORTED|STREAM)$/) as string }))
    clearInterval(timer)
    if (blocks > 1000) expect(turned).toBeGreaterThan(1)
  })
})
