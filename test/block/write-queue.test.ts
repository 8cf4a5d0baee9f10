import { readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { AlignedWriteQueue, deviceSink, fault, isMemoryAligned, MemoryDevice, openFile, type WriteSink } from '../../src/block.ts'
import { pattern } from '../suites/block-device.ts'
import { expectBytes } from '../support/bytes.ts'
import { tempFolder } from '../support/temp.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 2000 : 100

interface Submitted {
  offset: number
  length: number
}

/** A sink in memory that completes requests late and out of order, and watches the rules. */
class WatchingSink implements WriteSink {
  readonly content = new MemoryDevice(0, { growable: true })
  readonly submitted: Submitted[] = []
  readonly completions: number[] = []
  inFlight = 0
  mostInFlight = 0
  flushes: number[] = []
  readonly #turns: readonly number[]

  constructor(turns: readonly number[] = [0]) {
    this.#turns = turns
  }

  async submit(offset: number, bytes: Uint8Array): Promise<void> {
    const wait = this.#turns[this.submitted.length % this.#turns.length] ?? 0
    this.submitted.push({ offset, length: bytes.length })
    this.mostInFlight = Math.max(this.mostInFlight, ++this.inFlight)
    expect(isMemoryAligned(bytes, 4096)).toBe(true)
    const before = bytes.slice()
    for (let turn = 0; turn < wait; turn++) await new Promise(setImmediate)
    expectBytes(bytes, before)
    await this.content.write(offset, bytes)
    this.inFlight--
  }

  completed(end: number): void {
    this.completions.push(end)
  }

  async flush(end: number): Promise<void> {
    expect(this.inFlight).toBe(0)
    this.flushes.push(end)
    return Promise.resolve()
  }
}

const feeds = fc.array(fc.oneof(fc.nat(40), fc.nat(5000), fc.nat(40_000), fc.constantFrom(4096, 8192, 'flush' as const)), { maxLength: 25 })
const shapes = fc.record({
  alignment: fc.constantFrom(512, 4096, 16_384),
  padTo: fc.constantFrom(1, 512),
  slabSize: fc.constantFrom(1, 4096, 10_000, 65_536),
  depth: fc.integer({ min: 1, max: 5 }),
  turns: fc.array(fc.nat(3), { minLength: 1, maxLength: 6 }),
})

describe('properties', () => {
  test('any sequence of writes equals the concatenation; requests are aligned and bounded', async () => {
    await fc.assert(
      fc.asyncProperty(feeds, shapes, fc.boolean(), async (feed, { turns, ...options }, patient) => {
        const sink = new WatchingSink(turns)
        const progress: number[] = []
        const queue = new AlignedWriteQueue(sink, { ...options, onProgress: ({ done }) => progress.push(done) })
        const parts: Uint8Array[] = []
        const waits: Promise<void>[] = []
        for (const [index, item] of feed.entries()) {
          const wait = item === 'flush' ? queue.flush() : queue.write((parts[index] = pattern(item, index + 1)))
          if (patient) await wait
          else if (wait !== undefined) waits.push(wait)
        }
        await Promise.all(waits)
        const whole = Buffer.concat(parts.filter((part) => part instanceof Uint8Array))
        expect(queue.position).toBe(whole.length)
        await queue.close()
        const { content, submitted } = sink
        expectBytes(content.bytes.subarray(0, whole.length), whole)
        expect(content.bytes.subarray(whole.length).every((byte) => byte === 0)).toBe(true)
        expect(content.size).toBe(Math.ceil(whole.length / options.padTo) * options.padTo)
        expect(sink.mostInFlight).toBeLessThanOrEqual(options.depth)
        expect(submitted.every(({ offset }) => offset % options.alignment === 0)).toBe(true)
        expect(submitted.every(({ length }) => length % options.padTo === 0)).toBe(true)
        expect(ascending(submitted.map(({ offset }) => offset))).toBe(true)
        expect(ascending(progress)).toBe(true)
        expect(progress).toEqual(sink.completions)
        expect(queue.stored).toBe(whole.length)
        expect(sink.flushes.at(-1)).toBe(whole.length)
      }),
      { numRuns },
    )
  })

  test('without flushes every request but the last is a whole slab, none overlaps', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(fc.nat(20_000), { maxLength: 20 }), shapes, async (sizes, { turns, ...options }) => {
        const sink = new WatchingSink(turns)
        await using queue = new AlignedWriteQueue(sink, options)
        for (const size of sizes) await queue.write(pattern(size))
        await queue.flush()
        const slab = Math.ceil(options.slabSize / options.alignment) * options.alignment
        sink.submitted.forEach(({ offset, length }, index) => {
          expect(offset).toBe(index * slab)
          if (index < sink.submitted.length - 1) expect(length).toBe(slab)
        })
      }),
      { numRuns },
    )
  })

  test('a fault at any request reaches the caller, every later call, and close; nothing hangs', async () => {
    await fc.assert(
      fc.asyncProperty(fc.nat(11), fc.integer({ min: 1, max: 4 }), fc.constantFrom('fail', 'tear'), async (bad, depth, kind) => {
        const error = new Error('bad sector')
        const memory = new MemoryDevice(0, { growable: true })
        const device = fault(memory, ({ index }) =>
          index !== bad ? undefined : kind === 'fail' ? { kind: 'fail', error } : { kind: 'tear', length: 100, error },
        )
        const queue = new AlignedWriteQueue(device, { slabSize: 4096, depth })
        const outcome = (async () => {
          for (let count = 0; count < 30; count++) await queue.write(pattern(1500))
          await queue.flush()
        })()
        await expect(outcome).rejects.toBe(error)
        await expect(queue.write(pattern(1))).rejects.toBe(error)
        await expect(queue.flush()).rejects.toBe(error)
        await expect(queue.close()).rejects.toBe(error)
        await expect(queue.close()).rejects.toBe(error)
        expect(queue.stored).toBeLessThanOrEqual(bad * 4096)
        expectBytes(memory.bytes.subarray(0, queue.stored), concatenation(30, 1500).subarray(0, queue.stored))
      }),
      { numRuns },
    )
  })
})

