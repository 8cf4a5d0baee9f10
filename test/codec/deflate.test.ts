import { deflateRawSync, constants } from 'node:zlib'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { deflateCluster, inflateCluster } from '../../src/codec/deflate.ts'

/** Bytes that compress about as well as real files: runs and noise. */
const clusterOf = (bits: number): fc.Arbitrary<Uint8Array> =>
  fc.array(fc.tuple(fc.integer({ min: 1, max: 2000 }), fc.integer({ min: 0, max: 255 }), fc.boolean()), { maxLength: 60 }).map((runs) => {
    const cluster = new Uint8Array(1 << bits)
    let at = 0
    let state = 12345
    for (const [length, value, noise] of runs) {
      for (let i = 0; i < length && at < cluster.length; i++, at++) {
        state = (Math.imul(state, 1103515245) + 12345) >>> 0
        cluster[at] = noise ? state >>> 24 : value
      }
    }
    return cluster
  })

const anyCluster = fc.integer({ min: 9, max: 17 }).chain(clusterOf)

test('what was deflated inflates to the same cluster, with anything behind it', () => {
  fc.assert(
    fc.property(anyCluster, fc.uint8Array({ maxLength: 600 }), (cluster, padding) => {
      const compressed = deflateCluster(cluster)
      if (compressed === undefined) return
      expect(compressed.length).toBeLessThan(cluster.length)
      const target = new Uint8Array(cluster.length).fill(0xee)
      expect(inflateCluster(Buffer.concat([compressed, padding]), target)).toBeUndefined()
      expect(Buffer.compare(target, cluster)).toBe(0)
    }),
  )
})

test('a cluster that does not shrink is refused', () => {
  const noise = new Uint8Array(4096)
  crypto.getRandomValues(noise)
  expect(deflateCluster(noise)).toBeUndefined()
})

test('streams with a 32 KiB window are read', () => {
  const cluster = new Uint8Array(65536)
  crypto.getRandomValues(cluster.subarray(0, 20000))
  cluster.copyWithin(30000, 0, 20000)
  const compressed = deflateRawSync(cluster, { windowBits: 15 })
  expect(compressed.length).toBeLessThan(45000)
  const target = new Uint8Array(65536)
  expect(inflateCluster(compressed, target)).toBeUndefined()
  expect(Buffer.compare(target, cluster)).toBe(0)
})

test('a stream without a final block is complete when the cluster is full, whatever follows', () => {
  const cluster = Buffer.from('qcow2'.repeat(1000)).subarray(0, 4096)
  const open = deflateRawSync(cluster, { finishFlush: constants.Z_SYNC_FLUSH })
  const target = new Uint8Array(4096)
  expect(inflateCluster(open, target)).toBeUndefined()
  expect(Buffer.compare(target, cluster)).toBe(0)
  target.fill(0)
  // 0xff begins a block of the reserved type: an error for zlib, had it not enough already
  expect(inflateCluster(Buffer.concat([open, new Uint8Array(100).fill(0xff)]), target)).toBeUndefined()
  expect(Buffer.compare(target, cluster)).toBe(0)
})

test('a stream that yields more than a cluster fills it and stops', () => {
  for (const length of [4097, 9000, 5_000_000]) {
    const long = Buffer.alloc(length, 'abcdefg')
    const target = new Uint8Array(4096)
    expect(inflateCluster(deflateRawSync(long), target)).toBeUndefined()
    expect(Buffer.compare(target, long.subarray(0, 4096))).toBe(0)
  }
})

test('a stream that ends early, or is none, is refused with a reason', () => {
  const target = new Uint8Array(4096)
  expect(inflateCluster(deflateRawSync(Buffer.alloc(4095, 1)), target)).toMatch('holds 4095 bytes, the cluster 4096')
  const compressed = deflateRawSync(Buffer.alloc(4096, 1))
  expect(inflateCluster(compressed.subarray(0, 3), target)).toMatch(/deflate: /)
  expect(inflateCluster(new Uint8Array(0), target)).toMatch(/deflate: /)
  expect(inflateCluster(new Uint8Array(512).fill(0xff), target)).toMatch(/deflate: invalid/)
})

test('random bytes never make it throw', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 300 }), (bytes) => {
      const problem = inflateCluster(bytes, new Uint8Array(512))
      expect(problem === undefined || problem.startsWith('deflate: ')).toBe(true)
    }),
  )
})
