/** Converting between raw and qcow2, plain and compressed, beside `qemu-img convert`. */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { openFile } from '../../src/block.ts'
import { convertToQcow2, copyDevice, Qcow2Image, type ConvertToQcow2Options } from '../../src/index.ts'
import { measure, type GroupResult, type RatioQuestion, type Variant } from '../harness.ts'
import { isBuilt, notBuilt, programVariant } from '../program.ts'
import { findQemus } from '../qemu.ts'
import { timed } from '../timed.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

const MiB = 1 << 20

/** Bytes like those of a disk in use: this machine's programs, a part that does not compress, a hole. */
function sampleDisk(bytes: number): Uint8Array {
  const disk = Buffer.alloc(bytes)
  let at = 0
  const fill = (folder: string, end: number): void => {
    for (const name of readdirSync(folder).sort()) {
      const path = join(folder, name)
      if (at >= end) return
      const stat = statSync(path, { throwIfNoEntry: false })
      if (stat?.isFile() !== true || stat.size > 64 * MiB) continue
      at += readFileSync(path).copy(disk, at, 0, end - at)
    }
  }
  for (const folder of ['/usr/bin', '/usr/lib/x86_64-linux-gnu', '/usr/include', '/usr/sbin']) if (existsSync(folder)) fill(folder, bytes * 0.6)
  const noise = Math.floor(bytes * 0.75) - at
  for (let done = 0; done < noise; done += 65536) crypto.getRandomValues(disk.subarray(at + done, at + Math.min(done + 65536, noise)))
  return disk
}

async function toQcow2(source: string, target: string, direct: boolean, options: ConvertToQcow2Options): Promise<void> {
  await using from = await openFile(source, { readOnly: true, direct })
  await using to = await openFile(target, { create: 'w', direct })
  await convertToQcow2(from, to, options)
}

async function toRaw(source: string, target: string, direct: boolean): Promise<void> {
  await using from = await Qcow2Image.open(source, { readOnly: true, direct })
  await using to = await openFile(target, { create: 'w', direct })
  await copyDevice(from, to)
}

interface Place {
  readonly context: ScenarioContext
  readonly qemuImg: string
  readonly folder: string
  readonly where: string
  readonly bytes: number
  readonly direct: boolean
}

function variants(place: Place, target: string, args: readonly string[], ours: () => Promise<void>): Variant[] {
  const clean = (): void => rmSync(target, { force: true })
  const cache = place.direct ? ['-t', 'none', '-T', 'none'] : []
  const theirs = (id: string, extra: readonly string[]): Variant => ({
    id,
    title: `qemu-img convert ${[...cache, ...extra].join(' ')}`,
    prepare: clean,
    run: () => timed(place.qemuImg, ['convert', ...cache, ...extra, ...args, target]),
    finish: clean,
  })
  return [
    {
      id: 'qcow2',
      title: 'this library, in process',
      prepare: clean,
      run: async () => {
        await ours()
        return undefined
      },
      finish: clean,
    },
    ...programVariant(['convert', ...cache, ...args, target], { prepare: clean, finish: clean }),
    theirs('qemu-img', []),
    theirs('qemu-img -m 16 -W', ['-m', '16', '-W']),
  ]
}

/** Of the library in process, and of the program where it is built. */
function ratiosTo(slow: string, inProcess?: number, program?: number): RatioQuestion[] {
  const question = (fast: string, goal?: number): RatioQuestion => ({ fast, slow, ...(goal === undefined ? {} : { goal }) })
  return [question('qcow2', inProcess), ...(isBuilt ? [question('program', program)] : [])]
}

