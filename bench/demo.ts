/**
 * `npm run demo`: a real VM's state through every layer and back. Saves a captured migration stream into
 * a qcow2 snapshot the old way and the new way, reads both back, compares, and shows what it took. Where
 * QEMU is installed, a real QEMU checks the image and starts from it.
 */
import { createHash } from 'node:crypto'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { gunzipSync } from 'node:zlib'
import { MemoryDevice, openFile, Qcow2Error, ReadAheadPrefetcher, simulatedDisk, type BlockDevice, type DiskCommand, type FileDevice, type SimulatedDisk } from '../src/block.ts'
import { Qcow2Image } from '../src/index.ts'
import { saveVmState } from '../src/snapshot.ts'
import { traceChart, type TracePanel } from './chart.ts'
import { GuestMemory, Loader } from './load.ts'
import { OldWay } from './old-way.ts'
import { qemuReadLength } from './qemu-replay.ts'
import { findQemus, qemuImg, QemuVm, type QemuInstallation } from './qemu.ts'
import { digits, rate, table } from './report.ts'
import { enlargedVmState, qemuWriteLengths } from './vm-state.ts'

const MiB = 1 << 20
const captures = join(import.meta.dirname, '../test/fixtures/captures')
const out = join(tmpdir(), 'qcow2-demo')

type Way = 'old' | 'new'

/** A stack's bottom and the clock that times it, in seconds. */
interface Medium {
  readonly device: BlockDevice
  readonly clock: () => number
}

/** Saves the stream as snapshot `demo` of a new image. Seconds. */
async function save(stream: Uint8Array, way: Way, { device, clock }: Medium): Promise<number> {
  const before = clock()
  await using image = await Qcow2Image.create(way === 'new' ? device : new OldWay(device, qemuWriteLengths(stream)), { size: MiB })
  await saveVmState(image, pieces(stream), { name: 'demo' })
  return clock() - before
}

function* pieces(stream: Uint8Array): Generator<Uint8Array> {
  for (let at = 0; at < stream.length; at += 256 << 10) yield stream.subarray(at, at + (256 << 10))
}

/** Reads the snapshot's stream back, compares it, and gives every page its place in memory. Seconds. */
async function load(stream: Uint8Array, way: Way, { device, clock }: Medium, memory: GuestMemory): Promise<number> {
  await using image = await Qcow2Image.open(device, { readOnly: true })
  await using snapshot = await image.snapshots.open('demo')
  const loader = new Loader(memory)
  let at = 0
  let different = 0
  const before = clock()
  await using ahead = new ReadAheadPrefetcher(snapshot.vmState)
  for await (const piece of way === 'new' ? ahead.borrowedChunks() : synchronousReads(snapshot.vmState)) {
    if (Buffer.compare(piece, stream.subarray(at, at + piece.length)) !== 0) different++
    at += piece.length
    loader.push(piece)
  }
  const seconds = clock() - before
  loader.end()
  if (different > 0 || at !== stream.length) throw new Error(`${way}: the stream read back is not the stream written`)
  return seconds
}

async function* synchronousReads(state: BlockDevice): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < state.size; at += qemuReadLength) yield await state.read(at, Math.min(qemuReadLength, state.size - at))
}

interface Row {
  readonly where: string
  readonly bytes: number
  readonly seconds: Readonly<Record<Way, { readonly save: number; readonly load: number }>>
}

/** Both ways on media of the same kind. */
async function bothWays(where: string, stream: Uint8Array, medium: (way: Way, step: 'save' | 'load') => Promise<Medium>): Promise<Row> {
  const memory = new GuestMemory(stream)
  const run = async (way: Way): Promise<{ save: number; load: number }> => {
    const saved = await save(stream, way, await medium(way, 'save'))
    const loaded = await load(stream, way, await medium(way, 'load'), memory)
    return { save: saved, load: loaded }
  }
  return { where, bytes: stream.length, seconds: { old: await run('old'), new: await run('new') } }
}

async function onSimulatedDisk(stream: Uint8Array, trace: Record<Way, DiskCommand[]>): Promise<Row> {
  const saved: Partial<Record<Way, MemoryDevice>> = {}
  return bothWays('simulated disk, 150 MB/s, 15,000 rpm', stream, (way, step) => {
    const medium = step === 'save' ? (saved[way] = new MemoryDevice(0, { growable: true })) : new MemoryDevice(saved[way]!.bytes)
    const commands = step === 'save' ? { onCommand: (command: DiskCommand) => void trace[way].push(command) } : {}
    const disk: SimulatedDisk = simulatedDisk(medium, commands)
    return Promise.resolve({ device: disk, clock: () => disk.elapsed / 1e6 })
  })
}

async function onRealDisk(stream: Uint8Array, folder: string): Promise<Row> {
  let how = 'past the page cache'
  const row = await bothWays('', stream, async (way, step) => {
    const file = join(folder, `${way}.qcow2`)
    // not empty: only then can be tried out how requests must be aligned
    if (step === 'save') fs.writeFileSync(file, new Uint8Array(65_536))
    const device = await openDirect(file, step === 'load')
    if (device.limits.requestAlignment === 1) how = 'through the page cache: this file system has no direct I/O'
    return { device, clock: () => performance.now() / 1000 }
  })
  return { ...row, where: `this disk, ${how}` }
}

async function openDirect(file: string, readOnly: boolean): Promise<FileDevice> {
  try {
    return await openFile(file, { readOnly, direct: true })
  } catch (error) {
    if (!Qcow2Error.is(error, 'ERR_UNSUPPORTED')) throw error
    return openFile(file, { readOnly })
  }
}

