/** Virtual time behind the asynchronous device: what counts as queued, what a partial sector costs, whose bytes they are. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { anyRequest, BaseDevice, type BlockLimits } from '../../src/block/device.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { simulatedDisk, type DiskCommand, type SimulatedDisk } from '../../src/block/simulated-disk.ts'

import { blockDeviceSuite } from '../suites/block-device.ts'

const MiB = 1 << 20

blockDeviceSuite('simulatedDisk', (content) => simulatedDisk(new MemoryDevice(content)), { resizable: true })

/** A device that takes anything and keeps what it is given if `bytes` is given. */
class Store extends BaseDevice {
  readonly size: number
  readonly readOnly = false
  readonly limits: BlockLimits = anyRequest
  readonly bytes: Uint8Array | undefined
  failAt = -1

  constructor(size: number, bytes?: Uint8Array) {
    super()
    this.size = size
    this.bytes = bytes
  }

  protected onRead(offset: number, target: Uint8Array): Promise<void> {
    if (offset === this.failAt) return Promise.reject(new Error('medium'))
    if (this.bytes !== undefined) target.set(this.bytes.subarray(offset, offset + target.length))
    return Promise.resolve()
  }

  protected onWrite(offset: number, source: Uint8Array): Promise<void> {
    if (offset === this.failAt) return Promise.reject(new Error('medium'))
    this.bytes?.set(source, offset)
    return Promise.resolve()
  }

  protected onFlush(): Promise<void> {
    return Promise.resolve()
  }

  protected onClose(): Promise<void> {
    return Promise.resolve()
  }
}

/** Writes `total` bytes in `size` pieces with at most `depth` in flight; MB/s of virtual time. */
async function queued(disk: SimulatedDisk, operation: 'read' | 'write', size: number, depth: number, total: number): Promise<number> {
  const buffer = new Uint8Array(size)
  const before = disk.elapsed
  let next = 0
  const worker = async (): Promise<void> => {
    while (next < total) {
      const at = next
      next += size
      await (operation === 'read' ? disk.readInto(at, buffer) : disk.write(at, buffer))
    }
  }
  await Promise.all(Array.from({ length: depth }, worker))
  return total / (disk.elapsed - before)
}

describe('queue', () => {
  test.each([[64, 2], [64, 4], [128, 2], [256, 2], [1024, 2], [1024, 4], [2048, 2], [4096, 2]])(
    'slabs of %i KiB at depth %i: the media rate, less a hundredth at most',
    async (kib, depth) => {
      await using disk = simulatedDisk(new Store(256 * MiB))
      const rate = await queued(disk, 'write', kib << 10, depth, 256 * MiB)
      expect(rate).toBeGreaterThan((0.99 * disk.mediaRate) / 1e6)
      expect(rate).toBeLessThanOrEqual(disk.mediaRate / 1e6)
    },
  )

  test('depth 1 loses a turn for each request, for reads only without read-ahead', async () => {
    const rate = async (operation: 'read' | 'write', size: number, depth: number): Promise<number> => {
      await using disk = simulatedDisk(new Store(256 * MiB), { readAhead: 0 })
      return await queued(disk, operation, size, depth, 256 * MiB)
    }
    expect(await rate('write', 64 << 10, 1)).toBeCloseTo(14.77, 1)
    expect(await rate('read', MiB, 1)).toBeCloseTo(95.4, 1)
    expect(await rate('read', MiB, 2)).toBeCloseTo(149.7, 1)
  })

  test('completions come in order, one in a turn, and the clock stands at each when its promise settles', async () => {
    await using disk = simulatedDisk(new Store(8 * MiB))
    const seen: [number, number][] = []
    await Promise.all([0, 1, 2].map(async (n) => {
      await disk.write(n * MiB, new Uint8Array(MiB))
      seen.push([n, disk.elapsed])
    }))
    expect(seen.map(([n]) => n)).toEqual([0, 1, 2])
    const [first, second, third] = seen.map(([, time]) => time) as [number, number, number]
    expect(second - first).toBeCloseTo((2048 * 4000) / 1172, 3)
    expect(third - second).toBeCloseTo((2048 * 4000) / 1172, 3)
  })

  test('idle lets the disk turn meanwhile', async () => {
    await using disk = simulatedDisk(new Store(MiB))
    disk.idle(12_345)
    expect(disk.elapsed).toBe(12_345)
    await disk.write(0, new Uint8Array(512))
    // the next time sector 0 comes round is a whole number of turns
    expect(disk.elapsed).toBeCloseTo(16_000 + 4000 / 1172, 6)
    expect(() => disk.idle(-1)).toThrow(RangeError)
  })
})