async function plainGroups(place: Place): Promise<GroupResult[]> {
  const { context, folder, bytes, where, direct } = place
  const [raw, image, out] = [join(folder, 'source.raw'), join(folder, 'source.qcow2'), join(folder, 'out')]
  const ratios = direct ? ratiosTo('qemu-img -m 16 -W', 1) : [...ratiosTo('qemu-img', 1, 0.85), ...ratiosTo('qemu-img -m 16 -W')]
  await toQcow2(raw, image, false, {})
  const groups = [
    await measure({ id: `raw-qcow2-${where}`, title: `raw to qcow2, ${where}`, bytes, ratios, variants: variants(place, out, ['-f', 'raw', '-O', 'qcow2', raw], () => toQcow2(raw, out, direct, {})) }, context),
    await measure({ id: `qcow2-raw-${where}`, title: `qcow2 to raw, ${where}`, bytes, ratios, variants: variants(place, out, ['-f', 'qcow2', '-O', 'raw', image], () => toRaw(image, out, direct)) }, context),
  ]
  rmSync(image)
  return groups
}

async function compressedGroups(place: Place, notes: string[]): Promise<GroupResult[]> {
  const { context, folder, bytes, where, qemuImg } = place
  const [raw, image, out] = [join(folder, 'source.raw'), join(folder, 'compressed.qcow2'), join(folder, 'out')]
  await timed(qemuImg, ['convert', '-c', '-f', 'raw', '-O', 'qcow2', raw, image])
  await toQcow2(raw, out, false, { compressed: true })
  notes.push(`compressed size of ours / qemu-img's: ${(statSync(out).size / statSync(image).size).toFixed(4)} (goal: at most 1.005)`)
  const groups = [
    await measure(
      {
        id: `compress-${where}`,
        title: `raw to qcow2, zlib, ${where}`,
        bytes,
        variants: variants(place, out, ['-c', '-f', 'raw', '-O', 'qcow2', raw], () => toQcow2(raw, out, false, { compressed: true })),
        ratios: ratiosTo('qemu-img -m 16 -W', 1.7),
      },
      context,
    ),
    await measure(
      {
        id: `decompress-${where}`,
        title: `zlib qcow2 to raw, ${where}`,
        bytes,
        variants: variants(place, out, ['-f', 'qcow2', '-O', 'raw', image], () => toRaw(image, out, false)),
        ratios: ratiosTo('qemu-img -m 16 -W', 1),
      },
      context,
    ),
  ]
  rmSync(image)
  return groups
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const qemu = findQemus().at(-1)
  if (qemu === undefined) return { groups: [], figures: [], notes: ['qemu-img is not installed: nothing to compare with.'] }
  const notes: string[] = isBuilt ? [] : [notBuilt]
  const groups: GroupResult[] = []
  const bytes = context.quick ? 4 * MiB : (context.size ?? 512) * MiB
  const disk = sampleDisk(bytes)
  const memory = existsSync('/dev/shm') ? mkdtempSync('/dev/shm/qcow2-bench-') : undefined
  try {
    for (const folder of memory === undefined ? [context.folder] : [memory, context.folder]) {
      const place = { context, qemuImg: join(qemu.folder, 'qemu-img'), folder, bytes, where: folder === memory ? 'in memory' : 'O_DIRECT', direct: folder !== memory }
      writeFileSync(join(folder, 'source.raw'), disk)
      groups.push(...(await plainGroups(place)))
      if (folder === memory) groups.push(...(await compressedGroups(place, notes)))
      rmSync(join(folder, 'source.raw'))
    }
  } finally {
    if (memory !== undefined) rmSync(memory, { recursive: true, force: true })
  }
  return { groups, figures: [], notes }
}

export const scenario: Scenario = {
  name: 'convert',
  title: 'Converting disks',
  about:
    'A disk of real programs, noise and a hole is converted from raw to qcow2 and back, in memory (CPU bound) and with O_DIRECT on the disk, ' +
    'and compressed with zlib on all cores and decompressed. Ours runs in a warm process, and as the program from its start, and flushes its target; qemu-img is ' +
    'timed from its start, and flushes only with -t none.',
  run,
}
