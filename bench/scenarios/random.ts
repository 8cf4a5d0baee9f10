/** Random requests of 4 KiB to a qcow2 image, beside `qemu-img bench`. */
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { allocateAligned } from '../../src/block.ts'
import { Qcow2Image, type OpenOptions } from '../../src/index.ts'
import { measure, type GroupResult, type Measured, type Variant } from '../harness.ts'
import { findQemus } from '../qemu.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

const requestSize = 4096
/** How far the next request lies from the last, as `qemu-img bench -S`: no two are near each other. */
const step = 32_440_320

interface Load {
  readonly path: string
  readonly qemuImg: string
  readonly depth: number
  readonly count: number
  readonly write: boolean
}

/** Keeps `depth` requests in flight until all are done. Timed without opening and closing, as qemu-img bench is. */
async function ours({ path, depth, count, write }: Load, options: OpenOptions): Promise<Measured> {
  await using image = await Qcow2Image.open(path, { ...options, readOnly: !write })
  let left = count
  let offset = 0
  const lane = async (): Promise<void> => {
    const bytes = allocateAligned(requestSize)
    while (left-- > 0) {
      const at = offset
      offset = (offset + step) % image.size
      await (write ? image.write(at, bytes) : image.readInto(at, bytes))
    }
  }
  const before = performance.now()
  await Promise.all(Array.from({ length: depth }, lane))
  return { seconds: (performance.now() - before) / 1000 }
}

function theirs({ path, qemuImg, depth, count, write }: Load, args: readonly string[]): Measured {
  const printed = execFileSync(qemuImg, ['bench', '-f', 'qcow2', ...args, ...(write ? ['-w'] : []), '-c', String(count), '-d', String(depth), '-s', String(requestSize), '-S', String(step), path], { encoding: 'utf8' })
  return { seconds: Number(/completed in ([\d.]+) seconds/.exec(printed)?.[1]) }
}

const inProcess = (id: string, title: string, load: Load, options: OpenOptions): Variant => ({ id, title, run: () => ours(load, options) })
const qemu = (id: string, load: Load, args: readonly string[]): Variant => ({ id, title: `qemu-img bench ${args.join(' ')}`, run: () => theirs(load, args) })

async function directGroup(context: ScenarioContext, load: Load): Promise<GroupResult> {
  const { depth, count, write } = load
  const one = depth === 1
  return measure(
    {
      id: `direct-${write ? 'write' : 'read'}-${depth}`,
      title: `${count} random ${write ? 'writes' : 'reads'} of 4 KiB, O_DIRECT, depth ${depth}`,
      bytes: count * requestSize,
      variants: [
        inProcess('qcow2', 'this library', load, { direct: true }),
        ...(one ? [inProcess('qcow2-sync', 'this library, synchronous', load, { direct: true, syncLimit: requestSize })] : []),
        qemu('qemu-native', load, ['-t', 'none', '-n']),
        ...(one ? [] : [qemu('qemu-threads', load, ['-t', 'none'])]),
      ],
      ratios: one
        ? [{ fast: 'qcow2-sync', slow: 'qemu-native', goal: 1.15 }, { fast: 'qcow2', slow: 'qemu-native' }]
        : [{ fast: 'qcow2', slow: 'qemu-threads', goal: 0.95 }, { fast: 'qcow2', slow: 'qemu-native' }],
    },
    context,
  )
}

async function cachedGroup(context: ScenarioContext, load: Load): Promise<GroupResult> {
  return measure(
    {
      id: 'cached-read',
      title: `${load.count} random reads of 4 KiB, all in the page cache, depth ${load.depth}`,
      bytes: load.count * requestSize,
      variants: [
        inProcess('qcow2-sync', 'this library, synchronous', load, { syncLimit: requestSize }),
        inProcess('qcow2', 'this library', load, {}),
        qemu('qemu', load, ['-t', 'writeback']),
      ],
      ratios: [{ fast: 'qcow2-sync', slow: 'qemu', goal: 4 }, { fast: 'qcow2', slow: 'qemu' }],
    },
    context,
  )
}

/** An image of random bytes, in the page cache when this returns. */
async function makeImage(path: string, size: number): Promise<void> {
  await using image = await Qcow2Image.create(path, { size })
  const piece = new Uint8Array(1 << 20)
  for (let at = 0; at < piece.length; at += 65536) crypto.getRandomValues(piece.subarray(at, at + 65536))
  for (let at = 0; at < size; at += piece.length) await image.write(at, piece)
  await image.flush()
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const installed = findQemus().at(-1)
  if (installed === undefined) return { groups: [], figures: [], notes: ['qemu-img is not installed: nothing to compare with.'] }
  const path = join(context.folder, 'random.qcow2')
  await makeImage(path, (context.quick ? 64 : (context.size ?? 1024)) << 20)
  const count = (full: number): number => (context.quick ? 200 : full)
  const load = { path, qemuImg: join(installed.folder, 'qemu-img') }
  const groups: GroupResult[] = []
  for (const write of [false, true]) {
    groups.push(await directGroup(context, { ...load, depth: 1, count: count(5000), write }))
    groups.push(await directGroup(context, { ...load, depth: 16, count: count(20_000), write }))
  }
  await readAll(path)
  groups.push(await cachedGroup(context, { ...load, depth: 16, count: count(100_000), write: false }))
  return { groups, figures: [], notes: [] }
}

/** Direct writes have put the image out of the page cache. */
async function readAll(path: string): Promise<void> {
  await using image = await Qcow2Image.open(path, { readOnly: true })
  const piece = new Uint8Array(1 << 20)
  for (let at = 0; at < image.size; at += piece.length) await image.readInto(at, piece)
}

export const scenario: Scenario = {
  name: 'random',
  title: 'Random requests of 4 KiB',
  about:
    'An allocated image of random bytes is read and written in requests of 4 KiB far from each other, past the page cache and out of it. ' +
    'Beside it is qemu-img bench with the same offsets, with native and threaded I/O; both are timed without opening and closing.',
  run,
}
