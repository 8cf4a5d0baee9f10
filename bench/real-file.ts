/** The experiment on a real file: QEMU's requests replayed, the write queue, the prefetcher, and fio beside them. */
import { execFileSync } from 'node:child_process'
import * as fs from 'node:fs'
import { join } from 'node:path'
import { AlignedWriteQueue, openFile, ReadAheadPrefetcher } from '../src/block.ts'
import { fio, hasFio } from './fio.ts'
import { measure, type GroupResult, type Measured, type Variant } from './harness.ts'
import { GuestMemory, Loader } from './load.ts'
import { qemuReadReplay, QemuWriteReplay } from './qemu-replay.ts'
import type { ScenarioContext } from './scenario.ts'

const MiB = 1 << 20
const { O_CREAT, O_DIRECT, O_RDONLY, O_RDWR } = fs.constants

/** A stream and the pieces in which it comes. */
export interface Stream {
  readonly bytes: Uint8Array
  readonly lengths: readonly number[]
}

interface Place {
  readonly stream: Stream
  readonly file: string
  readonly direct: boolean
}

/** What the disk itself allows: no program can be much further ahead of QEMU's requests than this. */
const diskLimit = { fast: 'fio', slow: 'old' }

const prefix = (direct: boolean): string => (direct ? 'O_DIRECT' : 'page cache')

/** Creation on a fresh and on an overwritten file, past and through the page cache. */
export async function createGroups(stream: Stream, context: ScenarioContext): Promise<GroupResult[]> {
  const groups: GroupResult[] = []
  const file = join(context.folder, 'state')
  for (const direct of [true, false]) {
    for (const fresh of [true, false]) {
      fs.rmSync(file, { force: true })
      if (!fresh) fs.writeFileSync(file, new Uint8Array(Math.ceil(stream.bytes.length / MiB) * MiB).fill(0x55))
      groups.push(await createGroup({ stream, file, direct }, fresh, context))
    }
  }
  fs.rmSync(file, { force: true })
  return groups
}

function createGroup(place: Place, fresh: boolean, context: ScenarioContext): Promise<GroupResult> {
  const { direct, file, stream } = place
  const prepare = (): void => {
    if (fresh) fs.rmSync(file, { force: true })
    settleDisk(context.folder)
  }
  const checked = new Set<string>()
  const finish = (id: string) => (): void => {
    if (!checked.has(id)) expectContent(file, stream.bytes, id)
    checked.add(id)
  }
  const variants: Variant[] = [
    { id: 'old', title: 'QEMU’s requests, new clusters', prepare, run: () => replayWrites(place, true), finish: finish('old') },
    { id: 'queue', title: 'write queue, 1 MiB x 4', prepare, run: () => queueWrites(place), finish: finish('queue') },
  ]
  if (direct) variants.push({ id: 'old-allocated', title: 'QEMU’s requests, clusters there already', prepare, run: () => replayWrites(place, false), finish: finish('old-allocated') })
  if (hasFio) variants.push({ id: 'fio', title: direct ? 'fio libaio 1 MiB x 8' : 'fio 1 MiB', prepare, run: () => fioRun(place, 'write') })
  return measure({
    id: `create-${direct ? 'direct' : 'buffered'}-${fresh ? 'fresh' : 'overwrite'}`,
    title: `Create, ${prefix(direct)}, ${fresh ? 'fresh file' : 'overwritten file'}`,
    note: 'Every run ends with fdatasync.',
    bytes: stream.bytes.length,
    variants,
    ratios: [
      { fast: 'queue', slow: 'old', ...(direct ? { goal: fresh ? 6 : 8 } : {}) },
      ...(hasFio ? [{ fast: 'queue', slow: 'fio', ...(direct ? { goal: fresh ? 1 : 0.95 } : {}) }, diskLimit] : []),
    ],
  }, context)
}

function replayWrites({ stream, file, direct }: Place, freshClusters: boolean): undefined {
  const fd = fs.openSync(file, O_RDWR | O_CREAT | (direct ? O_DIRECT : 0))
  try {
    const replay = new QemuWriteReplay(fd, { direct, freshClusters })
    let at = 0
    for (const length of stream.lengths) replay.write(stream.bytes.subarray(at, (at += length)))
    fs.fdatasyncSync(fd)
  } finally {
    fs.closeSync(fd)
  }
}

