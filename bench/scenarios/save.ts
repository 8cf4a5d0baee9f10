/** A running guest saved: how long it stands still, and how long it takes. */
import * as fs from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { save, saveTo, type MemoryTarget, type SaveMode, type SaveReport } from '../../src/snapshot.ts'
import { groupFigure } from '../figures.ts'
import { fillPrefix, guestMemoryArguments, writeGuestMemory } from '../guest-memory.ts'
import { measureMoments, type GroupResult, type Measured, type Variant } from '../harness.ts'
import { findQemus, qemuImg, QemuVm, type QemuInstallation } from '../qemu.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

const MiB = 1 << 20
const firmware = resolve(import.meta.dirname, '../../test/fixtures/guest/tinybios.bin')

interface Setup {
  readonly context: ScenarioContext
  readonly qemu: QemuInstallation
  readonly memory: number
  readonly fills: readonly string[]
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const memory = context.size ?? (context.quick ? 96 : 1024)
  const fills = writeGuestMemory(context.folder, memory)
  const groups: GroupResult[] = []
  const qemus = findQemus()
  for (const qemu of context.quick ? qemus.slice(0, 1) : qemus) {
    groups.push(...(await compare({ context, qemu, memory, fills })))
  }
  const notes = qemus.length === 0 ? ['QEMU is not installed: there is nothing to save.'] : groups.filter(({ id }) => id.endsWith('stopped')).map(extremes)
  return { groups, figures: groups.map(groupFigure), notes }
}

function compare(setup: Setup): Promise<GroupResult[]> {
  const { context, qemu, memory } = setup
  const ram = join(context.folder, 'ram.qcow2')
  const stream = join(context.folder, 'saved.mig')
  const variants = [
    ours(setup, 'background', 'background, RAM image', ram),
    ours(setup, 'background-disk', 'background with a disk frozen, RAM image', ram, { disk: true }),
    ours(setup, 'background-stream', 'background, stream file', { stream }),
    ours(setup, 'stop', 'stop and copy, RAM image', ram, { mode: 'stop' }),
    ours(setup, 'stop-cached', 'stop and copy, RAM image, page cache', ram, { mode: 'stop', direct: false }),
    thrownAway(setup),
    savevm(setup, 'writeback'),
    savevm(setup, 'none'),
  ]
  const plan = {
    id: `save-${qemu.version}`,
    title: `Save, QEMU ${qemu.version}, ${memory} MiB`,
    note: 'The guest changes and checks 32 MiB all the time. Standing still: by the timestamps of STOP and RESUME. savevm: HMP.',
    bytes: memory * MiB,
    variants,
  }
  const ratios = [
    ...['savevm-writeback', 'savevm-none'].flatMap((slow) => ['background', 'background-disk', 'stop', 'stop-cached'].map((fast) => ({ fast, slow }))),
    { fast: 'background', slow: 'thrown-away' },
  ]
  return measureMoments(plan, [
    { moment: 'stopped', id: `${plan.id}-stopped`, title: `${plan.title}: the guest stands still`, ratios },
    { moment: 'took', id: `${plan.id}-took`, title: `${plan.title}: until the saved VM is durable`, ratios },
  ], context)
}

/** A median hides the longest stop, which is what users notice. */
function extremes({ title, variants }: GroupResult): string {
  const each = variants.map((variant) => {
    const longest = Math.max(...variant.runs.map(({ seconds }) => seconds))
    return `${variant.title} ${(variant.seconds.median * 1000).toFixed(1)} (${(longest * 1000).toFixed(1)})`
  })
  return `${title}, milliseconds in the middle (and at most): ${each.join('; ')}`
}

async function boot({ qemu, memory, fills, context }: Setup, cache: 'writeback' | 'none' = 'writeback'): Promise<{ vm: QemuVm; disk: string }> {
  const disk = join(context.folder, 'disk.qcow2')
  for (const file of fs.readdirSync(context.folder)) if (!file.startsWith(fillPrefix)) fs.rmSync(join(context.folder, file))
  await qemuImg(qemu, 'create', '-q', '-f', 'qcow2', disk, String(64 * MiB))
  const vm = await QemuVm.start(qemu, [
    ...['-M', 'pc', '-m', String(memory), '-bios', firmware],
    ...guestMemoryArguments(fills),
    ...['-blockdev', `driver=qcow2,node-name=d0,cache.direct=${cache === 'none' ? 'on' : 'off'},file.driver=file,file.filename=${disk}`, '-device', 'virtio-blk-pci,drive=d0'],
  ])
  for (let waited = 0; !/T [0-9a-f]{8}\n/.test(vm.serial); waited++) {
    if (waited > 60_000) throw new Error('the guest does not work')
    await sleep(1)
  }
  return { vm, disk }
}

function ours(
  setup: Setup,
  id: string,
  title: string,
  memory: MemoryTarget,
  { disk = false, mode = 'background', direct }: { readonly disk?: boolean; readonly mode?: SaveMode; readonly direct?: boolean } = {},
): Variant {
  let vm: QemuVm
  return {
    id,
    title,
    async prepare() {
      ;({ vm } = await boot(setup))
    },
    async run() {
      const disks = disk ? [{ node: 'd0', overlay: join(setup.context.folder, 'overlay.qcow2') }] : 'none' as const
      return momentsOf(await save(vm.qmp, { memory, mode, disks, direct, manifest: false }))
    },
    finish: () => ended(vm),
  }
}

/** What is left when nothing is stored: QEMU, the guest beside it, the socket and the parser. */
function thrownAway(setup: Setup): Variant {
  let vm: QemuVm
  const done = (): Promise<void> => Promise.resolve()
  return {
    id: 'thrown-away',
    title: 'background, received and thrown away',
    async prepare() {
      ;({ vm } = await boot(setup))
    },
    async run() {
      return momentsOf(await saveTo(vm.qmp, { finish: done, abort: done }, { disks: 'none' }))
    },
    finish: () => ended(vm),
  }
}

function momentsOf({ stoppedFor, took }: SaveReport): Measured {
  return { moments: { stopped: stoppedFor / 1000, took: took / 1000 } }
}

function savevm(setup: Setup, cache: 'writeback' | 'none'): Variant {
  let vm: QemuVm
  return {
    id: `savevm-${cache}`,
    title: `QEMU savevm, cache=${cache}`,
    async prepare() {
      ;({ vm } = await boot(setup, cache))
    },
    async run() {
      const events = vm.qmp.events('STOP', 'RESUME')
      const before = performance.now()
      await vm.monitor('savevm snap')
      const took = performance.now() - before
      const times: number[] = []
      for (let n = 0; n < 2; n++) {
        const { timestamp } = (await events.next()).value as { timestamp: { seconds: number; microseconds: number } }
        times.push(timestamp.seconds + timestamp.microseconds / 1e6)
      }
      await events.return()
      return { moments: { stopped: times[1]! - times[0]!, took: took / 1000 } }
    },
    finish: () => ended(vm),
  }
}

/** The guest must have gone on unharmed. */
async function ended(vm: QemuVm): Promise<void> {
  await sleep(50)
  const damaged = /^[ES] /m.test(vm.serial)
  await vm.end()
  if (damaged) throw new Error("the guest's memory is damaged")
}

export const scenario: Scenario = {
  name: 'save',
  title: 'Save a running VM',
  about:
    'A guest that changes its memory all the time is saved into files: in the background while it runs on, standing still, and by QEMU’s own savevm. The guest checks its memory in every round; damage fails the run.',
  run,
}
