/** The experiment on the simulated disk: the same everywhere, to the last digit. */
import { AlignedWriteQueue, NullDevice, ReadAheadPrefetcher, simulatedDisk, type DiskCommand, type SimulatedDisk, type SimulatedDiskOptions } from '../src/block.ts'
import { traceChart, depthChart, barChart, type Bar, type Tick, type Tone, type TracePanel } from './chart.ts'
import { measure, type GroupResult, type Measured, type Rounds, type Variant } from './harness.ts'
import { qemuReadLength } from './qemu-replay.ts'
import { digits, rate } from './report.ts'
import type { Figure } from './scenario.ts'

const sector = 512
const cluster = 65_536
const MiB = 1 << 20

/** Work on a simulated disk. */
type Work = (disk: SimulatedDisk) => Promise<void>

/** The pieces of the stream one after another, as QEMU hands them over; partial sectors are read first. */
export function unalignedWrites(lengths: readonly number[]): Work {
  return async (disk) => {
    const longest = new Uint8Array(Math.max(...lengths))
    let at = 0
    for (const length of lengths) {
      await disk.write(at, longest.subarray(0, length))
      at += length
    }
  }
}

/** The same into new clusters, as QEMU 7.2 and 10.0 do it today: read, write, read, zero the rest of the cluster. */
export function unalignedWritesOnFreshClusters(lengths: readonly number[]): Work {
  return async (disk) => {
    const edge = new Uint8Array(sector)
    const longest = new Uint8Array(Math.max(...lengths) + 2 * cluster)
    const down = (value: number): number => value - (value % sector)
    let at = 0
    for (const length of lengths) {
      const end = at + length
      if (at % sector !== 0) await disk.readInto(down(at), edge)
      await disk.write(down(at), longest.subarray(0, down(end + sector - 1) - down(at)))
      const clusterEnd = Math.ceil(end / cluster) * cluster
      if (clusterEnd > end) {
        if (end % sector !== 0) await disk.readInto(down(end), edge)
        await disk.write(down(end), longest.subarray(0, clusterEnd - down(end)))
      }
      at = end
    }
  }
}

/** Aligned requests, each sent when the one before has completed. */
export function alignedSynchronous(total: number, size: number): Work {
  return async (disk) => {
    const slab = new Uint8Array(size)
    for (let at = 0; at < total; at += size) await disk.write(at, slab)
  }
}

/** The pieces through the write queue. */
export function queued(lengths: readonly number[], options: { slabSize: number; depth: number }): Work {
  return async (disk) => {
    const longest = new Uint8Array(Math.max(...lengths))
    const queue = new AlignedWriteQueue(disk, { ...options, alignment: cluster, padTo: 4096 })
    for (const length of lengths) {
      const wait = queue.write(longest.subarray(0, length))
      if (wait !== undefined) await wait
    }
    await queue.close()
  }
}

/** QEMU's reads of a VM state, one after another. */
export function synchronousReads(total: number, size: number = qemuReadLength): Work {
  return async (disk) => {
    const buffer = new Uint8Array(size)
    for (let at = 0; at + size <= total; at += size) await disk.readInto(at, buffer)
  }
}

/** The prefetcher's reads: large, the next one always on its way. */
export function prefetched(total: number, options: { chunkSize: number; window: number }): Work {
  return async (disk) => {
    await using prefetcher = new ReadAheadPrefetcher(disk, { ...options, end: total })
    while ((await prefetcher.next()) !== undefined);
  }
}

/** Nothing but the writes that nearly the whole of a stream consists of, at odd offsets. */
function typicalLengths(bytes: number): number[] {
  const first = 192
  const count = Math.floor((bytes - first) / 131_328)
  return [first, ...Array.from({ length: count }, () => 131_328), bytes - first - count * 131_328].filter((length) => length > 0)
}

function variant(id: string, title: string, bytes: number, work: Work, options: SimulatedDiskOptions = {}): Variant {
  return {
    id,
    title,
    async run(): Promise<Measured> {
      await using disk = simulatedDisk(new NullDevice(bytes + 64 * MiB), options)
      await work(disk)
      return { seconds: disk.elapsed / 1e6 }
    },
  }
}

