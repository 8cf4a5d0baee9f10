/** A saved VM started again: by postcopy from a RAM image, by the eager ways of this library and of QEMU. */
import { randomFillSync } from 'node:crypto'
import * as fs from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { openFile } from '../../src/block.ts'
import { Qcow2Image } from '../../src/index.ts'
import { migrationStream, openSaved, revert, revertEagerly, save, saveVmState, type FaultOrder } from '../../src/snapshot.ts'
import { groupFigure } from '../figures.ts'
import { measure, type GroupResult, type Measured, type Variant } from '../harness.ts'
import { findQemus, QemuVm, type QemuInstallation } from '../qemu.ts'
import { dropFromCache } from '../live-files.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

const MiB = 1 << 20
const firmware = resolve(import.meta.dirname, '../../test/fixtures/guest/tinybios.bin')

/** What is timed, from the start of the revert. */
type Moment = 'runs' | 'works' | 'complete'

const titles: Record<Moment, string> = {
  runs: 'until the guest runs (RESUME)',
  works: 'until its first round of work is done',
  complete: 'until all of its memory is there',
}

interface Setup {
  readonly context: ScenarioContext
  readonly qemu: QemuInstallation
  readonly machine: string
  readonly memory: number
  readonly fill: string
  readonly files: { readonly ram: string; readonly stream: string; readonly image: string }
  readonly order: FaultOrder
}

/** Waits for the guest's first good round; the time of it. */
async function works(vm: QemuVm): Promise<number> {
  for (let waited = 0; !/T [0-9a-f]{8}\n/.test(vm.serial); waited++) {
    if (waited > 60_000) throw new Error('the guest does not work')
    await sleep(1)
  }
  if (/^[ES] /m.test(vm.serial)) throw new Error(`the guest's memory is damaged: ${vm.serial.slice(0, 200)}`)
  return performance.now()
}

function vmArguments(setup: Pick<Setup, 'machine' | 'memory' | 'fill'>): string[] {
  return [
    ...['-M', setup.machine, '-m', String(setup.memory), '-bios', firmware],
    ...['-device', `loader,file=${setup.fill},addr=0x4000000,force-raw=on`],
  ]
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const memory = context.size ?? (context.quick ? 96 : 256)
  const groups: GroupResult[] = []
  const qemus = findQemus()
  for (const qemu of context.quick ? qemus.slice(0, 1) : qemus) {
    const setup = await prepare(context, qemu, memory)
    for (const moment of ['runs', 'works', 'complete'] as const) groups.push(await group(setup, moment))
    for (const file of Object.values(setup.files)) fs.rmSync(file, { force: true })
  }
  const notes = qemus.length === 0 ? ['QEMU is not installed: there is nothing to revert into.'] : []
  return { groups, figures: groups.map(groupFigure), notes }
}

/** Saves one guest in every form; all hold the same moment. */
async function prepare(context: ScenarioContext, qemu: QemuInstallation, memory: number): Promise<Setup> {
  const fill = join(context.folder, 'fill')
  // three quarters of the memory behind the guest's own are random, the rest is zero
  fs.writeFileSync(fill, randomFillSync(Buffer.allocUnsafe(Math.floor(((memory - 64) * MiB * 3) / 4))))
  const [major, minor] = qemu.version.split('.')
  const files = { ram: join(context.folder, 'ram.qcow2'), stream: join(context.folder, 'saved.mig'), image: join(context.folder, 'image.qcow2') }
  const base = { machine: `pc-i440fx-${major}.${minor}`, memory, fill }
  const vm = await QemuVm.start(qemu, vmArguments(base))
  try {
    await works(vm)
    await save(vm.qmp, { memory: files.ram, manifest: false })
  } finally {
    await vm.end()
  }
  await using saved = await openSaved(files.ram)
  {
    await using target = await Qcow2Image.create(files.image, { size: 64 * MiB })
    await saveVmState(target, migrationStream(saved, { zeroPages: 'keep' }), { name: 'snap' })
  }
  await using stream = await openFile(files.stream, { create: 'w' })
  let at = 0
  for await (const chunk of migrationStream(saved)) {
    await stream.write(at, chunk)
    at += chunk.length
  }
  const setup = { context, qemu, ...base, files, order: { version: 1, clusterSize: 65_536, blocks: [], faults: [] } as FaultOrder }
  const order = await recordOrder(setup)
  return { ...setup, order }
}

