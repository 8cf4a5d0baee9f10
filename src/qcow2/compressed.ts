/**
 * Packing compressed clusters. Compressed data is never overwritten: changing such a cluster gives it a
 * new place.
 */
import { compressCluster } from '../codec/cluster-codec.ts'
import { UnsupportedError } from '../core/errors.ts'
import { clusterState } from './cluster-state.ts'
import type { Engine } from './engine.ts'
import type { Piece } from './host-file.ts'
import { encodeCompressed } from './l2-entry.ts'
import { withEntry } from './l2-tables.ts'
import { release, setBitmaps, setEntry } from './link.ts'

/** Refuses compression where the format has none. */
export function assertCompressible(engine: Engine): void {
  engine.assertSound()
  if (engine.hasDataFile) throw new UnsupportedError('compressed clusters and an external data file exclude each other', ['compression'])
  if (engine.cipher !== undefined) throw new UnsupportedError('compressed clusters in an encrypted image are not supported', ['compression'])
}

/**
 * Compresses one cluster of the active layer; bytes behind the end of the disk are zeroes.
 * @returns undefined if it would not become smaller.
 */
export function compress(engine: Engine, source: Uint8Array): Uint8Array | undefined {
  const { clusterSize } = engine.geometry
  if (source.length === clusterSize) return compressCluster(engine.header.compressionType, source)
  const cluster = new Uint8Array(clusterSize)
  cluster.set(source)
  return compressCluster(engine.header.compressionType, cluster)
}

/**
 * Stores compressed clusters one behind the other, beginning with the guest cluster at `guest`. The
 * caller holds the locks of the clusters. Data is written before any entry refers to it.
 */
export async function storeCompressed(engine: Engine, guest: number, payloads: readonly Uint8Array[]): Promise<void> {
  const { clusterSize, clusterBits, extendedL2 } = engine.geometry
  // a new L2 table lies before what it maps, as it does for plain writes
  await withEntry(engine, guest, () => undefined)
  const places: Piece[] = []
  for (const bytes of payloads) places.push({ offset: await engine.packer.place(bytes.length), bytes })
  engine.decompressed.clear()
  await engine.host.writeAll(places)
  for (const [index, { offset, bytes }] of places.entries()) {
    const { high, low } = encodeCompressed(offset, bytes.length, clusterBits)
    const at = guest + index * clusterSize
    await withEntry(engine, at, (place) => {
      const old = clusterState(engine, place.slice.view, place.at, at)
      setEntry(engine, place, high, low)
      if (extendedL2) setBitmaps(place, 0, 0)
      release(engine, old)
    })
  }
}
