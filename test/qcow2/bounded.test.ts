/** Work and memory grow with what is asked for and what is there, not with its square or with what an image claims. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import type { BlockDevice } from '../../src/block/device.ts'
import { join } from '../../src/block/join.ts'
import { fault } from '../../src/block/fault.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { NullDevice } from '../../src/block/null.ts'
import { trace, type TracedRequest } from '../../src/block/trace.ts'
import { Budget } from '../../src/core/budget.ts'
import { bitmapLimits, decodeBitmapDirectory, encodeBitmapDirectory } from '../../src/qcow2/bitmaps-directory.ts'
import { ClusterCounters } from '../../src/qcow2/check-counters.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { geometryOf } from '../../src/qcow2/geometry.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { snapshotTableReason } from '../../src/cli/image/snapshot-table-reason.ts'
import { MetadataMap } from '../../src/qcow2/metadata-map.ts'
import { refcountLayout } from '../../src/qcow2/refcount-layout.ts'
import { keepOpen } from '../../src/testing/build-image.ts'

const MiB = 1 << 20

/** How many 32-bit words are read through a DataView, which is how tables are read, while a task runs. */
async function wordsRead(task: () => Promise<unknown>): Promise<number> {
  // eslint-disable-next-line @typescript-eslint/unbound-method -- applied to the view it is called on
  const { getUint32 } = DataView.prototype
  let count = 0
  DataView.prototype.getUint32 = function (this: DataView, ...place): number {
    count++
    return getUint32.apply(this, place)
  }
  try {
    await task()
  } finally {
    DataView.prototype.getUint32 = getUint32
  }
  return count
}

describe('zeroing over a backing file', () => {
  const overlay = (): Promise<Qcow2Image> =>
    Qcow2Image.create(new MemoryDevice(0, { growable: true }), {
      size: 1024 * MiB,
      backing: { file: 'base', format: 'raw' },
      references: () => new NullDevice(512 * MiB),
    })

  test('each table entry is read a few times, however long the range', async () => {
    await using image = await overlay()
    const entries = (512 * MiB) / 65536
    expect(await wordsRead(() => image.writeZeroes(0, 512 * MiB))).toBeLessThan(entries * 16)
    expect(await wordsRead(() => image.writeZeroes(0, 512 * MiB))).toBeLessThan(entries * 16)
  })

  test('what lies behind the end of the backing file gets no tables', async () => {
    await using image = await overlay()
    await image.writeZeroes(0, 1024 * MiB)
    expect([0, 1].map((index) => image.engine.l1Table.offsetAt(index) > 0)).toEqual([true, false])
  })
})

describe('a bitmap directory', () => {
  const directoryOf = (count: number): Uint8Array =>
    encodeBitmapDirectory(
      Array.from({ length: count }, (_, index) => ({ name: `bitmap ${index}`, tableOffset: 0, tableSize: 0, inUse: false, auto: false, granularityBits: 16 })),
    )

  test('with more entries than the header says is not read to its end', async () => {
    const directory = directoryOf(50_000)
    for (const [count, most] of [[10, 100], [2 ** 31, 8 * bitmapLimits.count]] as const) {
      const extension = { count, directorySize: directory.length, directoryOffset: 0 }
      const decode = (): Promise<unknown> => Promise.resolve().then(() => decodeBitmapDirectory(directory, extension, 65536))
      expect(await wordsRead(() => expect(decode()).rejects.toMatchObject({ code: 'ERR_FORMAT' }))).toBeLessThan(most)
    }
  })

  test('with as many as an image may have is read', () => {
    const directory = directoryOf(bitmapLimits.count)
    const extension = { count: bitmapLimits.count, directorySize: directory.length, directoryOffset: 0 }
    expect(decodeBitmapDirectory(directory, extension, 65536)).toHaveLength(bitmapLimits.count)
    const more = directoryOf(bitmapLimits.count + 1)
    const tooMany = { count: bitmapLimits.count + 1, directorySize: more.length, directoryOffset: 0 }
    expect(() => decodeBitmapDirectory(more, tooMany, 65536)).toThrow(/65535/)
  })
})