describe('partial sectors', () => {
  const record = async (use: (disk: SimulatedDisk) => Promise<void>): Promise<string[]> => {
    const log: DiskCommand[] = []
    await using disk = simulatedDisk(new Store(MiB), { onCommand: (command) => log.push(command) })
    await use(disk)
    for (let n = 1; n < log.length; n++) expect(log[n]!.issued).toBeCloseTo(log[n - 1]!.completed + 100, 6)
    return log.map(({ operation, offset, length, depth }) => `${operation} ${offset}+${length} depth ${depth}`)
  }

  test('the sectors at both ends are read, then the whole is written, strictly one after another', async () => {
    expect(await record((disk) => disk.write(192, new Uint8Array(131_328)))).toEqual([
      'read 0+512 depth 1', 'read 131072+512 depth 1', 'write 0+131584 depth 1',
    ])
  })

  test('one read where both ends lie in one sector or one end is aligned; none for whole sectors', async () => {
    expect(await record((disk) => disk.write(700, new Uint8Array(10)))).toEqual(['read 512+512 depth 1', 'write 512+512 depth 1'])
    expect(await record((disk) => disk.write(512, new Uint8Array(513)))).toEqual(['read 1024+512 depth 1', 'write 512+1024 depth 1'])
    expect(await record((disk) => disk.writeZeroes(1024, 4096))).toEqual(['write 1024+4096 depth 1'])
  })

  test('a read is rounded out', async () => {
    expect(await record(async (disk) => disk.readInto(28_728, new Uint8Array(28_728)))).toEqual(['read 28672+29184 depth 1'])
  })

  test('the old pattern on the device: 26.9 MB/s', async () => {
    await using disk = simulatedDisk(new Store(256 * MiB))
    const piece = new Uint8Array(131_328)
    const count = 1000
    for (let n = 0; n < count; n++) await disk.write(192 + n * piece.length, piece)
    expect((count * piece.length) / disk.elapsed).toBeCloseTo(26.93, 1)
  })
})

describe('as a filter', () => {
  test('keeps the bytes, whatever is in flight', async () => {
    const write = fc.record({ at: fc.nat(60_000), length: fc.integer({ min: 1, max: 4000 }), wait: fc.boolean() })
    await fc.assert(
      fc.asyncProperty(fc.array(write, { maxLength: 30 }), async (writes) => {
        const model = new Uint8Array(65_536)
        await using disk = simulatedDisk(new Store(65_536, new Uint8Array(65_536)))
        const all: Promise<void>[] = []
        for (const [n, { at, length, wait }] of writes.entries()) {
          model.fill(n + 1, at, at + length)
          const done = disk.write(at, new Uint8Array(length).fill(n + 1))
          if (wait) await done
          else all.push(done)
        }
        await Promise.all(all)
        expect(Buffer.compare(await disk.read(0, 65_536), model)).toBe(0)
      }),
      { numRuns: 30 },
    )
  })

  test('the inner failure reaches the caller, the disk goes on', async () => {
    const store = new Store(MiB, new Uint8Array(MiB))
    store.failAt = 4096
    await using disk = simulatedDisk(store)
    const [bad, good] = await Promise.allSettled([disk.write(4096, new Uint8Array(512)), disk.write(8192, new Uint8Array(512))])
    expect(bad).toMatchObject({ status: 'rejected', reason: { message: 'medium' } })
    expect(good.status).toBe('fulfilled')
    await expect(disk.read(4096, 1)).rejects.toThrow('medium')
    await disk.flush()
  })

  test('closes the inner device', async () => {
    const store = new Store(MiB)
    await simulatedDisk(store).close()
    expect(store.closed).toBe(true)
  })

  test('refuses a disk that cannot be', () => {
    for (const bad of [{ rpm: 0 }, { sectorSize: -1 }, { sectorsPerTrack: Number.NaN }, { physicalSectorSize: 700 }, { hostGap: -1 }]) {
      expect(() => simulatedDisk(new Store(1), bad)).toThrow(RangeError)
    }
  })
})
