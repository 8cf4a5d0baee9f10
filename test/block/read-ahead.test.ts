import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  AlignedWriteQueue,
  fault,
  fixedWindow,
  growingWindow,
  MemoryDevice,
  pad,
  readAhead,
  ReadAheadPrefetcher,
  trace,
  type BlockDevice,
  type FaultPlan,
  type TracedRequest,
} from '../../src/block.ts'
import { blockDeviceSuite, pattern } from '../suites/block-device.ts'
import { expectBytes } from '../support/bytes.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 2000 : 100

blockDeviceSuite('read-ahead filter', (content) => readAhead(new MemoryDevice(content, { growable: true }), { chunkSize: 8192 }))
blockDeviceSuite('read-ahead filter on an aligned device', (content) =>
  readAhead(new MemoryDevice(content, { limits: { requestAlignment: 512, memoryAlignment: 512 } }), { chunkSize: 4096 }),
{ resizable: true })

/** Delays every request by some turns of the event loop, so that they overlap. */
function slow(device: BlockDevice, turns: readonly number[]): BlockDevice {
  return fault(device, ({ index }) => ({ kind: 'delay', until: wait(turns[index % turns.length] ?? 0) }))
}

async function wait(turns: number): Promise<void> {
  for (let turn = 0; turn < turns; turn++) await new Promise(setImmediate)
}

const shapes = fc.record({
  size: fc.oneof(fc.nat(3000), fc.nat(200_000)),
  alignment: fc.constantFrom(1, 512, 4096),
  chunks: fc.integer({ min: 1, max: 5 }),
  window: fc.integer({ min: 0, max: 4 }),
  turns: fc.array(fc.nat(3), { minLength: 1, maxLength: 5 }),
  growing: fc.boolean(),
})

type Step = { readonly read: number } | { readonly seek: number } | 'next' | 'drop'

const steps = fc.array(
  fc.oneof(
    { weight: 4, arbitrary: fc.oneof(fc.nat(100), fc.nat(20_000)).map((read): Step => ({ read })) },
    { weight: 2, arbitrary: fc.constant<Step>('next') },
    { weight: 2, arbitrary: fc.double({ min: 0, max: 1, noNaN: true }).map((seek): Step => ({ seek })) },
    { weight: 1, arbitrary: fc.constant<Step>('drop') },
  ),
  { maxLength: 25 },
)

