/** A VM state into a qcow2 snapshot and back: real QEMU's savevm and loadvm, and this library with the same stream. */
import { randomFillSync } from 'node:crypto'
import * as fs from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { openFile, ReadAheadPrefetcher } from '../../src/block.ts'
import { Qcow2Image } from '../../src/index.ts'
import { saveVmState } from '../../src/snapshot.ts'
import { groupFigure } from '../figures.ts'
import { measure, type GroupResult, type Measured, type RatioQuestion, type Variant } from '../harness.ts'
import { GuestMemory, Loader } from '../load.ts'
import { findQemus, qemuImg, QemuVm, type QemuInstallation } from '../qemu.ts'
import { settleDisk } from '../real-file.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'
import { capturedVmState, enlargedVmState } from '../vm-state.ts'

const MiB = 1 << 20
/** The image's guest disk: there only because a snapshot needs one. */
const diskSize = 64 * MiB

/** A guest that never runs. */
export interface Guest {
  readonly machine: string
  /** File of random bytes that QEMU loads into the guest's memory. */
  readonly ram: string
  readonly ramSize: number
  /** MiB of guest memory; default a little more than the random bytes. */
  readonly megabytes?: number
}

/** A guest and what QEMU makes of it. */
export interface SaveSetup extends Guest {
  readonly context: ScenarioContext
  readonly qemus: readonly QemuInstallation[]
  readonly stream: Uint8Array
}

interface Setup extends SaveSetup {
  readonly memory: GuestMemory
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const size = (context.size ?? (context.quick ? 16 : 1024)) * MiB
  const qemus = findQemus()
  const ram = join(context.folder, 'ram')
  fs.writeFileSync(ram, randomFillSync(Buffer.allocUnsafe(size)))
  const guest = { ram, ramSize: size, machine: machineOf(qemus) }
  // the very stream that QEMU makes of this memory, the oldest so that all can load it; without QEMU an enlarged capture
  const stream = qemus[0] === undefined ? enlargedVmState(capturedVmState(), size) : await captureStream(qemus[0], guest, context.folder)
  const setup = { ...guest, context: { ...context, warmup: 0 }, qemus, stream, memory: new GuestMemory(stream) }
  const create = await createGroup(setup)
  const load = await loadGroup(setup)
  return {
    groups: [create, load],
    figures: [create, load].map(groupFigure),
    notes: qemus.length === 0 ? ['QEMU is not installed: there was nothing to compare with.'] : [],
  }
}

/** A machine type that every QEMU found has. */
export function machineOf(qemus: readonly QemuInstallation[]): string {
  const [major, minor] = qemus[0]?.version.split('.') ?? []
  return major === undefined || minor === undefined ? 'pc' : `pc-i440fx-${major}.${minor}`
}

function vmArguments({ machine, ram, ramSize, megabytes }: Guest): string[] {
  const size = megabytes ?? Math.ceil(ramSize / MiB / 4) * 4 + 176
  return ['-M', machine, '-S', '-m', String(size), '-device', `loader,file=${ram},addr=0x100000,force-raw=on`]
}

function startVm(qemu: QemuInstallation, setup: Guest, image: string, cache: string): Promise<QemuVm> {
  return QemuVm.start(qemu, [...vmArguments(setup), '-drive', `if=none,id=d0,file=${image},format=qcow2,cache=${cache},aio=threads`])
}

/** The stream that QEMU makes of the guest. */
export async function captureStream(qemu: QemuInstallation, guest: Guest, folder: string): Promise<Uint8Array> {
  const file = join(folder, 'stream')
  const vm = await QemuVm.start(qemu, vmArguments(guest))
  try {
    await vm.qmp.execute('migrate-set-parameters', { 'max-bandwidth': 2 ** 40 })
    await vm.qmp.execute('migrate', { uri: `exec:cat > ${file}` })
    for (let status: string | undefined; status !== 'completed'; ) {
      await sleep(20)
      status = (await vm.qmp.execute('query-migrate')).status
      if (status === 'failed') throw new Error('QEMU could not write its migration stream')
    }
  } finally {
    await vm.end()
  }
  const stream = fs.readFileSync(file)
  fs.rmSync(file)
  return stream
}

async function createGroup(setup: Setup): Promise<GroupResult> {
  const { context, qemus, stream } = setup
  const image = join(context.folder, 'saved.qcow2')
  const variants: Variant[] = [oursSaves(setup, image), ...qemus.map((qemu) => qemuSaves(setup, qemu, image, 'none'))]
  const newest = qemus.at(-1)
  if (newest !== undefined) variants.push(qemuSaves(setup, newest, image, 'writeback'))
  const result = await measure({
    id: 'savevm',
    title: 'Create: VM state into a qcow2 snapshot, fresh image',
    note: 'From memory into a new image, with clusters, refcounts, tables and the final flush. QEMU: HMP savevm of a stopped VM.',
    bytes: stream.length,
    variants,
    ratios: againstQemu(qemus, 6, 1.5),
  }, context)
  fs.rmSync(image, { force: true })
  return result
}

