/** Work on the metadata of a large image: check, map, snapshots; beside `qemu-img`. */
import { execFileSync } from 'node:child_process'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { openFile } from '../../src/block.ts'
import { checkImage, Qcow2Image } from '../../src/index.ts'
import { hostFile } from '../../src/qcow2/open.ts'
import { ImageWriter } from '../../src/qcow2/image-writer.ts'
import { measure, mulberry32, type GroupPlan, type RatioQuestion, type Variant } from '../harness.ts'
import { isBuilt, notBuilt, programVariant } from '../program.ts'
import { findQemus } from '../qemu.ts'
import { timed } from '../timed.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

/** 1 TiB with 200,000 clusters in runs all over the disk. Data is left to the file's holes. */
async function makeImage(path: string, size: number, clusters: number): Promise<void> {
  await using host = await openFile(path, { create: 'w' })
  const writer = new ImageWriter(hostFile(host), { size })
  const { clusterSize } = writer.geometry
  const random = mulberry32(1)
  const runs = Math.ceil(clusters / 64)
  const stride = Math.floor(size / clusterSize / runs)
  for (let run = 0; run < runs; run++) {
    let guest = (run * stride + Math.floor(random() * (stride - 128))) * clusterSize
    for (let left = 1 + Math.floor(random() * 126); left > 0; ) {
      const taken = writer.data(guest, left)
      guest += taken.clusters * clusterSize
      left -= taken.clusters
    }
  }
  await writer.finish()
}

async function countExtents(path: string): Promise<number> {
  await using image = await Qcow2Image.open(path, { readOnly: true })
  const lines: string[] = []
  for await (const extent of image.map()) lines.push(JSON.stringify(extent))
  return lines.join('\n').length
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const qemu = findQemus().at(-1)
  if (qemu === undefined) return { groups: [], figures: [], notes: ['qemu-img is not installed: nothing to compare with.'] }
  const qemuImg = join(qemu.folder, 'qemu-img')
  const [path, copy] = [join(context.folder, 'large.qcow2'), join(context.folder, 'copy.qcow2')]
  await makeImage(path, context.quick ? 2 ** 34 : 2 ** 40, context.quick ? 2000 : 200_000)
  const ours = (run: () => Promise<unknown>, prepare?: () => Promise<void>): Variant => ({
    id: 'qcow2',
    title: 'this library, in process',
    ...(prepare === undefined ? {} : { prepare }),
    run: async () => {
      await run()
      return undefined
    },
  })
  const theirs = (args: readonly string[], prepare?: () => Promise<void>): Variant => ({
    id: 'qemu-img',
    title: `qemu-img ${args.slice(0, -1).join(' ')}`,
    ...(prepare === undefined ? {} : { prepare }),
    run: () => timed(qemuImg, args),
  })
  const plan = (id: string, title: string, goal: number, variants: Variant[], more: RatioQuestion[] = []): GroupPlan => ({
    id,
    title,
    bytes: 0,
    variants,
    ratios: [{ fast: 'qcow2', slow: 'qemu-img', goal }, ...more],
  })
  const whole = (goal: number): RatioQuestion[] => (isBuilt ? [{ fast: 'program', slow: 'qemu-img', goal }] : [])
  // the copy keeps the holes; what it wrote is on the disk before the clock runs
  const fresh = async (): Promise<void> => {
    execFileSync('cp', ['--sparse=always', path, copy])
    await using file = await openFile(copy)
    await file.flush()
  }
  const snapshotted = async (): Promise<void> => {
    await fresh()
    await timed(qemuImg, ['snapshot', '-c', 's', copy])
  }
  const withImage = async (use: (image: Qcow2Image) => Promise<unknown>): Promise<void> => {
    await using image = await Qcow2Image.open(copy)
    await use(image)
  }
  const checkFile = async (): Promise<unknown> => {
    await using host = await openFile(path, { readOnly: true })
    return await checkImage(host)
  }
  const plans = [
    plan('check', 'check', 2, [ours(checkFile), ...programVariant(['check', path]), theirs(['check', path])], whole(1)),
    plan('map', 'map as JSON', 4, [ours(() => countExtents(path)), ...programVariant(['map', '--output=json', path]), theirs(['map', '--output=json', path])], whole(4)),
    plan('snapshot-create', 'snapshot create', 2.5, [ours(() => withImage((image) => image.snapshots.create({ name: 's' })), fresh), theirs(['snapshot', '-c', 's', copy], fresh)]),
    plan('snapshot-apply', 'snapshot apply', 2.5, [ours(() => withImage((image) => image.snapshots.apply('s')), snapshotted), theirs(['snapshot', '-a', 's', copy], snapshotted)]),
    plan('snapshot-delete', 'snapshot delete', 2.5, [ours(() => withImage((image) => image.snapshots.delete('s')), snapshotted), theirs(['snapshot', '-d', 's', copy], snapshotted)]),
  ]
  const groups = []
  for (const each of plans) groups.push(await measure(each, context))
  for (const file of [path, copy]) rmSync(file, { force: true })
  return { groups, figures: [], notes: isBuilt ? [] : [notBuilt] }
}

export const scenario: Scenario = {
  name: 'metadata',
  title: 'Metadata of a 1 TiB image',
  about:
    'An image of 1 TiB with 200,000 clusters in some 3,000 runs is checked and mapped; an internal snapshot is created, applied and deleted. ' +
    'Ours runs in a warm process and opens the file each time; check and map also as the program from its start, as qemu-img is timed. Both flush alike.',
  run,
}