describe('ReadAheadPrefetcher', () => {
  test('closing waits for the reads that look for the good part of a failed chunk, and no bytes come after it', async () => {
    let running = 0
    const device = fault(new MemoryDevice(64 << 10), ({ length, index }) => {
      if (index === 0) return { kind: 'fail' }
      running++
      const until = wait(5).then(() => {
        running--
        if (length > 4096) throw new Error('bad')
      })
      return { kind: 'delay', until }
    })
    const ahead = new ReadAheadPrefetcher(device, { chunkSize: 32 << 10, window: 0 })
    const next = ahead.next().then(() => 'bytes', (error: unknown) => (error as { code?: string }).code)
    await wait(8)
    expect(running).toBe(1)
    await ahead.close()
    expect(running).toBe(0)
    expect(await next).toBe('ERR_CLOSED')
  })

  test('closing ends a call that waits', async () => {
    const ahead = new ReadAheadPrefetcher(slow(new MemoryDevice(64 << 10), [3]), { chunkSize: 4096 })
    const calls = [ahead.next(), ahead.close()]
    await expect(calls[0]).rejects.toMatchObject({ code: 'ERR_CLOSED' })
    await calls[1]
  })

  test('a device that grows after its last, partial sector was read is read on at sectors', async () => {
    const host = new MemoryDevice(6144, { growable: true, limits: { requestAlignment: 4096, memoryAlignment: 1 } })
    await using ahead = new ReadAheadPrefetcher(host, { chunkSize: 4096, window: 3 })
    expect(await ahead.read(100)).toHaveLength(100)
    await host.resize(12_288)
    expect(await ahead.read(20_000)).toHaveLength(12_188)
  })

  test('any pattern of reads equals the bytes of the device; requests are aligned, bounded and in sequence', async () => {
    await fc.assert(
      fc.asyncProperty(shapes, steps, async (shape, pattern_) => {
        const { size, alignment, window, growing } = shape
        const content = pattern(size)
        const log: TracedRequest[] = []
        const memory = new MemoryDevice(content, { limits: { requestAlignment: alignment, memoryAlignment: alignment } })
        const chunkSize = shape.chunks * 4096
        await using prefetcher = new ReadAheadPrefetcher(slow(trace(memory, log), shape.turns), {
          chunkSize,
          window,
          ...(growing ? { policy: growingWindow(window) } : {}),
        })
        let at = 0
        for (const step of pattern_) {
          if (step === 'drop') prefetcher.drop()
          else if (step === 'next') {
            const bytes = await prefetcher.next()
            if (at === size) expect(bytes).toBeUndefined()
            else {
              expect(bytes!.length).toBeGreaterThan(0)
              expectBytes(bytes!, content.subarray(at, at + bytes!.length))
              at += bytes!.length
            }
          } else if ('seek' in step) {
            at = Math.floor(step.seek * size)
            prefetcher.seek(at)
          } else {
            const bytes = await prefetcher.read(step.read)
            expectBytes(bytes, content.subarray(at, Math.min(size, at + step.read)))
            at += bytes.length
          }
          expect(prefetcher.position).toBe(at)
        }
        for (const { offset, length } of log) {
          expect(offset % alignment).toBe(0)
          expect(length).toBeLessThanOrEqual(chunkSize)
        }
      }),
      { numRuns },
    )
  })

  test('a sequential reader reads every byte once, in whole chunks, at most window ahead', async () => {
    const log: TracedRequest[] = []
    const memory = new MemoryDevice(pattern(100_000))
    let most = 0
    const watched = fault(trace(memory, log), () => {
      most = Math.max(most, log.filter((request) => request.completed === undefined).length + 1)
      return { kind: 'delay', until: wait(1) }
    })
    await using prefetcher = new ReadAheadPrefetcher(watched, { chunkSize: 8192, window: 2 })
    const parts: Uint8Array[] = []
    for await (const bytes of prefetcher) parts.push(bytes.slice())
    expectBytes(Buffer.concat(parts), memory.bytes)
    expect(log.map(({ offset }) => offset)).toEqual(Array.from({ length: 13 }, (_, index) => index * 8192))
    expect(most).toBeLessThanOrEqual(2)
  })

  test('a range inside the device, read no further than its alignment demands', async () => {
    const log: TracedRequest[] = []
    const content = pattern(64 << 10)
    const device = trace(new MemoryDevice(content, { limits: { requestAlignment: 512, memoryAlignment: 512 } }), log)
    await using prefetcher = new ReadAheadPrefetcher(device, { offset: 1000, end: 20_000, chunkSize: 8192 })
    expectBytes(await prefetcher.read(1 << 20), content.subarray(1000, 20_000))
    expect(log.map(({ offset, length }) => [offset, length])).toEqual([
      [512, 7680],
      [8192, 8192],
      [16_384, 4096],
    ])
  })

  test('a seek inside what is read ahead asks for nothing, one outside starts anew', async () => {
    const log: TracedRequest[] = []
    const content = pattern(100_000)
    await using prefetcher = new ReadAheadPrefetcher(trace(new MemoryDevice(content), log), { chunkSize: 4096, window: 3 })
    await prefetcher.read(10)
    await wait(1)
    const before = log.length
    prefetcher.seek(9000)
    expectBytes(await prefetcher.read(100), content.subarray(9000, 9100))
    expect(log.slice(before).every(({ offset }) => offset >= before * 4096)).toBe(true)
    prefetcher.seek(50_000)
    expectBytes(await prefetcher.read(100), content.subarray(50_000, 50_100))
    expect(log.some(({ offset }) => offset === 50_000)).toBe(true)
  })

  test('a bad byte fails the read that reaches it, after all bytes before it', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.nat(99_999),
        fc.integer({ min: 1, max: 30_000 }),
        fc.constantFrom(1, 512),
        fc.integer({ min: 0, max: 3 }),
        async (bad, step, alignment, window) => {
          const content = pattern(100_000)
          const error = new Error('bad sector')
          const plan: FaultPlan = ({ offset, length }) =>
            offset <= bad && bad < offset + length ? { kind: 'fail', error } : undefined
          const memory = new MemoryDevice(content, { limits: { requestAlignment: alignment } })
          const device = fault(memory, plan)
          await using prefetcher = new ReadAheadPrefetcher(device, { chunkSize: 16_384, window })
          const parts: Uint8Array[] = []
          const reading = (async () => {
            for (;;) {
              const bytes = await prefetcher.next()
              if (bytes === undefined) return
              for (let at = 0; at < bytes.length; at += step) parts.push(bytes.slice(at, at + step))
            }
          })()
          await expect(reading).rejects.toBe(error)
          const sector = bad - (bad % alignment)
          expect(prefetcher.position).toBe(sector)
          expectBytes(Buffer.concat(parts), content.subarray(0, sector))
          await expect(prefetcher.next()).rejects.toBe(error)
          prefetcher.seek(0)
          expectBytes(await prefetcher.read(Math.min(sector, 1000)), content.subarray(0, Math.min(sector, 1000)))
        },
      ),
      { numRuns },
    )
  })

  test('one failed request is not hidden', async () => {
    await fc.assert(
      fc.asyncProperty(fc.nat(9), fc.nat(3), async (bad, window) => {
        const error = new Error('failed once')
        const device = fault(new MemoryDevice(pattern(100_000)), ({ index }) => (index === bad ? { kind: 'fail', error } : undefined))
        await using prefetcher = new ReadAheadPrefetcher(device, { chunkSize: 10_000, window })
        await expect(prefetcher.read(100_000)).rejects.toBe(error)
      }),
      { numRuns },
    )
  })

  test('aborting ends a read that never completes', async () => {
    const reason = new Error('enough')
    const device = fault(new MemoryDevice(100), () => ({ kind: 'never' }))
    const stop = new AbortController()
    const prefetcher = new ReadAheadPrefetcher(device)
    const reading = prefetcher.next({ signal: stop.signal })
    await expect(prefetcher.next()).rejects.toMatchObject({ code: 'ERR_BUSY' })
    stop.abort(reason)
    await expect(reading).rejects.toBe(reason)
    await prefetcher.close()
    await expect(prefetcher.next()).rejects.toMatchObject({ code: 'ERR_CLOSED' })
    const whole = new AbortController()
    await using other = new ReadAheadPrefetcher(device, { signal: whole.signal })
    const waiting = other.next()
    whole.abort(reason)
    await expect(waiting).rejects.toBe(reason)
  })

  test('refuses sizes that make no sense', () => {
    const device = new MemoryDevice(4096, { limits: { requestAlignment: 512 } })
    expect(() => new ReadAheadPrefetcher(device, { chunkSize: 1000 })).toThrow(/multiple of 512/)
    expect(() => new ReadAheadPrefetcher(device, { window: -1 })).toThrow(RangeError)
    expect(() => new ReadAheadPrefetcher(device, { offset: 5000 })).toThrow(RangeError)
  })
})

