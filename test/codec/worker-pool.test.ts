import { expect, test } from 'vitest'
import { inflateCluster } from '../../src/codec/deflate.ts'
import { CodecPool } from '../../src/codec/worker-pool.ts'
import { canCompressZstd } from '../../src/codec/zstd.ts'

/** A batch whose cluster i is text of its number, but every third is noise. */
function batch(number: number, clusterSize: number, count: number): Uint8Array {
  const clusters = new Uint8Array(clusterSize * count)
  for (let i = 0; i < count; i++) {
    const cluster = clusters.subarray(i * clusterSize, (i + 1) * clusterSize)
    if (i % 3 === 2) for (let at = 0; at < clusterSize; at += 65536) crypto.getRandomValues(cluster.subarray(at, at + 65536))
    else cluster.set(Buffer.alloc(clusterSize, `batch ${number} cluster ${i}, `))
  }
  return clusters
}

test('concurrent batches come back whole, more of them than threads', async () => {
  const clusterSize = 4096
  await using pool = new CodecPool({ clusterSize, type: 'zlib', workers: 2 })
  expect(pool.batchClusters).toBe(64)
  await Promise.all(
    Array.from({ length: 12 }, async (_, number) => {
      const clusters = batch(number, clusterSize, 7)
      const { bytes, lengths, release } = await pool.compress(clusters)
      let at = 0
      for (let i = 0; i < 7; i++) {
        if (i % 3 === 2) {
          expect(lengths[i]).toBe(0)
          continue
        }
        const target = new Uint8Array(clusterSize)
        expect(inflateCluster(bytes.subarray(at, at + lengths[i]!), target)).toBeUndefined()
        expect(Buffer.compare(target, clusters.subarray(i * clusterSize, (i + 1) * clusterSize))).toBe(0)
        at += lengths[i]!
      }
      expect(at).toBe(bytes.length)
      release()
      release()
    }),
  )
})

test('a batch waits while the memory of earlier ones is held', async () => {
  await using pool = new CodecPool({ clusterSize: 512, type: 'zlib', workers: 1 })
  const held = await Promise.all([pool.compress(new Uint8Array(512)), pool.compress(new Uint8Array(1024))])
  let arrived = false
  const third = pool.compress(new Uint8Array(512)).then((result) => {
    arrived = true
    return result
  })
  await new Promise((resolve) => setTimeout(resolve, 20))
  expect(arrived).toBe(false)
  held[0].release()
  await third
  expect(arrived).toBe(true)
})

test('closing ends the threads and fails what is under way', async () => {
  const pool = new CodecPool({ clusterSize: 2 << 20, type: 'zlib', workers: 1 })
  expect(pool.batchClusters).toBe(1)
  const outcome = pool.compress(batch(0, 2 << 20, 1)).catch((error: unknown) => error)
  await new Promise((resolve) => setImmediate(resolve))
  await pool.close()
  expect(await outcome).toMatchObject({ message: expect.stringMatching(/codec thread ended/) as string })
  await expect(pool.compress(new Uint8Array(2 << 20))).rejects.toMatchObject({ code: 'ERR_CLOSED' })
})

test("caller's mistakes are refused", async () => {
  expect(() => new CodecPool({ clusterSize: 512, type: 'zlib', workers: 0 })).toThrow(RangeError)
  if (!canCompressZstd) expect(() => new CodecPool({ clusterSize: 512, type: 'zstd' })).toThrow(/Node 22\.15/)
  await using pool = new CodecPool({ clusterSize: 512, type: 'zlib' })
  await expect(pool.compress(new Uint8Array(513))).rejects.toThrow(RangeError)
})