async function recordOrder(setup: Setup): Promise<FaultOrder> {
  let order: FaultOrder | undefined
  const variant = ours(setup, 'works', { id: 'record', title: '', onOrder: (recorded) => (order = recorded) })
  await variant.prepare!()
  await variant.run()
  await variant.finish!()
  return order!
}

async function group(setup: Setup, moment: Moment): Promise<GroupResult> {
  const { context, qemu, order } = setup
  const variants: Variant[] = [
    ours(setup, moment, { id: 'postcopy', title: 'postcopy from RAM image' }),
    ours(setup, moment, { id: 'postcopy-order', title: 'the same, recorded order sent ahead', order }),
    ours(setup, moment, { id: 'postcopy-cold', title: 'postcopy from RAM image, cold cache', cold: true }),
    ours(setup, moment, { id: 'postcopy-stream', title: 'postcopy from stream file', file: setup.files.stream }),
    ours(setup, moment, { id: 'precopy', title: 'ordinary migration from RAM image', eager: true }),
    loadvm(setup, moment),
  ]
  return measure({
    id: `revert-${qemu.version}-${moment}`,
    title: `Revert, QEMU ${qemu.version}, ${setup.memory} MiB: ${titles[moment]}`,
    note: 'QEMU waits with -incoming; loadvm: HMP loadvm in a VM that waits, cache=writeback. The guest works on 32 MiB of its memory.',
    bytes: setup.memory * MiB,
    variants,
    ratios: [
      { fast: 'postcopy', slow: 'loadvm' },
      { fast: 'postcopy', slow: 'precopy', ...(moment === 'complete' && { goal: 1 / 0.6 }) },
      { fast: 'postcopy-order', slow: 'postcopy', ...(moment === 'works' && { goal: 2 }) },
    ],
  }, context)
}

interface OurWay {
  readonly id: string
  readonly title: string
  readonly file?: string
  readonly order?: FaultOrder
  readonly cold?: boolean
  readonly eager?: boolean
  readonly onOrder?: (order: FaultOrder) => void
}

function ours(setup: Setup, moment: Moment, way: OurWay): Variant {
  const { context, qemu } = setup
  let vm: QemuVm
  return {
    id: way.id,
    title: way.title,
    async prepare() {
      vm = await QemuVm.start(qemu, [...vmArguments(setup), '-incoming', 'defer'])
      if (way.cold === true) dropFromCache(way.file ?? setup.files.ram)
    },
    async run() {
      const resumed = vm.qmp.events('RESUME').next().then(() => performance.now())
      const before = performance.now()
      const options = { qmp: vm.qmp, incoming: join(context.folder, 'incoming'), faultOrder: way.order }
      const reverting = way.eager === true ? revertEagerly(way.file ?? setup.files.ram, options) : revert(way.file ?? setup.files.ram, options)
      const done = reverting.then((report) => {
        if ('faultOrder' in report) way.onOrder?.(report.faultOrder)
        return performance.now()
      })
      const [runs, worked, complete] = await Promise.all([resumed, works(vm), done])
      return since(before, { runs, works: worked, complete }, moment)
    },
    async finish() {
      await vm.end()
      fs.rmSync(join(context.folder, 'incoming'), { force: true })
    },
  }
}

function loadvm(setup: Setup, moment: Moment): Variant {
  const { qemu, files } = setup
  let vm: QemuVm
  return {
    id: 'loadvm',
    title: 'QEMU loadvm from an internal snapshot, writeback',
    async prepare() {
      vm = await QemuVm.start(qemu, [...vmArguments(setup), '-S', '-drive', `if=none,id=d0,file=${files.image},format=qcow2`])
    },
    async run() {
      const before = performance.now()
      await vm.monitor('loadvm snap')
      await vm.qmp.execute('cont')
      const runs = performance.now()
      return since(before, { runs, works: await works(vm), complete: runs }, moment)
    },
    async finish() {
      await vm.end()
    },
  }
}

function since(before: number, moments: Record<Moment, number>, moment: Moment): Measured {
  return { seconds: (moments[moment] - before) / 1000 }
}

export const scenario: Scenario = {
  name: 'revert',
  title: 'Revert a saved VM',
  about:
    'A guest that was saved while it ran is started in a QEMU that waits: by postcopy (the guest runs before its memory is there), by an ordinary migration of the same data, and by QEMU’s own loadvm. ' +
    'Timed from the call; the guest checks all of its working memory in every round, and a damaged page fails the run.',
  run,
}
