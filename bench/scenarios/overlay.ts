/** Making an overlay on an image: in process, and by `qemu-img create -b`. */
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { Qcow2Image } from '../../src/index.ts'
import { measure, summarize, type Measured } from '../harness.ts'
import { findQemus } from '../qemu.ts'
import { timed } from '../timed.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

const backing = { file: 'base.qcow2', format: 'qcow2' } as const

/** The median of many, each created, closed and so flushed. */
async function create(folder: string, count: number): Promise<Measured> {
  const seconds: number[] = []
  for (let n = 0; n < count; n++) {
    const path = join(folder, `overlay-${n}.qcow2`)
    const before = performance.now()
    await (await Qcow2Image.create(path, { backing })).close()
    seconds.push((performance.now() - before) / 1000)
    rmSync(path)
  }
  return { seconds: summarize(seconds).median }
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const { folder, quick } = context
  const base = join(folder, backing.file)
  await (await Qcow2Image.create(base, { size: 2 ** 35 })).close()
  const qemu = findQemus().at(-1)
  const qemuImg = qemu === undefined ? undefined : join(qemu.folder, 'qemu-img')
  const overlay = join(folder, 'overlay.qcow2')
  const count = quick ? 3 : 100
  if (!quick) await create(folder, 1000) // a process that has made many is warm: its code is compiled
  const group = await measure(
    {
      id: 'overlay',
      title: 'an overlay on an image of 32 GiB, created and closed',
      note: `ours is the median of ${count} in each run`,
      bytes: 0,
      variants: [
        { id: 'qcow2', title: 'this library, in process', run: () => create(folder, count) },
        ...(qemuImg === undefined
          ? []
          : [{ id: 'qemu-img', title: 'qemu-img create -b', run: () => timed(qemuImg, ['create', '-f', 'qcow2', '-F', 'qcow2', '-b', base, overlay]), finish: () => rmSync(overlay) }]),
      ],
      ratios: qemuImg === undefined ? [] : [{ fast: 'qcow2', slow: 'qemu-img' }],
    },
    context,
  )
  rmSync(base)
  const ours = group.variants[0]!.seconds.median * 1000
  const notes = [`ours at the median: ${ours.toFixed(2)} ms (goal: under 1 ms)`]
  if (qemuImg === undefined) notes.push('qemu-img is not installed: nothing to compare with.')
  return { groups: [group], figures: [], notes }
}

export const scenario: Scenario = {
  name: 'overlay',
  title: 'Creating an overlay',
  about:
    'What starts a disposable VM: a new image over a backing file, whose header both read first. Ours is created and closed in a process that made a thousand before, ' +
    'with one flush; qemu-img is timed from its start, and flushes several times.',
  run,
}