describe('window policies', () => {
  test('fixed', () => {
    const policy = fixedWindow(4, 2)
    expect(policy({ sequential: 0, ahead: 0, inFlight: 1 })).toBe(1)
    expect(policy({ sequential: 0, ahead: 3, inFlight: 0 })).toBe(1)
    expect(policy({ sequential: 9, ahead: 4, inFlight: 0 })).toBe(0)
  })

  test('growing', () => {
    const policy = growingWindow(4)
    const targets = [0, 1, 2, 3, 4, 100].map((sequential) => policy({ sequential, ahead: 0, inFlight: 0 }))
    expect(targets).toEqual([0, 1, 2, 4, 4, 4])
  })
})

describe('readAhead', () => {
  test('serves a sequence from few large requests, and passes random reads as they are', async () => {
    const log: TracedRequest[] = []
    const content = pattern(1 << 20)
    await using device = readAhead(trace(new MemoryDevice(content), log), { chunkSize: 64 << 10 })
    for (let at = 0; at < 512 << 10; at += 4096) expectBytes(await device.read(at, 4096), content.subarray(at, at + 4096))
    expect(log.length).toBeLessThan(20)
    const before = log.length
    expectBytes(await device.read(900_000, 100), content.subarray(900_000, 900_100))
    expect(log.slice(before).map(({ offset, length }) => [offset, length])).toEqual([[900_000, 100]])
  })

  test('never serves bytes from before a write that has ended', async () => {
    const change = fc.record({ offset: fc.nat(60_000), length: fc.nat(5000), kind: fc.constantFrom('read', 'on', 'write', 'zero') })
    await fc.assert(
      fc.asyncProperty(fc.array(change, { maxLength: 40 }), fc.array(fc.nat(2), { minLength: 1 }), async (changes, turns) => {
        const model = pattern(65_536)
        await using device = readAhead(slow(new MemoryDevice(model.slice()), turns), { chunkSize: 4096 })
        let at = 0
        for (const [index, { offset, length, kind }] of changes.entries()) {
          if (kind === 'write') {
            model.set(pattern(length, index), offset)
            await device.write(offset, pattern(length, index))
          } else if (kind === 'zero') {
            model.fill(0, offset, offset + length)
            await device.writeZeroes(offset, length)
          } else {
            if (kind === 'read' || at + length > 65_536) at = offset
            expectBytes(await device.read(at, length), model.subarray(at, at + length))
            at += length
          }
        }
      }),
      { numRuns },
    )
  })

  test('a failing read gives the error of that request', async () => {
    const memory = new MemoryDevice(pattern(65_536))
    const bad = 20_000
    await using device = readAhead(
      fault(memory, ({ offset, length }) => (offset <= bad && bad < offset + length ? { kind: 'fail' } : undefined)),
      { chunkSize: 16_384 },
    )
    for (let at = 0; at < 19_000; at += 1000) expectBytes(await device.read(at, 1000), memory.bytes.subarray(at, at + 1000))
    await device.read(19_000, 1000)
    await expect(device.read(20_000, 1000)).rejects.toMatchObject({ code: 'ERR_IO', offset: 20_000, length: 1000 })
    expectBytes(await device.read(21_000, 1000), memory.bytes.subarray(21_000, 22_000))
  })
})

test('queue, then prefetcher: a byte stream goes through a device and comes back', async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(fc.nat(9000), { maxLength: 20 }), async (sizes) => {
      const memory = new MemoryDevice(0, { growable: true, limits: { requestAlignment: 512, memoryAlignment: 512 } })
      const parts = sizes.map((size, index) => pattern(size, index))
      const device = pad(memory)
      const queue = new AlignedWriteQueue(device, { slabSize: 8192 })
      for (const part of parts) await queue.write(part)
      await queue.close()
      const whole = Buffer.concat(parts)
      await using prefetcher = new ReadAheadPrefetcher(device, { chunkSize: 4096 })
      expectBytes(await prefetcher.read(whole.length), whole)
    }),
    { numRuns: 30 },
  )
})