function againstQemu(qemus: readonly QemuInstallation[], goal: number, writebackGoal: number): RatioQuestion[] {
  const newest = qemus.at(-1)
  if (newest === undefined) return []
  return [...qemus.map((qemu) => ({ fast: 'ours', slow: `qemu-${qemu.version}-none`, goal })), { fast: 'ours', slow: `qemu-${newest.version}-writeback`, goal: writebackGoal }]
}

/** The stream into an internal snapshot. */
export function oursSaves({ context, qemus, stream }: SaveSetup, image: string): Variant {
  return {
    id: 'ours',
    title: 'saveVmState, O_DIRECT',
    prepare() {
      fs.rmSync(image, { force: true })
      settleDisk(context.folder)
    },
    async run() {
      await using target = await Qcow2Image.create(await openFile(image, { direct: true, create: 'wx' }), { size: diskSize })
      await saveVmState(target, pieces(stream), { name: 'snap' })
      return undefined
    },
    async finish() {
      if (qemus.length > 0) await checkSnapshot(qemus.at(-1)!, image)
    },
  }
}

/** The stream as a socket would bring it. */
export function* pieces(stream: Uint8Array): Generator<Uint8Array> {
  for (let at = 0; at < stream.length; at += 256 << 10) yield stream.subarray(at, at + (256 << 10))
}

/** QEMU's own `savevm` of the guest. */
export function qemuSaves(setup: SaveSetup, qemu: QemuInstallation, image: string, cache: string): Variant {
  let vm: QemuVm | undefined
  return {
    id: `qemu-${qemu.version}-${cache}`,
    title: `QEMU ${qemu.version} savevm, cache=${cache}`,
    async prepare() {
      fs.rmSync(image, { force: true })
      await qemuImg(qemu, 'create', '-q', '-f', 'qcow2', image, String(diskSize))
      vm = await startVm(qemu, setup, image, cache)
      settleDisk(setup.context.folder)
    },
    run: () => timed(vm!, 'savevm snap'),
    async finish() {
      await vm!.end()
      await checkSnapshot(qemu, image)
    },
  }
}

async function timed(vm: QemuVm, command: string): Promise<Measured> {
  const cpu = vm.cpuSeconds
  const before = performance.now()
  await vm.monitor(command)
  return { seconds: (performance.now() - before) / 1000, cpuSeconds: vm.cpuSeconds - cpu }
}

async function checkSnapshot(qemu: QemuInstallation, image: string): Promise<void> {
  await qemuImg(qemu, 'check', '-q', image)
  if (!(await qemuImg(qemu, 'snapshot', '-l', image)).includes('snap')) throw new Error('the snapshot is not in the image')
}

async function loadGroup(setup: Setup): Promise<GroupResult> {
  const { context, qemus, stream } = setup
  const image = join(context.folder, 'loaded.qcow2')
  {
    await using target = await Qcow2Image.create(await openFile(image, { direct: true, create: 'wx' }), { size: diskSize })
    await saveVmState(target, pieces(stream), { name: 'snap' })
  }
  const variants: Variant[] = [oursLoads(setup, image), ...qemus.map((qemu) => qemuLoads(setup, qemu, image))]
  const result = await measure({
    id: 'loadvm',
    title: 'Load: VM state out of a qcow2 snapshot',
    note: 'Past the page cache; every page is parsed and copied to its place in memory. QEMU: HMP loadvm in a VM that waits. All load the same image, written by this library.',
    bytes: stream.length,
    variants,
    ratios: qemus.map((qemu) => ({ fast: 'ours', slow: `qemu-${qemu.version}-none`, goal: 6 })),
  }, context)
  fs.rmSync(image)
  return result
}

function oursLoads({ memory, context }: Setup, image: string): Variant {
  return {
    id: 'ours',
    title: 'read ahead, O_DIRECT, parse, copy',
    prepare() {
      settleDisk(context.folder)
      memory.touch()
    },
    async run() {
      await using source = await Qcow2Image.open(await openFile(image, { direct: true, readOnly: true }), { readOnly: true })
      await using snapshot = await source.snapshots.open('snap')
      const loader = new Loader(memory)
      await using ahead = new ReadAheadPrefetcher(snapshot.vmState)
      for await (const piece of ahead.borrowedChunks()) loader.push(piece)
      loader.end()
      return undefined
    },
  }
}

function qemuLoads(setup: Setup, qemu: QemuInstallation, image: string): Variant {
  let vm: QemuVm | undefined
  return {
    id: `qemu-${qemu.version}-none`,
    title: `QEMU ${qemu.version} loadvm, cache=none`,
    async prepare() {
      vm = await startVm(qemu, setup, image, 'none')
      settleDisk(setup.context.folder)
    },
    run: () => timed(vm!, 'loadvm snap'),
    finish: () => vm!.end(),
  }
}

export const scenario: Scenario = {
  name: 'savevm',
  title: 'savevm and loadvm',
  about:
    'A guest with 1 GiB of random memory (QEMU’s generic loader puts it there; the guest never runs) is saved into a new qcow2 image and loaded again: by real QEMU’s savevm and loadvm, ' +
    'and by this library with the very stream that QEMU makes of that memory. Past the page cache on both sides; every image is checked by qemu-img.',
  run,
}
