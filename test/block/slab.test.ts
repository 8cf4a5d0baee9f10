import { describe, expect, test } from 'vitest'
import { allocateAligned, isMemoryAligned, SlabPool } from '../../src/block.ts'

describe('allocateAligned', () => {
  test.each([0, 1, 511, 4096, 4097, 100_000, 300_000, 1 << 20, 3 << 20])('%i bytes, zeroed and aligned', (length) => {
    const bytes = allocateAligned(length)
    expect(bytes.length).toBe(length)
    expect(bytes.byteOffset % 4096).toBe(0)
    expect(bytes.every((byte) => byte === 0)).toBe(true)
    expect(isMemoryAligned(bytes, 4096)).toBe(true)
  })

  test('allocations do not overlap', () => {
    const all = Array.from({ length: 200 }, (_, index) => allocateAligned(index * 37 + 1).fill(index + 1))
    all.forEach((bytes, index) => expect(bytes.every((byte) => byte === ((index + 1) & 255))).toBe(true))
  })

  test.each([-1, 0.5, Number.NaN, 2 ** 33])('refuses a length of %d', (length) => {
    expect(() => allocateAligned(length)).toThrow(RangeError)
  })
})

test('only memory from here is known to be aligned', () => {
  const bytes = allocateAligned(8192)
  expect(isMemoryAligned(bytes.subarray(512), 512)).toBe(true)
  expect(isMemoryAligned(bytes.subarray(512), 1024)).toBe(false)
  expect(isMemoryAligned(new Uint8Array(4096), 512)).toBe(false)
  expect(isMemoryAligned(new Uint8Array(4096), 1)).toBe(true)
})

describe('SlabPool', () => {
  test('hands out each slab once until it is released', () => {
    const pool = new SlabPool(5000, 3)
    const slabs = [pool.acquire()!, pool.acquire()!, pool.acquire()!]
    expect(pool.acquire()).toBeUndefined()
    expect(new Set(slabs.map((slab) => slab.byteOffset)).size).toBe(3)
    for (const slab of slabs) {
      expect(slab.length).toBe(5000)
      expect(slab.byteOffset % 4096).toBe(0)
    }
    pool.release(slabs[1]!)
    expect(pool.available).toBe(1)
    expect(pool.acquire()).toBe(slabs[1])
  })

  test('a closed pool leaves its memory to the next, but only when all slabs are back', () => {
    const pool = new SlabPool(345_678, 2)
    const [first, second] = [pool.acquire()!, pool.acquire()!]
    pool.release(first)
    pool.release(second)
    pool.close()
    const next = new SlabPool(345_678, 2)
    const again = next.acquire()!
    expect(again.buffer).toBe(first.buffer)
    next.close()
    expect(new SlabPool(345_678, 2).acquire()!.buffer).not.toBe(first.buffer)
  })

  test('refuses nonsense', () => {
    expect(() => new SlabPool(0, 1)).toThrow(RangeError)
    expect(() => new SlabPool(4096, 0)).toThrow(RangeError)
  })
})
