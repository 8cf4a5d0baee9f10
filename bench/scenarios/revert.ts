/** A saved VM started again: by postcopy from a RAM image, by the eager ways of this library and of QEMU. */
import * as fs from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { openFile } from '../../src/block.ts'
import { migrationStream, openSaved, revert, revertEagerly, save, type FaultOrder, type RevertReport } from '../../src/snapshot.ts'
import { groupFigure } from '../figures.ts'
import { guestMemoryArguments, writeGuestMemory } from '../guest-memory.ts'
import { measureMoments, summarize, type GroupResult, type Measured, type Variant } from '../harness.ts'
import { findQemus, qemuImg, QemuVm, type QemuInstallation } from '../qemu.ts'
import { dropFromCache } from '../live-files.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

const MiB = 1 << 20
const firmware = resolve(import.meta.dirname, '../../test/fixtures/guest/tinybios.bin')

/** What is timed, from the start of the revert. */
type Moment = 'runs' | 'works' | 'complete'

const titles: Record<Moment, string> = {
  runs: 'until the guest runs (RESUME)',
  works: 'until it has done a whole round of work',
  complete: 'until all of its memory is there',
}

interface Setup {
  readonly context: ScenarioContext
  readonly qemu: QemuInstallation
  readonly machine: string
  readonly memory: number
  readonly fills: readonly string[]
  readonly files: { readonly ram: string; readonly stream: string; readonly image: string }
  /** Written by QEMU 10's own `migrate` to a file with capability mapped-ram; absent before. */
  readonly mapped?: string
  readonly order: FaultOrder
  /** Milliseconds from each request of a guest until its pages were handed on, in all counted and uncounted rounds. */
  readonly latencies: Map<string, number[]>
}

/** Waits until the guest has done a good round from its start to its end; it may have been saved shortly before the end of one. The time of it. */
async function works(vm: QemuVm): Promise<number> {
  for (let waited = 0; !/T [0-9a-f]{8}\n[^]*T [0-9a-f]{8}\n/.test(vm.serial); waited++) {
    if (waited > 60_000) throw new Error('the guest does not work')
    await sleep(1)
  }
  if (/^[ES] /m.test(vm.serial)) throw new Error(`the guest's memory is damaged: ${vm.serial.slice(0, 200)}`)
  return performance.now()
}

function vmArguments(setup: Pick<Setup, 'machine' | 'memory' | 'fills'>): string[] {
  return [
    ...['-M', setup.machine, '-m', String(setup.memory), '-bios', firmware],
    ...guestMemoryArguments(setup.fills),
  ]
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const memory = context.size ?? (context.quick ? 96 : 256)
  const groups: GroupResult[] = []
  const notes: string[] = []
  const qemus = findQemus()
  for (const qemu of context.quick ? qemus.slice(0, 1) : qemus) {
    const setup = await prepare(context, qemu, memory)
    groups.push(...(await compare(setup)))
    notes.push(...latencyNotes(setup))
    for (const file of fs.readdirSync(context.folder)) fs.rmSync(join(context.folder, file), { force: true })
  }
  if (qemus.length === 0) notes.push('QEMU is not installed: there is nothing to revert into.')
  return { groups, figures: groups.map(groupFigure), notes }
}

/** Saves one guest in every form; all hold the same moment. */
async function prepare(context: ScenarioContext, qemu: QemuInstallation, memory: number): Promise<Setup> {
  const fills = writeGuestMemory(context.folder, memory)
  const [major, minor] = qemu.version.split('.')
  const files = { ram: join(context.folder, 'ram.qcow2'), stream: join(context.folder, 'saved.mig'), image: join(context.folder, 'image.qcow2') }
  const base = { machine: `pc-i440fx-${major}.${minor}`, memory, fills }
  await qemuImg(qemu, 'create', '-q', '-f', 'qcow2', files.image, String(64 * MiB))
  const vm = await QemuVm.start(qemu, [...vmArguments(base), ...drive(files.image, 'writeback')])
  let mapped: string | undefined
  try {
    await works(vm)
    await save(vm.qmp, { memory: files.ram, disks: 'none', manifest: false })
    await vm.monitor('savevm snap')
    if (Number(major) >= 10) await writeMappedRam(vm, (mapped = join(context.folder, 'mapped.mig')))
  } finally {
    await vm.end()
  }
  await using saved = await openSaved(files.ram)
  await using stream = await openFile(files.stream, { create: 'w' })
  let at = 0
  for await (const chunk of migrationStream(saved)) {
    await stream.write(at, chunk)
    at += chunk.length
  }
  const order: FaultOrder = { version: 1, clusterSize: 65_536, blocks: [], faults: [] }
  const setup: Setup = { context, qemu, ...base, files, order, latencies: new Map(), ...(mapped !== undefined && { mapped }) }
  return { ...setup, order: await recordOrder(setup) }
}