describe('the fast path', () => {
  test('returns undefined while there is room, a promise when all slabs are in flight', async () => {
    const held: (() => void)[] = []
    const sink: WriteSink = { submit: () => new Promise((resolve) => held.push(resolve)) }
    const queue = new AlignedWriteQueue(sink, { slabSize: 4096, depth: 2 })
    expect(queue.write(pattern(12_288))).toBeUndefined() // two in flight, one full
    expect(held.length).toBe(2)
    const waiting = queue.write(pattern(1))
    expect(waiting).toBeInstanceOf(Promise)
    expect(queue.position).toBe(12_288)
    await Promise.resolve()
    held[0]!()
    await waiting
    expect(held.length).toBe(3)
    expect(queue.position).toBe(12_289)
    for (let index = 1; index < 3; index++) held[index]!()
    const closing = queue.close()
    while (held.length < 4) await new Promise(setImmediate)
    held[3]!()
    await closing
  })

  test('bytes may be changed as soon as write returned undefined', async () => {
    const sink = new WatchingSink()
    await using queue = new AlignedWriteQueue(sink)
    const bytes = pattern(100)
    expect(queue.write(bytes)).toBeUndefined()
    bytes.fill(0)
    await queue.flush()
    expectBytes(sink.content.bytes.subarray(0, 100), pattern(100))
  })
})

describe('giving up', () => {
  test('an aborted signal rejects a waiting write and later calls with its reason', async () => {
    const stop = new AbortController()
    const device = fault(new MemoryDevice(0, { growable: true }), () => ({ kind: 'never' }))
    const queue = new AlignedWriteQueue(device, { slabSize: 4096, depth: 1, signal: stop.signal })
    const waiting = queue.write(pattern(20_000))
    const reason = new Error('enough')
    stop.abort(reason)
    await expect(waiting).rejects.toBe(reason)
    await expect(queue.flush()).rejects.toBe(reason)
    await expect(queue.close()).rejects.toBe(reason)
    const late = new AlignedWriteQueue(device, { signal: stop.signal })
    await expect(late.write(pattern(1))).rejects.toBe(reason)
    await late.abort()
  })

  test('abort waits for requests in flight, drops the rest and closes quietly', async () => {
    const sink = new WatchingSink([3])
    const queue = new AlignedWriteQueue(sink, { slabSize: 4096, depth: 2 })
    await queue.write(pattern(10_000))
    await queue.abort()
    expect(sink.inFlight).toBe(0)
    expect(sink.submitted.length).toBe(2)
    expect(sink.flushes).toEqual([])
    await queue.close()
    await expect(queue.write(pattern(1))).rejects.toMatchObject({ code: 'ERR_CLOSED' })
  })

  test('a sink that throws, in submit, completed or flush, is an error like any other', async () => {
    const error = new Error('thrown')
    const throwing = (): never => {
      throw error
    }
    const store = (): Promise<void> => Promise.resolve()
    for (const sink of [{ submit: throwing }, { submit: store, completed: throwing }, { submit: store, flush: throwing }]) {
      const queue = new AlignedWriteQueue(sink)
      await queue.write(pattern(10))
      await expect(queue.flush()).rejects.toBe(error)
      await expect(queue.close()).rejects.toBe(error)
    }
  })
})

describe('on a device', () => {
  test.each([{ direct: false }, { direct: true }])('a file ends up with exactly the bytes written, %j', async (mode) => {
    const path = join(tempFolder(), 'out')
    await using device = await openFile(path, { create: 'wx', ...mode })
    await using queue = new AlignedWriteQueue(device, { slabSize: 65_536 })
    const content = pattern(333_333)
    for (let at = 0; at < content.length; at += 7777) await queue.write(content.subarray(at, at + 7777))
    await queue.flush()
    expect(statSync(path).size).toBe(content.length)
    await queue.write(content)
    await queue.close()
    expectBytes(readFileSync(path), Buffer.concat([content, content]))
  })

  test('at an offset, and without a flush of the device', async () => {
    const operations: string[] = []
    const memory = new MemoryDevice(100_000)
    const watched = fault(memory, ({ operation }) => void operations.push(operation))
    const queue = new AlignedWriteQueue(deviceSink(watched, { offset: 8192, durable: false }))
    await queue.write(pattern(5000))
    await queue.close()
    expect(operations).toEqual(['write'])
    expectBytes(memory.bytes.subarray(8192, 13_192), pattern(5000))
    expect(watched.closed).toBe(false)
  })
})

test('refuses sizes that make no sense', () => {
  const sink = new WatchingSink()
  expect(() => new AlignedWriteQueue(sink, { alignment: 1000 })).toThrow(/alignment must be a power of two, not 1000/)
  expect(() => new AlignedWriteQueue(sink, { padTo: 8192, alignment: 4096 })).toThrow(RangeError)
  expect(() => new AlignedWriteQueue(sink, { depth: 0 })).toThrow(RangeError)
  expect(() => new AlignedWriteQueue(sink, { slabSize: 0 })).toThrow(RangeError)
})

function ascending(values: readonly number[]): boolean {
  return values.every((value, index) => index === 0 || values[index - 1]! <= value)
}

function concatenation(count: number, length: number): Uint8Array {
  return Buffer.concat(Array.from({ length: count }, () => pattern(length)))
}
