import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  allocateAligned,
  fault,
  MemoryDevice,
  NullDevice,
  pad,
  slice,
  trace,
  type FaultRequest,
  type TracedRequest,
} from '../../src/block.ts'
import { padding } from '../../src/block/pad.ts'
import { aligned, pattern } from '../suites/block-device.ts'
import { expectBytes } from '../support/bytes.ts'

describe('trace', () => {
  test('records every request with its time and outcome', async () => {
    let now = 0
    const log: TracedRequest[] = []
    const device = trace(new MemoryDevice(8192, { growable: true }), log, { clock: () => now++ })
    await device.write(512, pattern(1024), { fua: true })
    await device.read(0, 100)
    await device.writeZeroes(0, 10)
    await device.discard(5, 6)
    await device.resize(4096)
    await device.read(4096, 1).catch(() => undefined)
    expect(log).toEqual([
      { operation: 'write', offset: 512, length: 1024, submitted: 0, completed: 1, error: undefined },
      { operation: 'flush', offset: 0, length: 0, submitted: 2, completed: 3, error: undefined },
      { operation: 'read', offset: 0, length: 100, submitted: 4, completed: 5, error: undefined },
      { operation: 'write zeroes', offset: 0, length: 10, submitted: 6, completed: 7, error: undefined },
      { operation: 'discard', offset: 5, length: 6, submitted: 8, completed: 9, error: undefined },
      { operation: 'resize', offset: 4096, length: 0, submitted: 10, completed: 11, error: undefined },
    ])
  })

  test('a request in flight has not completed, a failed one has its error', async () => {
    const log: TracedRequest[] = []
    const stop = new AbortController()
    const error = new Error('broken')
    const device = trace(
      fault(new MemoryDevice(512), ({ index }) => (index === 0 ? { kind: 'never' } : { kind: 'fail', error })),
      log,
    )
    const hanging = device.read(0, 512, { signal: stop.signal })
    await expect(device.read(0, 1)).rejects.toBe(error)
    expect(log.map((request) => [request.completed === undefined, request.error])).toEqual([
      [true, undefined],
      [false, error],
    ])
    stop.abort(new Error('enough'))
    await expect(hanging).rejects.toThrow('enough')
  })
})

describe('fault', () => {
  test('sees requests in order and fails the chosen one', async () => {
    const seen: FaultRequest[] = []
    const device = fault(new MemoryDevice(4096), (request) => {
      seen.push(request)
      return request.index === 1 ? { kind: 'fail' } : undefined
    })
    await device.write(0, pattern(512))
    await expect(device.write(512, pattern(512))).rejects.toMatchObject({
      code: 'ERR_IO',
      operation: 'write',
      offset: 512,
      length: 512,
    })
    await device.flush()
    expectBytes(await device.read(512, 512), new Uint8Array(512))
    expect(seen.map(({ operation, offset, length, index }) => [index, operation, offset, length])).toEqual([
      [0, 'write', 0, 512],
      [1, 'write', 512, 512],
      [2, 'flush', 0, 0],
      [3, 'read', 512, 512],
    ])
  })

  test('tears a write', async () => {
    const device = fault(new MemoryDevice(4096), ({ operation }) => (operation === 'write' ? { kind: 'tear', length: 700 } : undefined))
    await expect(device.write(0, pattern(2048))).rejects.toMatchObject({ code: 'ERR_IO' })
    const expected = new Uint8Array(2048)
    expected.set(pattern(2048).subarray(0, 700))
    expectBytes(await device.read(0, 2048), expected)
  })

  test('delays a request until told', async () => {
    let proceed!: () => void
    const until = new Promise<void>((resolve) => (proceed = resolve))
    const memory = new MemoryDevice(512)
    const device = fault(memory, () => ({ kind: 'delay', until }))
    const writing = device.write(0, pattern(512))
    await Promise.resolve()
    expectBytes(memory.bytes, new Uint8Array(512))
    proceed()
    await writing
    expectBytes(memory.bytes, pattern(512))
  })
})

describe('slice', () => {
  test('moves offsets, and can leave the inner device open', async () => {
    const memory = new MemoryDevice(pattern(4096))
    const part = slice(memory, 1000, 500, { keepOpen: true })
    await part.write(10, new Uint8Array(5))
    expect(memory.bytes.subarray(1010, 1015)).toEqual(new Uint8Array(5))
    await part.close()
    expect(memory.closed).toBe(false)
    await slice(memory, 4000).close()
    expect(memory.closed).toBe(true)
  })

  test('refuses ranges outside the device and misaligned ones', () => {
    expect(() => slice(new MemoryDevice(10), 5, 6)).toThrow(RangeError)
    expect(() => slice(new MemoryDevice(4096, { limits: { requestAlignment: 512 } }), 100, 512)).toThrow(/multiples of 512/)
  })
})

