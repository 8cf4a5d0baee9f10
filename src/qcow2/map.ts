/** The extents of a layer, as `qemu-img map` lists them, through the whole backing chain. */
import { extent, type BlockDevice, type Extent, type MapOptions } from '../block/device.ts'
import type { Engine, Layer } from './engine.ts'
import { lookupLoading, newRun, type Run } from './mapping.ts'

/** Flags of an extent; what is left is where it is. */
type Flags = Omit<Extent, 'start' | 'length' | 'offset' | 'kind'>

/** The extents of `[offset, offset + length)` of a layer, neighbours that differ in nothing merged. */
export async function* mapLayer(
  engine: Engine,
  layer: Layer,
  offset: number,
  length: number,
  options: MapOptions = {},
): AsyncGenerator<Extent, void, undefined> {
  let pending: Extent | undefined
  for await (const next of pieces(engine, layer, offset, length, options)) {
    if (pending !== undefined && continues(pending, next)) {
      pending = { ...pending, length: pending.length + next.length }
      continue
    }
    if (pending !== undefined) yield pending
    pending = next
  }
  if (pending !== undefined) yield pending
}

function continues(a: Extent, b: Extent): boolean {
  const flags = a.depth === b.depth && a.present === b.present && a.zero === b.zero && a.data === b.data
  const place = a.offset === undefined ? b.offset === undefined : a.offset + a.length === b.offset
  return flags && a.compressed === b.compressed && place
}

async function* pieces(
  engine: Engine,
  layer: Layer,
  offset: number,
  length: number,
  options: MapOptions,
): AsyncGenerator<Extent, void, undefined> {
  const run = newRun()
  const end = offset + length
  for (let at = offset; at < end; ) {
    options.signal?.throwIfAborted()
    await lookupLoading(engine, layer, at, end - at, run)
    const start = at
    at += run.length
    if (run.kind === 'unallocated' && layer.backing !== undefined && start < layer.backing.size) {
      at = Math.min(at, layer.backing.size)
      yield* mapBacking(layer.backing, start, at - start, options)
    } else {
      yield describe(engine, run, start, at - start)
    }
  }
}

function describe(engine: Engine, run: Run, start: number, length: number): Extent {
  const flags: Flags = {
    depth: 0,
    present: run.kind !== 'unallocated',
    zero: run.kind === 'zero' || run.kind === 'unallocated',
    data: run.kind === 'data' || run.kind === 'compressed',
    compressed: run.kind === 'compressed',
  }
  const shown = run.host >= 0 && run.kind !== 'compressed' && engine.cipher === undefined
  return extent({ start, length, ...flags, ...(shown ? { offset: run.host } : {}) })
}

async function* mapBacking(backing: BlockDevice, start: number, length: number, options: MapOptions): AsyncGenerator<Extent, void, undefined> {
  for await (const below of backing.map({ offset: start, length, signal: options.signal })) {
    // where nothing in the chain has the bytes, the depth is that of the last file asked, as in QEMU
    yield { ...below, depth: below.depth + 1 }
  }
}