/** Creation, loading, and creation at other rotation speeds. */
export async function simulatedGroups(lengths: readonly number[], rounds: Rounds): Promise<GroupResult[]> {
  const bytes = lengths.reduce((sum, length) => sum + length, 0)
  const create = await measure({
    id: 'simulated-create',
    title: 'Simulated disk, 150 MB/s: create',
    note: 'The rotation speed (15,000 rpm) is fitted so that the first row gives the 27 MB/s once reported for such a disk; the docs say what other speeds give. Aligned requests alone are no cure: 64 KiB at a time without a queue is slower than the old pattern.',
    bytes,
    clock: 'virtual',
    variants: [
      variant('old', '131,328-byte writes (R,R,W)', bytes, unalignedWrites(typicalLengths(bytes))),
      variant('old-stream', 'the whole stream as QEMU cuts it (R,R,W)', bytes, unalignedWrites(lengths)),
      variant('old-fresh', 'the same into new clusters: QEMU today (R,W,R,W)', bytes, unalignedWritesOnFreshClusters(lengths)),
      variant('sync-64k', 'aligned 64 KiB, no queue', bytes, alignedSynchronous(bytes, 64 << 10)),
      variant('sync-1m', 'aligned 1 MiB, no queue', bytes, alignedSynchronous(bytes, MiB)),
      variant('queue-64k', 'write queue, 64 KiB slabs, depth 2', bytes, queued(lengths, { slabSize: 64 << 10, depth: 2 })),
      variant('queue', 'write queue, 1 MiB slabs, depth 4', bytes, queued(lengths, { slabSize: MiB, depth: 4 })),
    ],
    ratios: [{ fast: 'queue', slow: 'old', goal: 5.5 }, { fast: 'queue', slow: 'old-fresh' }, { fast: 'queue', slow: 'sync-64k' }],
  }, rounds)
  const load = await measure({
    id: 'simulated-load',
    title: 'Simulated disk, 150 MB/s: load',
    bytes,
    clock: 'virtual',
    variants: [
      variant('old', '28,728-byte reads, disk reads ahead', bytes, synchronousReads(bytes)),
      variant('old-slow-host', 'the same, host needs 0.3 ms between two', bytes, synchronousReads(bytes), { hostGap: 300 }),
      variant('old-plain', 'the same, disk without read-ahead', bytes, synchronousReads(bytes), { readAhead: 0 }),
      variant('prefetch', 'prefetcher, 1 MiB x 4', bytes, prefetched(bytes, { chunkSize: MiB, window: 4 })),
      variant('prefetch-plain', 'prefetcher, disk without read-ahead', bytes, prefetched(bytes, { chunkSize: MiB, window: 4 }), { readAhead: 0 }),
    ],
    ratios: [{ fast: 'prefetch', slow: 'old' }, { fast: 'prefetch-plain', slow: 'old-plain' }],
  }, rounds)
  const speeds = [5400, 7200, 10_000, 15_000]
  const other = await measure({
    id: 'simulated-rpm',
    title: 'Simulated disk: the same 150 MB/s at other rotation speeds',
    note: 'What a lost turn costs depends on how long a turn takes; what the queue reaches does not.',
    bytes,
    clock: 'virtual',
    variants: speeds.flatMap((rpm) => {
      const disk = { rpm, sectorsPerTrack: Math.round((1172 * 15_000) / rpm) }
      return [
        variant(`old-${rpm}`, `unaligned (R,R,W), ${rpm} rpm`, bytes, unalignedWrites(lengths), disk),
        variant(`queue-${rpm}`, `write queue, ${rpm} rpm`, bytes, queued(lengths, { slabSize: MiB, depth: 4 }), disk),
      ]
    }),
  }, rounds)
  return [create, load, other]
}

async function commandsOf(bytes: number, work: Work): Promise<DiskCommand[]> {
  const commands: DiskCommand[] = []
  await using disk = simulatedDisk(new NullDevice(bytes), { onCommand: (command) => commands.push(command) })
  await work(disk)
  return commands
}

