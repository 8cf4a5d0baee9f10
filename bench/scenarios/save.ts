/** A running guest saved: how long it stands still, and how long it takes. */
import { randomFillSync } from 'node:crypto'
import * as fs from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { save, saveTo, type MemoryTarget, type SaveMode } from '../../src/snapshot.ts'
import { groupFigure } from '../figures.ts'
import { measure, type GroupResult, type Variant } from '../harness.ts'
import { findQemus, qemuImg, QemuVm, type QemuInstallation } from '../qemu.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

const MiB = 1 << 20
const firmware = resolve(import.meta.dirname, '../../test/fixtures/guest/tinybios.bin')

/** What is timed. */
type Span = 'stopped' | 'took'

interface Setup {
  readonly context: ScenarioContext
  readonly qemu: QemuInstallation
  readonly memory: number
  readonly fill: string
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const memory = context.size ?? (context.quick ? 96 : 1024)
  const fill = join(context.folder, 'fill')
  fs.writeFileSync(fill, randomFillSync(Buffer.allocUnsafe(Math.floor(((memory - 64) * MiB * 3) / 4))))
  const groups: GroupResult[] = []
  const qemus = findQemus()
  for (const qemu of context.quick ? qemus.slice(0, 1) : qemus) {
    for (const span of ['stopped', 'took'] as const) groups.push(await group({ context, qemu, memory, fill }, span))
  }
  const notes = qemus.length === 0 ? ['QEMU is not installed: there is nothing to save.'] : []
  return { groups, figures: groups.map(groupFigure), notes }
}

function group(setup: Setup, span: Span): Promise<GroupResult> {
  const { context, qemu, memory } = setup
  const ram = join(context.folder, 'ram.qcow2')
  const stream = join(context.folder, 'saved.mig')
  const variants = [
    ours(setup, span, 'background', 'background, RAM image', ram),
    ours(setup, span, 'background-disk', 'background with a disk frozen, RAM image', ram, { disk: true }),
    ours(setup, span, 'background-stream', 'background, stream file', { stream }),
    ours(setup, span, 'stop', 'stop and copy, RAM image', ram, { mode: 'stop' }),
    ours(setup, span, 'stop-direct', 'stop and copy, RAM image, O_DIRECT', ram, { mode: 'stop', direct: true }),
    thrownAway(setup, span),
    savevm(setup, span),
  ]
  return measure({
    id: `save-${qemu.version}-${span}`,
    title: `Save, QEMU ${qemu.version}, ${memory} MiB: ${span === 'stopped' ? 'the guest stands still' : 'until the saved VM is durable'}`,
    note: 'The guest changes and checks 32 MiB all the time. Standing still: by the timestamps of STOP and RESUME. savevm: HMP, cache=writeback.',
    bytes: memory * MiB,
    variants,
    ratios: [
      ...['background', 'background-disk', 'stop', 'stop-direct'].map((fast) => ({ fast, slow: 'savevm' })),
      { fast: 'background', slow: 'thrown-away' },
    ],
  }, context)
}

async function boot({ qemu, memory, fill, context }: Setup): Promise<{ vm: QemuVm; disk: string }> {
  const disk = join(context.folder, 'disk.qcow2')
  for (const file of fs.readdirSync(context.folder)) if (file !== 'fill') fs.rmSync(join(context.folder, file))
  await qemuImg(qemu, 'create', '-q', '-f', 'qcow2', disk, String(64 * MiB))
  const vm = await QemuVm.start(qemu, [
    ...['-M', 'pc', '-m', String(memory), '-bios', firmware],
    ...['-device', `loader,file=${fill},addr=0x4000000,force-raw=on`],
    ...['-blockdev', `driver=qcow2,node-name=d0,file.driver=file,file.filename=${disk}`, '-device', 'virtio-blk-pci,drive=d0'],
  ])
  for (let waited = 0; !/T [0-9a-f]{8}\n/.test(vm.serial); waited++) {
    if (waited > 60_000) throw new Error('the guest does not work')
    await sleep(1)
  }
  return { vm, disk }
}

function ours(
  setup: Setup,
  span: Span,
  id: string,
  title: string,
  memory: MemoryTarget,
  { disk = false, mode = 'background', direct = false }: { readonly disk?: boolean; readonly mode?: SaveMode; readonly direct?: boolean } = {},
): Variant {
  let vm: QemuVm
  return {
    id,
    title,
    async prepare() {
      ;({ vm } = await boot(setup))
    },
    async run() {
      const disks = disk ? [{ node: 'd0', overlay: join(setup.context.folder, 'overlay.qcow2') }] : []
      const report = await save(vm.qmp, { memory, mode, disks, direct, manifest: false })
      return { seconds: (span === 'stopped' ? report.stoppedFor : report.took) / 1000 }
    },
    finish: () => ended(vm),
  }
}

/** What is left when nothing is stored: QEMU, the guest beside it, the socket and the parser. */
function thrownAway(setup: Setup, span: Span): Variant {
  let vm: QemuVm
  const done = (): Promise<void> => Promise.resolve()
  return {
    id: 'thrown-away',
    title: 'background, received and thrown away',
    async prepare() {
      ;({ vm } = await boot(setup))
    },
    async run() {
      const report = await saveTo(vm.qmp, { finish: done, abort: done })
      return { seconds: (span === 'stopped' ? report.stoppedFor : report.took) / 1000 }
    },
    finish: () => ended(vm),
  }
}

function savevm(setup: Setup, span: Span): Variant {
  let vm: QemuVm
  return {
    id: 'savevm',
    title: 'QEMU savevm, cache=writeback',
    async prepare() {
      ;({ vm } = await boot(setup))
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
      return { seconds: span === 'stopped' ? times[1]! - times[0]! : took / 1000 }
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
