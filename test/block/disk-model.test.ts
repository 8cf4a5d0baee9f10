/** The disk model gives the published figures, on any machine. MB = 1e6 bytes; microseconds make bytes / us = MB/s. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  disk15k, diskAtRest, mediaRate, revolution, serve, type DiskParameters, type DiskRequest, type DiskState,
} from '../../src/block/disk-model.ts'

type Step = readonly ['read' | 'write', number, number]

const vmStateWrite = 131_328
const writes = 2048

/** Serves the steps one after another, each `gap` after the completion of the last; bytes of payload by microseconds. */
function oneAfterAnother(steps: Iterable<Step>, payload: number, parameters: Partial<DiskParameters> = {}, gap = 100): number {
  const disk = { ...disk15k, ...parameters }
  let state: DiskState = diskAtRest
  let clock = 0
  for (const [operation, first, last] of steps) {
    const start = Math.floor(first / disk.sectorSize)
    const end = Math.ceil(last / disk.sectorSize)
    const served = serve(disk, state, { operation, start, end, issued: clock + gap })
    state = served.state
    clock = served.times.completed
  }
  return payload / clock
}

/** 131,328-byte writes at odd offsets; the sectors at both ends are read first. */
function* unalignedWrites(sectorSize = 512): Generator<Step> {
  for (let n = 0, at = 192; n < writes; n++, at += vmStateWrite) {
    const end = at + vmStateWrite
    yield ['read', at, at + 1]
    if (end % sectorSize !== 0) yield ['read', end - 1, end]
    yield ['write', at, end]
  }
}

/** The same onto fresh clusters: each data write is followed by the zeroes up to the cluster's end. */
function* unalignedWritesOnFreshClusters(): Generator<Step> {
  for (let n = 0, at = 192; n < writes; n++, at += vmStateWrite) {
    const end = at + vmStateWrite
    const clusterEnd = Math.ceil(end / 65_536) * 65_536
    yield ['read', at, at + 1]
    yield ['write', at, end]
    yield ['read', end - 1, end]
    if (clusterEnd > end) yield ['write', end, clusterEnd]
  }
}

function* sequential(operation: Step[0], size: number, count: number): Generator<Step> {
  for (let n = 0; n < count; n++) yield [operation, n * size, (n + 1) * size]
}

const MiB = 1 << 20
const total = 256 * MiB

describe('the published figures', () => {
  test('media rate 150 MB/s, revolution 4 ms', () => {
    expect(mediaRate(disk15k) / 1e6).toBeCloseTo(150.016, 3)
    expect(revolution(disk15k)).toBe(4000)
  })

  test('unaligned VM state writes lose a turn each: 26.9 MB/s', () => {
    expect(oneAfterAnother(unalignedWrites(), writes * vmStateWrite)).toBeCloseTo(26.93, 1)
    expect(oneAfterAnother(unalignedWrites(), writes * vmStateWrite, {}, 230), 'the host gap does not matter').toBeCloseTo(26.93, 1)
  })

  test('on fresh clusters two turns: 14.8 MB/s', () => {
    expect(oneAfterAnother(unalignedWritesOnFreshClusters(), writes * vmStateWrite)).toBeCloseTo(14.8, 1)
  })

  test('other rotation speeds', () => {
    // the same 150 MB/s from longer tracks
    const slow = { rpm: 7200, sectorsPerTrack: Math.round((1172 * 15_000) / 7200) }
    expect(oneAfterAnother(unalignedWrites(), writes * vmStateWrite, slow)).toBeCloseTo(14.3, 1)
  })

  test('sectors of 4 KiB', () => {
    const native = { sectorSize: 4096, physicalSectorSize: 4096, sectorsPerTrack: 146.5 }
    expect(oneAfterAnother(unalignedWrites(4096), writes * vmStateWrite, native)).toBeCloseTo(26.93, 1)
    const emulated = { physicalSectorSize: 4096, readAhead: 0 }
    expect(oneAfterAnother(unalignedWrites(), writes * vmStateWrite, emulated), '512e: 7 of 8 writes lose another turn').toBeCloseTo(15.68, 1)
  })

  test.each([[64, 14.8], [256, 45.6], [1024, 95.4], [2048, 116.6], [4096, 131.2]])(
    'aligned but synchronous, %i KiB: %d MB/s',
    (kib, rate) => expect(oneAfterAnother(sequential('write', kib << 10, total / (kib << 10)), total)).toBeCloseTo(rate, 1),
  )

  test('28,728-byte synchronous reads live off the read-ahead', () => {
    const reads = 20_000
    const rate = (gap: number, parameters = {}): number => oneAfterAnother(sequential('read', 28_728, reads), reads * 28_728, parameters, gap)
    expect(rate(100)).toBeCloseTo(110.8, 1)
    expect(rate(300)).toBeCloseTo(62.1, 1)
    expect(rate(100, { readAhead: 0 })).toBeCloseTo(6.85, 1)
  })
})

const requests = fc.array(
  fc.record({
    operation: fc.constantFrom('read' as const, 'write' as const),
    start: fc.oneof(fc.nat(4000), fc.nat(10_000_000)),
    length: fc.integer({ min: 1, max: 3000 }),
    think: fc.nat(9000),
  }),
  { minLength: 1, maxLength: 40 },
)

describe('properties', () => {
  test('time goes on, nothing beats the medium, equal requests give equal times', () => {
    fc.assert(
      fc.property(requests, (script) => {
        const run = (): number[] => {
          let state: DiskState = diskAtRest
          let issued = 0
          return script.flatMap(({ operation, start, length, think }) => {
            issued += think
            const request: DiskRequest = { operation, start, end: start + length, issued }
            const before = state
            const served = serve(disk15k, before, request)
            state = served.state
            const { started, completed, cached } = served.times
            expect(started).toBeGreaterThanOrEqual(issued)
            expect(completed).toBeGreaterThan(started)
            expect(completed).toBeGreaterThanOrEqual(before.free)
            if (operation === 'write') expect(completed - started).toBeCloseTo((length * 4000) / 1172, 6)
            if (cached) expect(operation).toBe('read')
            // never more than a seek, a turn and the transfer after the disk was ready
            const ready = Math.max(issued + 100, before.free)
            expect(completed).toBeLessThanOrEqual(ready + 3500 + 4000 + (length * 4000) / 1172 + 1e-6)
            return [started, completed]
          })
        }
        expect(run()).toEqual(run())
      }),
    )
  })

  test('what was just written or read is cached; the oldest of five places is not', () => {
    let state: DiskState = diskAtRest
    const send = (operation: 'read' | 'write', start: number, end: number): boolean => {
      const served = serve({ ...disk15k, readAhead: 0 }, state, { operation, start, end, issued: state.free + 100 })
      state = served.state
      return served.times.cached
    }
    for (const place of [0, 1, 2, 3, 4]) send(place % 2 === 0 ? 'write' : 'read', place * 100_000, place * 100_000 + 10)
    expect(send('read', 400_000, 400_010)).toBe(true)
    expect(send('read', 100_003, 100_004)).toBe(true)
    expect(send('read', 0, 10)).toBe(false)
  })
})