const traced = ({ label, tone, commands }: { label: string; tone: Tone; commands: readonly DiskCommand[] }): TracePanel => ({
  label,
  tone,
  ticks: commands.filter((command) => command.started < 40_000).map(tickOf),
})

const tickOf = (command: DiskCommand): Tick => ({ ...command, start: command.started / 1000, end: command.completed / 1000 })

function depthSteps(commands: readonly DiskCommand[]): [number, number][] {
  const changes = commands.flatMap((command) => [[command.issued / 1000, 1], [command.completed / 1000, -1]] as [number, number][])
  changes.sort((a, b) => a[0] - b[0] || a[1] - b[1])
  let depth = 0
  return changes.map(([time, change]) => [time, (depth += change)])
}

/** Both patterns as in a block trace, the queue behind them, and the time that 8 GiB take. */
export async function simulatedFigures(lengths: readonly number[], groups: readonly GroupResult[]): Promise<Figure[]> {
  // the long writes in the middle of the stream: what a saving VM does most of the time
  const typical = lengths.filter((length) => length === 131_328).slice(0, 100)
  const offsets = [192, ...typical]
  const total = 64 * MiB
  const span = 40
  const panels = [
    { label: 'old: read, read, write (clusters there already)', tone: 'old' as const, commands: await commandsOf(total, unalignedWrites(offsets)) },
    { label: 'old: read, write, read, write (new clusters)', tone: 'old' as const, commands: await commandsOf(total, unalignedWritesOnFreshClusters(offsets)) },
    { label: 'aligned, but one 64 KiB request at a time', tone: 'plain' as const, commands: await commandsOf(total, alignedSynchronous(8 * MiB, 64 << 10)) },
    { label: 'new: 1 MiB slabs, 4 in flight', tone: 'new' as const, commands: await commandsOf(total, queued(Array.from({ length: 128 }, () => 131_328), { slabSize: MiB, depth: 4 })) },
  ]
  const bars = (id: string, rows: readonly (readonly [variant: string, tone: Tone])[]): Bar[] => {
    const group = groups.find((each) => each.id === id)!
    return rows.map(([name, tone]) => {
      const found = group.variants.find((each) => each.id === name)!
      const seconds = 2 ** 33 / (group.bytes / found.seconds.median)
      return { label: found.title, value: seconds, text: `${digits(seconds)} s · ${digits(rate(2 ** 33, seconds))} MB/s`, tone }
    })
  }
  return [
    {
      name: 'offset-over-time',
      title: 'Offset over time',
      svg: traceChart({ name: 'overview', title: 'The first 40 ms on the simulated disk', span, reach: 6e6, panels: [panels[0]!, panels[3]!].map(traced) }),
    },
    {
      name: 'offset-over-time-close',
      title: 'Offset over time, from close by',
      svg: traceChart({ name: 'close', title: 'Why: a lost turn of the disk before each write', span: 24, reach: 0.6e6, panels: panels.slice(0, 3).map(traced) }),
    },
    {
      name: 'queue-depth-over-time',
      title: 'Queue depth over time',
      svg: depthChart({ title: 'What the disk has to do', span, panels: panels.filter((_, n) => n !== 2).map(({ label, tone, commands }) => ({ label, tone, steps: depthSteps(commands) })) }),
    },
    {
      name: 'simulated-create',
      title: 'Creation on the simulated disk',
      svg: barChart({ title: 'Save 8 GiB of VM state, simulated disk', axis: 'seconds, less is better', bars: bars('simulated-create', [['old', 'old'], ['old-stream', 'old'], ['old-fresh', 'old'], ['sync-64k', 'plain'], ['sync-1m', 'plain'], ['queue', 'new']]) }),
    },
    {
      name: 'simulated-load',
      title: 'Load on the simulated disk',
      svg: barChart({ title: 'Load 8 GiB of VM state, simulated disk', axis: 'seconds, less is better', bars: bars('simulated-load', [['old', 'old'], ['old-slow-host', 'old'], ['old-plain', 'old'], ['prefetch', 'new'], ['prefetch-plain', 'new']]) }),
    },
  ]
}