/** QEMU's own fastest file to load: pages at fixed places. Leaves the VM stopped. */
async function writeMappedRam(vm: QemuVm, file: string): Promise<void> {
  await vm.qmp.execute('migrate-set-capabilities', { capabilities: [{ capability: 'mapped-ram', state: true }] })
  await vm.qmp.execute('stop')
  await vm.qmp.execute('migrate', { uri: `file:${file}` })
  for (;;) {
    const { status } = await vm.qmp.execute('query-migrate')
    if (status === 'completed') return
    if (status === 'failed') throw new Error('QEMU did not write the mapped-ram file')
    await sleep(20)
  }
}

async function recordOrder(setup: Setup): Promise<FaultOrder> {
  let order: FaultOrder | undefined
  const variant = ours(setup, { id: 'record', title: 'the first revert, which records the order', onReport: ({ faultOrder }) => (order = faultOrder) })
  await variant.prepare!()
  await variant.run()
  await variant.finish!()
  return order!
}

function compare(setup: Setup): Promise<GroupResult[]> {
  const { context, qemu, order, files, mapped, memory } = setup
  const variants: Variant[] = [
    ours(setup, { id: 'postcopy', title: 'postcopy from RAM image' }),
    ours(setup, { id: 'postcopy-order', title: 'the same, recorded order sent first', order }),
    ours(setup, { id: 'postcopy-cold', title: 'postcopy from RAM image, cold cache', cold: true }),
    ours(setup, { id: 'postcopy-stream', title: 'postcopy from stream file', file: files.stream }),
    ours(setup, { id: 'postcopy-savevm', title: 'postcopy from snapshot by QEMU savevm', file: files.image }),
    ours(setup, { id: 'precopy', title: 'ordinary migration from RAM image', eager: true }),
    loadvm(setup, 'writeback'),
    loadvm(setup, 'none'),
    ...(mapped === undefined
      ? []
      : [
          incomingFile(setup, { id: 'qemu-file', title: 'QEMU -incoming file:', file: files.stream }),
          incomingFile(setup, { id: 'qemu-mapped', title: 'QEMU -incoming file:, mapped-ram', file: mapped, mappedRam: true }),
          incomingFile(setup, { id: 'qemu-file-cold', title: 'QEMU -incoming file:, cold cache', file: files.stream, cold: true }),
        ]),
  ]
  const plan = {
    id: `revert-${qemu.version}`,
    title: `Revert, QEMU ${qemu.version}, ${memory} MiB`,
    note: 'QEMU waits with -incoming; loadvm: HMP loadvm in a VM that waits. The guest works on 32 MiB, spread over all of its memory in runs of 64 KiB.',
    bytes: memory * MiB,
    variants,
  }
  const moments = (['runs', 'works', 'complete'] as const).map((moment) => ({
    moment,
    id: `${plan.id}-${moment}`,
    title: `${plan.title}: ${titles[moment]}`,
    ratios: [
      { fast: 'postcopy', slow: 'loadvm-writeback' },
      { fast: 'postcopy', slow: 'loadvm-none' },
      { fast: 'postcopy', slow: 'precopy', ...(moment === 'complete' && { goal: 1 / 0.6 }) },
      { fast: 'postcopy-order', slow: 'postcopy', ...(moment === 'works' && { goal: 2 }) },
      ...(mapped === undefined ? [] : [{ fast: 'postcopy', slow: 'qemu-file' }, { fast: 'postcopy', slow: 'qemu-mapped' }, { fast: 'postcopy-cold', slow: 'qemu-file-cold' }]),
    ],
  }))
  return measureMoments(plan, moments, context)
}