describe('a file that claims to be huge', () => {
  /** Zeroes, but for a header and an L1 table whose entries are far apart. */
  class Claiming extends NullDevice {
    override readonly readOnly: boolean
    readonly #start = Buffer.alloc(2 * MiB)
    /** Most memory in use at any read. */
    peak = 0
    #reads = 0

    constructor(options: { size: number; entries: number; readOnly: boolean }) {
      super(options.size)
      this.readOnly = options.readOnly
      this.#start.set(Buffer.from('514649fb00000003', 'hex'))
      this.#start.writeUInt32BE(9, 20)
      this.#start.writeBigUInt64BE(BigInt(MiB), 24)
      this.#start.writeUInt32BE(options.entries, 36)
      this.#start.writeBigUInt64BE(BigInt(MiB), 40)
      this.#start.writeBigUInt64BE(1024n, 48)
      this.#start.writeUInt32BE(1, 56)
      this.#start.writeUInt32BE(4, 96)
      this.#start.writeUInt32BE(104, 100)
      for (let i = 0; i < options.entries; i++) this.#start.writeBigUInt64BE(BigInt((i + 1) * 2 ** 25), MiB + i * 8)
    }

    protected override onRead(offset: number, target: Uint8Array): Promise<void> {
      if (this.#reads++ % 64 === 0) this.peak = Math.max(this.peak, process.memoryUsage().arrayBuffers)
      target.fill(0)
      if (offset < this.#start.length) target.set(this.#start.subarray(offset, offset + target.length))
      return Promise.resolve()
    }
  }

  test.each([true, false])('opening it, read-only %s, costs no memory for what is between its tables', async (readOnly) => {
    const before = process.memoryUsage().arrayBuffers
    await using image = await Qcow2Image.open(new Claiming({ size: 2 ** 50, entries: 65_536, readOnly }), { readOnly })
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(32 * MiB)
    expect(image.engine.metadataMap.overlaps(0, 512)).toBe(!readOnly)
  })

  test('checking it does not go through every cluster it might have', async () => {
    const report = await checkImage(new Claiming({ size: 2 ** 53 - 512, entries: 32, readOnly: true }))
    expect(report.corruptions).toBeGreaterThan(0)
  })

  test('the words for a snapshot table past its limits do not go through the image', async () => {
    const host = new MemoryDevice(0, { growable: true })
    const image = await Qcow2Image.create(keepOpen(host), { size: 64 * MiB, clusterSize: 512 })
    for (let at = 0; at < 64 * MiB; at += MiB) await image.write(at, new Uint8Array(512))
    await image.snapshots.create({ name: 'a' })
    await image.close()
    const bytes = host.bytes.slice(0, host.size)
    const view = new DataView(bytes.buffer)
    view.setUint32(Number(view.getBigUint64(64)) + 36, 5000) // extra_data_size of the first snapshot
    let requests = 0
    const counted = fault(new MemoryDevice(bytes), () => {
      requests++
      return undefined
    })
    const error = await Qcow2Image.open(counted).catch((reason: unknown) => reason)
    expect(await snapshotTableReason(counted, error)).toMatchObject({ message: expect.stringContaining('Too much extra metadata') as string })
    expect(requests).toBeLessThan(40)
  })

  test('checking it costs no memory for what is between its tables', async () => {
    const device = new Claiming({ size: 2 ** 50, entries: 4096, readOnly: true })
    const before = process.memoryUsage().arrayBuffers
    const report = await checkImage(device)
    expect(report.corruptions).toBeGreaterThan(4096)
    expect(device.peak - before).toBeLessThan(32 * MiB)
  })
})

test('counters of clusters anywhere equal a plain map', () => {
  const cluster = fc.oneof(fc.nat({ max: 300 }), fc.integer({ min: 2 ** 40, max: 2 ** 40 + 100 }), fc.constantFrom(2 ** 32 - 1, 2 ** 32, 2 ** 44 - 1))
  const reference = fc.record({ cluster, count: fc.constantFrom(1, 1, 1, 2, 0xfffe, 2 ** 40), by: fc.constantFrom(0, 1, 1, 8) })
  const layout = refcountLayout(4)
  fc.assert(
    fc.property(fc.array(reference, { maxLength: 60 }), cluster, (references, from) => {
      const counters = new ClusterCounters()
      const model = new Map<number, { count: number; owners: number }>()
      for (const { cluster: at, count, by } of references) {
        counters.add(at, count, by)
        const { count: before, owners } = model.get(at) ?? { count: 0, owners: 0 }
        model.set(at, { count: before + count, owners: owners | by })
      }
      const used = [...model.keys()].sort((a, b) => a - b)
      expect(counters.highest).toBe(used.at(-1) ?? -1)
      for (const [at, { count, owners }] of model) expect([counters.get(at), counters.owners(at)]).toEqual([count, owners])
      for (const at of [from, ...used]) {
        const after = used.find((next) => next > at) ?? at + 1000
        expect(counters.nextUsed(at + 1, at + 1000)).toBe(Math.min(after, at + 1000))
      }
      // a block in which every counter is 1
      const block = new Uint8Array(2048)
      for (let index = 0; index < 1024; index++) layout.set(block, index, 1)
      let unlike = from
      while (model.get(unlike)?.count === 1 && [1, 8].includes(model.get(unlike)!.owners)) unlike++
      expect(counters.nextUnlike(from, from + 1000, layout, block, 3)).toBe(unlike)
    }),
    { numRuns: 300 },
  )
})

test('the map of metadata knows exactly the clusters that were added and not removed', () => {
  const range = fc.record({ offset: fc.integer({ min: 0, max: 200_000 }), length: fc.integer({ min: 1, max: 70_000 }), add: fc.boolean() })
  fc.assert(
    fc.property(fc.array(range, { maxLength: 8 }), range, (changes, asked) => {
      const map = new MetadataMap(geometryOf({ clusterBits: 9, extendedL2: false, refcountOrder: 4 }))
      const model = new Set<number>()
      const clusters = ({ offset, length }: { offset: number; length: number }): number[] => {
        const first = Math.floor(offset / 512)
        return Array.from({ length: Math.ceil((offset + length) / 512) - first }, (_, index) => first + index)
      }
      for (const change of changes) {
        map[change.add ? 'add' : 'remove'](change.offset, change.length)
        for (const cluster of clusters(change)) model[change.add ? 'add' : 'delete'](cluster)
      }
      expect(map.overlaps(asked.offset, asked.length)).toBe(clusters(asked).some((cluster) => model.has(cluster)))
      for (let cluster = 0; cluster < 530; cluster++) expect([cluster, map.overlaps(cluster * 512, 512)]).toEqual([cluster, model.has(cluster)])
    }),
    { numRuns: 100 },
  )
})

/** A small file that claims much: its metadata lie at the start of a long hole. */
function sparseImage(clusterBits: number, size: number, header: (view: DataView) => void, ...writes: (readonly [number, Uint8Array])[]): BlockDevice {
  const start = new Uint8Array(1 << 20)
  const view = new DataView(start.buffer)
  view.setUint32(0, 0x514649fb)
  view.setUint32(4, 3)
  view.setUint32(20, clusterBits)
  view.setBigUint64(24, 32768n)
  view.setUint32(36, 1)
  view.setBigUint64(40, BigInt(3 << clusterBits))
  view.setBigUint64(48, BigInt(1 << clusterBits))
  view.setUint32(56, 1)
  view.setUint32(96, 4)
  view.setUint32(100, 112)
  view.setBigUint64(1 << clusterBits, BigInt(2 << clusterBits))
  header(view)
  for (const [at, bytes] of writes) start.set(bytes, at)
  return join(new MemoryDevice(start, { readOnly: true }), new NullDevice(size - start.length))
}

describe('a check costs what the file has, not what it claims', () => {
  const extension = (type: number, fields: (view: DataView) => void): ((view: DataView) => void) => (view) => {
    view.setUint32(112, type)
    view.setUint32(116, type === 0x0537be77 ? 16 : 24)
    fields(view)
  }
  const bitmaps = (count: number, bytes: number, at: number): ((view: DataView) => void) =>
    extension(0x23852875, (view) => {
      view.setBigUint64(88, 1n)
      view.setUint32(120, count)
      view.setBigUint64(128, BigInt(bytes))
      view.setBigUint64(136, BigInt(at))
    })
  const directory = (count: number, tableSize: number): Uint8Array => {
    const bytes = new Uint8Array(count * 32)
    const view = new DataView(bytes.buffer)
    for (let i = 0; i < count; i++) {
      view.setBigUint64(i * 32, BigInt(1 << 30))
      view.setUint32(i * 32 + 8, tableSize)
      view.setUint8(i * 32 + 16, 1)
      view.setUint8(i * 32 + 17, 16)
      view.setUint16(i * 32 + 18, 5)
      bytes.set(new TextEncoder().encode(String(i).padStart(5, '0')), i * 32 + 24)
    }
    return bytes
  }
  const snapshots = (count: number, l1Bytes: number, apart: number): readonly [number, Uint8Array] => {
    const bytes = new Uint8Array(count * 64)
    const view = new DataView(bytes.buffer)
    for (let i = 0; i < count; i++) {
      view.setBigUint64(i * 64, BigInt((1 << 28) + i * apart))
      view.setUint32(i * 64 + 8, l1Bytes / 8)
      view.setUint16(i * 64 + 12, 5)
      view.setUint32(i * 64 + 36, 16)
      bytes.set(new TextEncoder().encode(String(i).padStart(5, '0')), i * 64 + 56)
    }
    return [0x40000, bytes]
  }
  const withSnapshots = (count: number) => (view: DataView): void => {
    view.setUint32(60, count)
    view.setBigUint64(64, 0x40000n)
  }

  const images: [string, () => BlockDevice][] = [
    ['a LUKS header of 512 GiB', () => sparseImage(9, 2 ** 40, extension(0x0537be77, (view) => {
      view.setUint32(32, 2)
      view.setBigUint64(120, 2n ** 20n)
      view.setBigUint64(128, 2n ** 39n)
    }))],
    ['a bitmap table of 1 GiB', () => sparseImage(16, 2 ** 32, bitmaps(1, 32, 0x40000), [0x40000, directory(1, 0x800_0000)])],
    ['many bitmaps with one table', () => sparseImage(9, 2 ** 32, bitmaps(8000, 8000 * 32, 0x40000), [0x40000, directory(8000, 2 ** 20)])],
    ['many snapshots with one L1 table', () => sparseImage(16, 2 ** 30, withSnapshots(8000), snapshots(8000, 32 << 20, 0))],
    ['many snapshots whose L1 tables overlap', () => sparseImage(16, 2 ** 30, withSnapshots(8000), snapshots(8000, 32 << 20, 65536))],
    ['one refcount block for a million table entries', () => sparseImage(9, 2 ** 36, (view) => {
      view.setUint32(96, 0)
      view.setBigUint64(48, 0x40000n)
      view.setUint32(56, 1024)
    }, [1024, new Uint8Array(512).fill(0xff)], [0x40000, new Uint8Array(new BigUint64Array(65536).fill(0x0004_0000_0000_0000n).buffer)])],
  ]

  test.each(images)('%s: few reads, findings as asked for', async (_name, image) => {
    const bytes = await bytesRead(image(), (device) => checkImage(device, { maxFindings: 10 }))
    expect(bytes.read).toBeLessThan(2 ** 30 + 2 ** 26)
    expect(bytes.result.corruptions + bytes.result.leaks).toBeGreaterThan(0)
    expect(bytes.result.findings.length).toBeLessThanOrEqual(10)
  })

  test('what the counters may take is the caller’s to say', async () => {
    const [, image] = images.at(-1)!
    const counters = new ClusterCounters(new Budget('this', 10_000))
    expect(() => Array.from({ length: 1000 }, (_, i) => counters.add(i * 1000, 1))).toThrow(expect.objectContaining({ code: 'ERR_UNSUPPORTED' }))
    await expect(checkImage(image(), { maxMemory: 100 })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
  })

  test('a signal ends it between two stretches', async () => {
    const [, image] = images.at(-1)!
    const abort = new AbortController()
    setTimeout(() => abort.abort(new Error('enough')), 1)
    await expect(checkImage(image(), { signal: abort.signal })).rejects.toThrow('enough')
  })
})

async function bytesRead<T>(device: BlockDevice, task: (device: BlockDevice) => Promise<T>): Promise<{ read: number; result: T }> {
  const requests: TracedRequest[] = []
  const result = await task(trace(device, requests))
  return { read: requests.reduce((sum, { length }) => sum + length, 0), result }
}