describe('padding', () => {
  test('cuts at sector borders', () => {
    fc.assert(
      fc.property(fc.nat(10_000), fc.nat(10_000), fc.constantFrom(1, 512, 4096), (offset, length, alignment) => {
        const end = offset + length
        const { body, tail } = padding(offset, end, alignment)
        expect(offset <= body && body <= tail && tail <= end).toBe(true)
        expect(body === end || body % alignment === 0).toBe(true)
        if (tail > body) expect(tail % alignment).toBe(0)
        expect(body - offset).toBeLessThan(alignment)
        expect(end - tail).toBeLessThan(alignment)
      }),
    )
  })

  const demanding = { requestAlignment: 512, memoryAlignment: 512 }

  test('a device without demands is returned itself', () => {
    const memory = new MemoryDevice(512)
    expect(pad(memory)).toBe(memory)
  })

  test('aligned requests pass as they are, others are padded', async () => {
    const log: TracedRequest[] = []
    const device = pad(trace(new MemoryDevice(8192, { limits: demanding }), log))
    await device.write(512, aligned(pattern(1024)))
    await device.write(100, pattern(100))
    await device.write(400, pattern(1000))
    expect(log.map(({ operation, offset, length }) => [operation, offset, length])).toEqual([
      ['write', 512, 1024],
      ['read', 0, 512],
      ['write', 0, 512],
      ['read', 0, 512],
      ['write', 0, 512],
      ['write', 512, 512],
      ['read', 1024, 512],
      ['write', 1024, 512],
    ])
  })

  test('neighbours within a sector do not undo each other', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(fc.integer({ min: 1, max: 700 }), { minLength: 2, maxLength: 20 }), async (lengths) => {
        const total = lengths.reduce((sum, length) => sum + length, 0)
        const device = pad(new MemoryDevice(Math.ceil(total / 512) * 512, { limits: demanding }))
        const content = pattern(total)
        let at = 0
        const writes = lengths.map((length) => {
          at += length
          return device.write(at - length, content.subarray(at - length, at))
        })
        await Promise.all(writes)
        expectBytes(await device.read(0, total), content)
      }),
    )
  })

  test('any requests at once, while the device grows and shrinks under a filter that delays them', async () => {
    const limits = { requestAlignment: 4096, memoryAlignment: 1 }
    const one = fc.record({ kind: fc.constantFrom('write', 'write', 'zeroes', 'read', 'flush'), gap: fc.constantFrom(0, 1, 500, 3000, 4096), length: fc.oneof(fc.constantFrom(4096, 8192), fc.integer({ min: 1, max: 9000 })) })
    const batch = fc.record({ requests: fc.array(one, { minLength: 1, maxLength: 8 }), start: fc.nat(20_000), resize: fc.option(fc.nat(20_000), { freq: 3 }) })
    await fc.assert(
      fc.asyncProperty(fc.integer({ min: 1, max: 20_000 }), fc.array(batch, { minLength: 1, maxLength: 4 }), fc.infiniteStream(fc.nat(3)), async (size, batches, delays) => {
        const turns = async (count: number): Promise<void> => {
          for (let i = 0; i < count; i++) await new Promise((resolve) => setImmediate(resolve))
        }
        const host = new MemoryDevice(size, { growable: true, limits })
        const device = pad(fault(host, () => ({ kind: 'delay', until: turns(Number(delays.next().value)) })))
        let model = new Uint8Array(size)
        for (const { requests, start, resize } of batches) {
          const before = model
          const running: Promise<unknown>[] = []
          let at = Math.min(start, model.length)
          for (const { kind, gap, length } of requests) {
            at += gap
            if (kind === 'flush') running.push(device.flush())
            else if (kind === 'read') {
              // what is written after it in the same batch lies further on
              const [from, end] = [at, Math.min(before.length, at + length)]
              if (from < end) running.push(device.read(from, end - from).then((bytes) => expectBytes(bytes, before.subarray(from, end))))
              at = Math.max(at, end)
            } else {
              const longer = new Uint8Array(Math.max(model.length, at + length))
              longer.set(model)
              const bytes = kind === 'write' ? pattern(length, at) : new Uint8Array(length)
              longer.set(bytes, at)
              model = longer
              running.push(kind === 'write' ? device.write(at, bytes) : device.writeZeroes(at, length))
              at += length
            }
          }
          await Promise.all(running)
          expect(device.size).toBe(model.length)
          if (resize !== null) {
            const kept = Math.min(resize, model.length)
            const part = device.read(0, Math.min(kept, 5000))
            await Promise.all([device.resize(resize), part])
            expectBytes(await part, model.subarray(0, Math.min(kept, 5000)))
            const next = new Uint8Array(resize)
            next.set(model.subarray(0, kept))
            model = next
          }
          expectBytes(await device.read(0, device.size), model)
        }
        await device.flush()
        expectBytes(host.bytes.subarray(0, host.size), model)
      }),
      { numRuns: 300 },
    )
  })

  test('large requests from ordinary memory', async () => {
    const device = pad(new MemoryDevice(2 << 20, { limits: demanding }))
    const content = pattern(1_500_001)
    await device.write(333, content)
    expectBytes(await device.read(333, content.length), content)
    const target = allocateAligned(content.length)
    await device.readInto(333, target)
    expectBytes(target, content)
  })
})

test('the null device reads zeroes and forgets', async () => {
  await using device = new NullDevice(2 ** 40)
  await device.write(1 << 30, pattern(100))
  expectBytes(await device.read(1 << 30, 100), new Uint8Array(100))
  await device.writeZeroes(0, 2 ** 40)
  await device.flush()
})
