/** The extents of a layer, as `qemu-img map` lists them, through the whole backing chain. */
import { extent, type BlockDevice, type Extent, type MapOptions } from '../block/device.ts'
import type { Engine, Layer } from './engine.ts'
import { lookup, lookupLoading, newRun, type Run } from './mapping.ts'

/** Flags of an extent; what is left is where it is. */
type Flags = Omit<Extent, 'start' | 'length' | 'offset' | 'kind'>

/** What is mapped. Asked for anew at each step: the active layer may be replaced, and the size changed, meanwhile. */
interface Mapped {
  layer(): Layer
  /** Bytes; the extents end there at the latest. */
  size(): number
}

/** The extents of `[offset, offset + length)` of a layer, neighbours that differ in nothing merged. */
export async function* mapLayer(
  engine: Engine,
  mapped: Mapped,
  offset: number,
  length: number,
  options: MapOptions = {},
): AsyncGenerator<Extent, void, undefined> {
  let pending: Extent | undefined
  for await (const next of pieces(engine, mapped, offset, length, options)) {
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
  mapped: Mapped,
  offset: number,
  length: number,
  options: MapOptions,
): AsyncGenerator<Extent, void, undefined> {
  const run = newRun()
  for (let at = offset; at < offset + length; ) {
    options.signal?.throwIfAborted()
    const start = at
    const step = async (): Promise<BlockDevice | undefined> => {
      const end = Math.min(offset + length, mapped.size())
      run.length = 0
      if (start < end) await find(engine, mapped.layer(), start, end, run)
      return mapped.layer().backing
    }
    const backing = await (engine.readOnly ? step() : engine.requests.run(step))
    if (run.length === 0) return
    at += run.length
    if (run.kind === 'unallocated' && backing !== undefined && start < backing.size) {
      at = Math.min(at, backing.size)
      yield* mapBacking(backing, start, at - start, options)
    } else {
      yield describe(engine, run, start, at - start)
    }
  }
}

/** L2 slices read ahead when one is missing. */
const slicesAhead = 8

/** Looks up the run at `at`. Where tables have to be read for that, the next ones are read at the same time. */
async function find(engine: Engine, layer: Layer, at: number, end: number, run: Run): Promise<void> {
  if (lookup(engine, layer, at, end - at, run)) return
  const { bytesPerL1Entry, clusterSize, l2EntrySize } = engine.geometry
  const step = (engine.l2Tables.sliceSize / l2EntrySize) * clusterSize
  for (let ahead = 1; ahead <= slicesAhead && at + ahead * step < end; ahead++) {
    const guest = at + ahead * step
    const index = Math.floor(guest / bytesPerL1Entry)
    const table = layer.l1.offsetAt(index)
    const entryAt = Math.floor((guest - index * bytesPerL1Entry) / clusterSize) * l2EntrySize
    const slice = table + entryAt - (entryAt % engine.l2Tables.sliceSize)
    // a failure shows when the mapping gets there
    if (table !== 0 && table % clusterSize === 0) engine.l2Tables.load(slice).catch(() => undefined)
  }
  await lookupLoading(engine, layer, at, end - at, run)
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