async function queueWrites({ stream, file, direct }: Place): Promise<undefined> {
  if (!fs.existsSync(file)) fs.closeSync(fs.openSync(file, 'w'))
  await using device = await openFile(file, { direct })
  const queue = new AlignedWriteQueue(device)
  let at = 0
  for (const length of stream.lengths) {
    const wait = queue.write(stream.bytes.subarray(at, (at += length)))
    if (wait !== undefined) await wait
  }
  await queue.close()
}

/** Loading past and through the page cache: reads, parses and copies every page to its place in memory. */
export async function loadGroups(stream: Stream, context: ScenarioContext): Promise<GroupResult[]> {
  const file = join(context.folder, 'state')
  // a whole number of MiB, so that fio reads the same file
  fs.writeFileSync(file, Buffer.concat([stream.bytes, new Uint8Array(MiB - (stream.bytes.length % MiB))]))
  settleDisk(context.folder)
  const memory = new GuestMemory(stream.bytes)
  const groups: GroupResult[] = []
  for (const direct of [true, false]) groups.push(await loadGroup({ stream, file, direct }, memory, context))
  fs.rmSync(file)
  return groups
}

function loadGroup(place: Place, memory: GuestMemory, context: ScenarioContext): Promise<GroupResult> {
  const { direct, file, stream } = place
  const finish = (): void => {
    const pages = memory.block('pc.ram')
    // the last page of the enlarged block is the last raw page of the stream
    const last = pages.subarray(pages.length - 4096)
    if (Buffer.from(stream.bytes.buffer, stream.bytes.byteOffset, stream.bytes.length).indexOf(last) < 0) throw new Error('the last page did not arrive')
    last.fill(0)
  }
  const prepare = (): void => memory.touch()
  const replay = (): undefined => {
    const fd = fs.openSync(file, O_RDONLY | (direct ? O_DIRECT : 0))
    try {
      const loader = new Loader(memory)
      for (const piece of qemuReadReplay(fd, stream.bytes.length, direct)) loader.push(piece)
      loader.end()
    } finally {
      fs.closeSync(fd)
    }
  }
  const ours = async (chunkSize: number, window: number): Promise<undefined> => {
    await using device = await openFile(file, { direct, readOnly: true })
    const loader = new Loader(memory)
    await using prefetcher = new ReadAheadPrefetcher(device, { chunkSize, window, end: stream.bytes.length })
    for (let piece = await prefetcher.next(); piece !== undefined; piece = await prefetcher.next()) loader.push(piece)
    loader.end()
  }
  const variants: Variant[] = [
    { id: 'old', title: 'QEMU’s reads, parse, copy', prepare, run: replay, finish },
    { id: 'prefetch', title: 'prefetch 1 MiB x 4, parse, copy', prepare, run: () => ours(MiB, 4), finish },
    { id: 'prefetch-large', title: 'prefetch 2 MiB x 2, parse, copy', prepare, run: () => ours(2 * MiB, 2), finish },
  ]
  if (hasFio) variants.push({ id: 'fio', title: direct ? 'fio libaio 1 MiB x 8: read only' : 'fio 1 MiB: read only', run: () => fioRun(place, 'read') })
  return measure({
    id: `load-${direct ? 'direct' : 'buffered'}`,
    title: `Load, ${prefix(direct)}`,
    bytes: stream.bytes.length,
    variants,
    ratios: [
      { fast: 'prefetch', slow: 'old', ...(direct ? { goal: 5 } : {}) },
      { fast: 'prefetch-large', slow: 'old' },
      ...(hasFio ? [{ fast: 'prefetch', slow: 'fio', ...(direct ? { goal: 0.97 } : {}) }, diskLimit] : []),
    ],
  }, context)
}

/** fio moves whole MiB: its time is scaled to the stream's length. */
async function fioRun({ stream, file, direct }: Place, operation: 'read' | 'write'): Promise<Measured> {
  const bytes = Math.max(MiB, stream.bytes.length - (stream.bytes.length % MiB))
  const { seconds = 0, cpuSeconds = 0 } = await fio({ file, bytes, operation, direct })
  const scale = stream.bytes.length / bytes
  return { seconds: seconds * scale, cpuSeconds: cpuSeconds * scale }
}

/** What earlier runs left unwritten must not be written in the time of the next. */
export function settleDisk(folder: string): void {
  execFileSync('sync', ['-f', folder])
}

function expectContent(file: string, expected: Uint8Array, who: string): void {
  const found = fs.readFileSync(file)
  if (Buffer.compare(found.subarray(0, expected.length), expected) !== 0) throw new Error(`${who} wrote other bytes than it was given`)
}
