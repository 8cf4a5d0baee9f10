/** Compressed writes to the active layer: whole clusters, each compressed if that makes it smaller. */
import { AbortPoints } from '../core/abort-points.ts'
import { assertCompressible, compress, storeCompressed } from './compressed.ts'
import type { Engine } from './engine.ts'
import { lockClusters, writeLocked } from './write.ts'

/** Clusters compressed between two writes: their data goes out in one request. */
const batchBytes = 1 << 20

/** Stores whole clusters (the last one of the disk may be short). */
export async function writeCompressed(engine: Engine, guest: number, source: Uint8Array, signal?: AbortSignal): Promise<void> {
  assertCompressible(engine)
  if (engine.untouched) await engine.touch()
  await lockClusters(engine, guest, source.length, async () => {
    const { clusterSize } = engine.geometry
    const step = Math.max(clusterSize, batchBytes)
    const points = new AbortPoints(signal)
    for (let at = 0; at < source.length; at += step) {
      await points.pass()
      await writeBatch(engine, guest + at, source.subarray(at, at + step))
    }
  })
}

async function writeBatch(engine: Engine, guest: number, source: Uint8Array): Promise<void> {
  const { clusterSize } = engine.geometry
  let first = 0
  let payloads: Uint8Array[] = []
  const flush = async (end: number): Promise<void> => {
    if (payloads.length > 0) await storeCompressed(engine, guest + first, payloads)
    payloads = []
    first = end
  }
  for (let at = 0; at < source.length; at += clusterSize) {
    const cluster = source.subarray(at, at + clusterSize)
    const payload = compress(engine, cluster)
    if (payload === undefined) {
      await flush(at + clusterSize)
      await writeLocked(engine, guest + at, cluster)
    } else payloads.push(payload)
  }
  await flush(source.length)
}
