/**
 * Reading a layer of an image: looks up each run and gets its bytes from the file, the backing file,
 * a decompressor, or nowhere. A request that is one run in a cached table costs one request.
 */
import type { BlockDevice } from '../block/device.ts'
import { AbortPoints } from '../core/abort-points.ts'
import { FormatError, Qcow2Error } from '../core/errors.ts'
import { readEncrypted } from './encrypted.ts'
import type { Engine, Layer } from './engine.ts'
import { InFlight } from '../core/in-flight.ts'
import { lookup, newRun, type Run } from './mapping.ts'
import { readCompressed, readCompressedClusters, type CompressedCluster } from './read-compressed.ts'

const done: Promise<void> = Promise.resolve()
/** Used by synchronous lookups only, between which nothing else runs. */
const scratch = newRun()
/** Pieces of one request in flight. */
const maxPieces = 64
/** Compressed clusters that are read together: bytes, and how many times that are in flight. */
const batchBytes = 1 << 20
const maxBatches = 4

/**
 * Fills `target` with the bytes of a layer. The range may lie anywhere in its L1 table, or past it. Aborted, a read of
 * several pieces ends with those under way.
 */
export function readLayer(engine: Engine, layer: Layer, guest: number, target: Uint8Array, signal?: AbortSignal): Promise<void> {
  let known: boolean
  try {
    known = lookup(engine, layer, guest, target.length, scratch)
  } catch (error) {
    return Promise.reject(error)
  }
  if (known && scratch.length === target.length) return readRun(engine, layer, scratch, guest, target, signal)
  const reading = readPieces(engine, layer, guest, target, signal)
  // closing waits for it; a writer's requests are counted by whoever makes them
  return engine.readOnly ? engine.requests.track(reading) : reading
}

async function readPieces(engine: Engine, layer: Layer, guest: number, target: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
  const { clusterSize } = engine.geometry
  const pieces = new InFlight()
  const batches = new InFlight()
  const run = newRun()
  const points = new AbortPoints(signal)
  let batch: CompressedCluster[] = []
  try {
    for (let at = 0; at < target.length; at += run.length) {
      const turn = points.pass()
      if (turn !== undefined) await turn
      while (!lookup(engine, layer, guest + at, target.length - at, run)) await engine.l2Tables.load(run.slice)
      if (run.kind === 'compressed' && run.length === clusterSize) {
        batch.push({ offset: run.host, length: run.compressedLength, target: target.subarray(at, at + clusterSize) })
        if (batch.length * clusterSize < batchBytes) continue
        batches.add(readCompressedClusters(engine, batch))
        batch = []
        await batches.settle(maxBatches - 1)
        continue
      }
      const reading = readRun(engine, layer, run, guest + at, target.subarray(at, at + run.length), signal)
      if (reading === done) continue
      pieces.add(reading)
      if (pieces.count >= maxPieces) await pieces.settle(maxPieces / 2)
    }
    if (batch.length > 0) batches.add(readCompressedClusters(engine, batch))
  } finally {
    pieces.add(batches.settle())
    await pieces.settle()
  }
}

/** Fills `target` with the start of a run. */
function readRun(engine: Engine, layer: Layer, run: Run, guest: number, target: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
  switch (run.kind) {
    case 'data':
      return readData(engine, guest, run.host, target, signal)
    case 'zero':
      target.fill(0)
      return done
    case 'compressed':
      return readCompressed(engine, run.host, run.compressedLength, guest % engine.geometry.clusterSize, target)
    case 'unallocated':
      return readBacking(layer.backing, guest, target, signal)
  }
}

function readData(engine: Engine, guest: number, host: number, target: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
  const { cipher } = engine
  return cipher === undefined ? engine.data.readInto(host, target, signal) : readEncrypted(engine, cipher, guest, host, target)
}

/** Fills `target` from a backing file; past its end, or without one, there are zeroes. An error says that it is that file which is damaged. */
function readBacking(backing: BlockDevice | undefined, guest: number, target: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
  const present = backing === undefined ? 0 : Math.min(target.length, Math.max(0, backing.size - guest))
  if (present < target.length) target.fill(0, present)
  return backing === undefined || present === 0 ? done : backing.readInto(guest, target.subarray(0, present), { signal }).catch(failInBacking)
}

function failInBacking(error: unknown): never {
  if (!Qcow2Error.is(error, 'ERR_CORRUPT')) throw error
  throw new FormatError(error.message, { structure: 'backing file' }, 'ERR_CORRUPT', { cause: error })
}