function print(row: Row): void {
  const cells = (way: Way, what: string): string[] => {
    const { save: saved, load: loaded } = row.seconds[way]
    return [what, `${digits(saved)} s`, `${digits(rate(row.bytes, saved))} MB/s`, `${digits(loaded)} s`, `${digits(rate(row.bytes, loaded))} MB/s`]
  }
  const { old, new: fresh } = row.seconds
  console.log(`\n${row.where}: ${digits(row.bytes / 1e6)} MB of VM state`)
  const rows = [
    ['', 'save', '', 'load', ''],
    cells('old', 'old way (QEMU’s requests)'),
    cells('new', 'new way (queue, prefetch)'),
    ['', `${digits(old.save / fresh.save)}x`, '', `${digits(old.load / fresh.load)}x`, ''],
  ]
  console.log(table(rows).join('\n'))
}

function draw(trace: Record<Way, DiskCommand[]>): string {
  const span = 60
  const panel = (label: string, tone: Way): TracePanel => {
    // only the VM state itself: without the image's metadata at its beginning
    const commands = trace[tone].filter((command) => command.offset >= 4 * 65_536)
    const [from, base] = [commands[0]?.started ?? 0, commands[0]?.offset ?? 0]
    const ticks = commands.map((each) => ({ operation: each.operation, offset: each.offset - base, length: each.length, start: (each.started - from) / 1000, end: (each.completed - from) / 1000 }))
    return { label, tone, ticks: ticks.filter((tick) => tick.start < span) }
  }
  const svg = traceChart({ name: 'demo', title: 'Saving the VM on the simulated disk', span, reach: 9e6, panels: [panel('old way', 'old'), panel('new way', 'new')] })
  const file = join(out, 'offset-over-time.svg')
  fs.writeFileSync(file, svg)
  return file
}

/** A real QEMU's judgement: the image is clean, it sees the snapshot, and the guest goes on from it. */
async function judge(qemu: QemuInstallation, image: string): Promise<void> {
  console.log(`\nQEMU ${qemu.version} on ${image}`)
  console.log(`  qemu-img check: ${(await qemuImg(qemu, 'check', image)).split('\n')[0]}`)
  const lines = (await qemuImg(qemu, 'snapshot', '-l', image)).trim().split('\n')
  for (const line of lines.slice(1)) console.log(`  ${line}`)
  const firmware = join(import.meta.dirname, '../test/fixtures/guest/tinybios.bin')
  const vm = await QemuVm.start(qemu, ['-M', 'pc', '-m', '4', '-bios', firmware, '-drive', `if=none,id=d0,file=${image},format=qcow2`, '-loadvm', 'demo'])
  try {
    for (let waited = 0; !/^T [0-9a-f]{8}$/m.test(vm.serial) && waited < 10_000; waited += 20) await sleep(20)
    const first = /^T ([0-9a-f]{8})$/m.exec(vm.serial)?.[1]
    if (first === undefined || /^[ES] /m.test(vm.serial)) throw new Error(`the guest did not go on: ${vm.serial}`)
    console.log(`  -loadvm demo: the guest runs and found all its memory right (round ${Number.parseInt(first, 16)} of its endless check)`)
  } finally {
    await vm.end()
  }
}

interface Expected {
  readonly machine: string
  readonly counts: { readonly normal: number; readonly zero: number }
  readonly device_sections: number
  readonly ram_sha256: Readonly<Record<string, string>>
}

async function main(): Promise<void> {
  fs.mkdirSync(out, { recursive: true })
  const newest = findQemus().at(-1)
  // a VM state loads in the QEMU that made it, and in newer ones
  const name = `${newest !== undefined && Number.parseInt(newest.version, 10) < 10 ? 'qemu72' : 'qemu100'}-savevm.vmstate`
  const stream = gunzipSync(fs.readFileSync(join(captures, `${name}.gz`)))
  const expected = (JSON.parse(fs.readFileSync(join(captures, 'expected.json'), 'utf8')) as Record<string, Expected>)[name]!
  const { machine, counts, device_sections: devices } = expected
  console.log(`A real VM (${machine}, captured from QEMU): ${digits(stream.length / 1e6)} MB, ${counts.normal + counts.zero} pages, ${devices} devices`)

  await onRealDisk(stream, out)
  console.log('Saved into a qcow2 snapshot the old way and the new way; read back, every byte is the same.')
  const memory = new GuestMemory(stream)
  await load(stream, 'new', { device: await openFile(join(out, 'new.qcow2'), { readOnly: true }), clock: () => 0 }, memory)
  for (const [block, digest] of Object.entries(expected.ram_sha256)) {
    if (createHash('sha256').update(memory.block(block)).digest('hex') !== digest) throw new Error(`RAM block ${block} differs from QEMU's`)
  }
  console.log(`Guest memory: all ${Object.keys(expected.ram_sha256).length} RAM blocks have the SHA-256 of the original VM's.`)
  if (newest === undefined) console.log('\nQEMU is not installed here; with it, the demo also has it check the images and start from them.')
  else for (const way of ['old', 'new']) await judge(newest, join(out, `${way}.qcow2`))

  // the same VM with more memory, so that a disk has something to do
  const trace: Record<Way, DiskCommand[]> = { old: [], new: [] }
  const large = enlargedVmState(stream, 96 * MiB)
  const rows = [await onSimulatedDisk(large, trace)]
  fs.mkdirSync(join(out, 'large'), { recursive: true })
  rows.push(await onRealDisk(large, join(out, 'large')))
  fs.rmSync(join(out, 'large'), { recursive: true })
  rows.forEach(print)
  console.log(`\nImages:  ${join(out, 'old.qcow2')}\n         ${join(out, 'new.qcow2')}\nDrawing: ${draw(trace)}`)
}

await main()
