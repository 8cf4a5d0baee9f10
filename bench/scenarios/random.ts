/** Random requests of 4 KiB to a qcow2 image, beside `qemu-img bench`. */
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { Qcow2Image, type OpenOptions } from '../../src/index.ts'
import { measure, type GroupResult, type Measured, type Variant } from '../harness.ts'
import { findQemus } from '../qemu.ts'
import { inOwnNode, requestSize, step, throughFs, throughImage, type Load } from '../random-requests.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

interface LoadBeside extends Load {
  readonly qemuImg: string
}

function theirs({ path, qemuImg, depth, count, write }: LoadBeside, args: readonly string[]): Measured {
  const printed = execFileSync(qemuImg, ['bench', '-f', 'qcow2', ...args, ...(write ? ['-w'] : []), '-c', String(count), '-d', String(depth), '-s', String(requestSize), '-S', String(step), path], { encoding: 'utf8' })
  return { seconds: Number(/completed in ([\d.]+) seconds/.exec(printed)?.[1]) }
}

const inProcess = (id: string, title: string, load: Load, options: OpenOptions): Variant => ({ id, title, run: () => throughImage(load, options) })
const plainFs = (id: string, title: string, load: Load, synchronous: boolean): Variant => ({ id, title, run: () => throughFs(load, synchronous) })
const qemu = (id: string, load: LoadBeside, args: readonly string[]): Variant => ({ id, title: `qemu-img bench ${args.join(' ')}`, run: () => theirs(load, args) })

/** What Node's own calls reach stands beside ours: no library over them can be faster. */
async function directGroup(context: ScenarioContext, load: LoadBeside): Promise<GroupResult> {
  const { depth, count, write } = load
  const call = write ? 'write' : 'read'
  const direct = inProcess('qcow2', 'this library', load, { direct: true })
  const plain = plainFs('fs', `fs.${call}`, load, false)
  const native = qemu('qemu-native', load, ['-t', 'none', '-n'])
  const group = { id: `direct-${call}-${depth}`, title: `${count} random ${call}s of 4 KiB, O_DIRECT, depth ${depth}`, bytes: count * requestSize }
  if (depth === 1) {
    const variants = [
      direct,
      inProcess('qcow2-sync', 'this library, synchronous', load, { direct: true, syncLimit: requestSize }),
      plain,
      plainFs('fs-sync', `fs.${call}Sync`, load, true),
      native,
    ]
    const ratios = [
      { fast: 'qcow2-sync', slow: 'qemu-native', goal: 1.15 },
      { fast: 'fs-sync', slow: 'qemu-native' },
      { fast: 'qcow2', slow: 'qemu-native' },
      { fast: 'fs', slow: 'qemu-native' },
    ]
    return measure({ ...group, variants, ratios }, context)
  }
  const variants = [
    direct,
    { id: 'qcow2-uring', title: 'this library, UV_USE_IO_URING=1', run: () => inOwnNode(load, { UV_USE_IO_URING: '1' }) },
    plain,
    native,
    qemu('qemu-threads', load, ['-t', 'none']),
  ]
  const ratios = [
    { fast: 'qcow2', slow: 'qemu-threads', goal: 0.95 },
    { fast: 'qcow2-uring', slow: 'qemu-threads' },
    { fast: 'fs', slow: 'qemu-threads' },
    { fast: 'qcow2', slow: 'fs' },
    { fast: 'qcow2', slow: 'qemu-native' },
  ]
  return measure({ ...group, variants, ratios }, context)
}

async function cachedGroup(context: ScenarioContext, load: LoadBeside): Promise<GroupResult> {
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
    'Beside it is qemu-img bench with the same offsets, with native and threaded I/O; both are timed without opening and closing. ' +
    'fs.read and fs.write move the same bytes of the file with nothing in between: what they miss is missed by Node itself, whose thread pool ' +
    'hands each request to a thread and back.',
  run,
}