/** How long pages that a guest asked for were in this process, while the rest of its memory was sent. */
function latencyNotes({ qemu, memory, latencies }: Setup): string[] {
  return [...latencies].filter(([, times]) => times.length > 0).map(([title, times]) => {
    const sorted = [...times].sort((a, b) => a - b)
    const late = sorted[Math.floor(sorted.length * 0.99)]!
    return `QEMU ${qemu.version}, ${memory} MiB, ${title}: ${times.length} requests served in ${summarize(times).median.toFixed(2)} ms (median), ${late.toFixed(2)} ms (99 of 100).`
  })
}

interface OurWay {
  readonly id: string
  readonly title: string
  readonly file?: string
  readonly order?: FaultOrder
  readonly cold?: boolean
  readonly eager?: boolean
  readonly onReport?: (report: RevertReport) => void
}

function ours(setup: Setup, way: OurWay): Variant {
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
        if ('faultOrder' in report) {
          way.onReport?.(report)
          const times = setup.latencies.get(way.title) ?? []
          setup.latencies.set(way.title, times.concat(report.latencies))
        }
        return performance.now()
      })
      const [runs, worked, complete] = await Promise.all([resumed, works(vm), done])
      return since(before, { runs, works: worked, complete })
    },
    async finish() {
      await vm.end()
      fs.rmSync(join(context.folder, 'incoming'), { force: true })
    },
  }
}

function drive(image: string, cache: 'writeback' | 'none'): string[] {
  return ['-drive', `if=none,id=d0,file=${image},format=qcow2,cache=${cache}`]
}

function loadvm(setup: Setup, cache: 'writeback' | 'none'): Variant {
  const { qemu, files } = setup
  let vm: QemuVm
  return {
    id: `loadvm-${cache}`,
    title: `QEMU loadvm, cache=${cache}`,
    async prepare() {
      vm = await QemuVm.start(qemu, [...vmArguments(setup), '-S', ...drive(files.image, cache)])
    },
    async run() {
      const before = performance.now()
      await vm.monitor('loadvm snap')
      await vm.qmp.execute('cont')
      const runs = performance.now()
      return since(before, { runs, works: await works(vm), complete: runs })
    },
    async finish() {
      await vm.end()
    },
  }
}

interface FileWay {
  readonly id: string
  readonly title: string
  readonly file: string
  readonly mappedRam?: boolean
  readonly cold?: boolean
}

/** QEMU 10 reads the file itself. */
function incomingFile(setup: Setup, { id, title, file, mappedRam = false, cold = false }: FileWay): Variant {
  let vm: QemuVm
  return {
    id,
    title,
    async prepare() {
      vm = await QemuVm.start(setup.qemu, [...vmArguments(setup), '-incoming', 'defer'])
      const capabilities = [{ capability: 'mapped-ram', state: mappedRam }, { capability: 'events', state: true }]
      await vm.qmp.execute('migrate-set-capabilities', { capabilities })
      if (cold) dropFromCache(file)
    },
    async run() {
      const events = vm.qmp.events('MIGRATION')
      const before = performance.now()
      await vm.qmp.execute('migrate-incoming', { uri: `file:${file}` })
      for await (const { data } of events) {
        if (data?.['status'] === 'completed') break
        if (data?.['status'] === 'failed') throw new Error(`QEMU did not load ${file}`)
      }
      if (mappedRam) await vm.qmp.execute('cont') // saved while it was stopped
      const runs = performance.now()
      return since(before, { runs, works: await works(vm), complete: runs })
    },
    async finish() {
      await vm.end()
    },
  }
}

function since(before: number, moments: Record<Moment, number>): Measured {
  const seconds = Object.entries(moments).map(([moment, at]) => [moment, (at - before) / 1000] as const)
  return { moments: Object.fromEntries(seconds) }
}

export const scenario: Scenario = {
  name: 'revert',
  title: 'Revert a saved VM',
  about:
    'A guest that was saved while it ran is started in a QEMU that waits: by postcopy (the guest runs before its memory is there), by an ordinary migration of the same data, and by QEMU’s own loadvm. ' +
    'Timed from the call; the guest checks all of its working memory in every round, and a damaged page fails the run.',
  run,
}
