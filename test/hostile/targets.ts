/** All that reads bytes which others made: a valid sample of each, the fields in it that claim something, and what is done with it. One table, for claimed sizes and for the fuzz. */
import { gzipSync } from 'node:zlib'
import { MemoryDevice } from '../../src/block/memory.ts'
import { LuksImage } from '../../src/luks/luks-image.ts'
import { Qcow2Error } from '../../src/core/errors.ts'
import { exportMappedRam } from '../../src/migration/mapped-ram.ts'
import { MultifdParser } from '../../src/migration/multifd.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import { ReturnPathParser } from '../../src/migration/return-path.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { commands, encodeOption, encodeRequest, optionTypes } from '../../src/nbd/protocol.ts'
import { NbdServer } from '../../src/nbd/server.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { convertToQcow2 } from '../../src/qcow2/convert.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { inspectImage } from '../../src/qcow2/inspect.ts'
import { repairImage } from '../../src/qcow2/repair.ts'
import { QmpClient } from '../../src/qmp/client.ts'
import { capture as store } from '../../src/snapshot/capture.ts'
import { parseFaultOrder } from '../../src/snapshot/fault-order.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import { parseManifest } from '../../src/snapshot/parse-manifest.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { RamImage } from '../../src/snapshot/ram-image.ts'
import { capture } from '../migration/captures.ts'
import { libvirtImage, zstdFrame } from '../migration/libvirt.ts'
import { converse, saying, valid as conversation } from '../nbd/support/conversation.ts'
import { duplexPair, greeting } from '../qmp/monitor.ts'
import { ClaimingDevice } from './claiming-device.ts'
import { imageFields, imageOf, luksFields, passphrase, type ImageKind } from './qcow2-sample.ts'
import type { Field } from './values.ts'

/** Makes a device on the hostile bytes, as often as it is called. */
export type Open = (options?: { readOnly?: boolean }) => ClaimingDevice
type Task = (open: Open, signal: AbortSignal, bytes: Uint8Array) => Promise<unknown>

export interface Sample {
  readonly bytes: Uint8Array
  /** What follows `bytes` in the file and is not changed. */
  readonly tail?: Uint8Array
  /** None for text, whose values are found by its grammar. */
  readonly fields: readonly Field[]
  readonly text?: boolean
  readonly tasks: Readonly<Record<string, Task>>
}

export interface Target {
  readonly name: string
  make(): Promise<Sample> | Sample
}

const piece = 64 << 10
const stream = (): Uint8Array => capture('qemu72-compress.mig')

async function readEnds(device: { readonly size: number; read(offset: number, length: number, options: { signal: AbortSignal }): Promise<unknown> }, signal: AbortSignal): Promise<void> {
  const length = Math.min(device.size, piece)
  await device.read(0, length, { signal })
  await device.read(device.size - length, length, { signal })
}

const imageTasks = (how: { passphrase?: string }): Record<string, Task> => ({
  info: (open, signal) => readImageInfo(open({ readOnly: true }), { signal }),
  inspect: (open, signal) => inspectImage(open({ readOnly: true }), { signal }),
  check: (open, signal) => checkImage(open({ readOnly: true }), { signal }),
  repair: (open, signal) => repairImage(open(), { repair: 'all', signal }),
  async read(open, signal) {
    await using image = await Qcow2Image.open(open({ readOnly: true }), { ...how, readOnly: true, signal })
    await readEnds(image, signal)
    let extents = 0
    for await (const _ of image.map({ signal })) if (++extents > 20_000) break
    for (const { id } of image.snapshots) {
      await using snapshot = await image.snapshots.open(id, { signal })
      await readEnds(snapshot, signal)
      await readEnds(snapshot.vmState, signal)
    }
    for (const { name } of await image.bitmaps.list()) for await (const _ of image.bitmaps.read(name)) if (++extents > 40_000) break
  },
  async write(open, signal) {
    await using image = await Qcow2Image.open(open(), { ...how, signal })
    if (image.size >= 512) await image.write(0, new Uint8Array(512), { signal })
    await image.snapshots.create({ name: 'another', signal })
    const [first] = image.snapshots
    if (first !== undefined) await image.snapshots.delete(first.id, { signal })
    await image.flush()
  },
  async convert(open, signal) {
    await using image = await Qcow2Image.open(open({ readOnly: true }), { ...how, readOnly: true, signal })
    await convertToQcow2(image, new ClaimingDevice([]), { signal })
  },
  async 'saved VM'(open, signal) {
    await using saved = await openSaved(open({ readOnly: true }), { ...how, signal })
    await saved.blocks[0]?.content.read(0, 256, { signal })
  },
})

function imageTarget(name: string, kind: ImageKind): Target {
  return {
    name,
    async make() {
      const bytes = await imageOf(kind)
      return { bytes, fields: imageFields(bytes), tasks: imageTasks(kind.encrypted === true ? { passphrase } : {}) }
    },
  }
}

const streamTasks: Record<string, Task> = {
  async index(open, signal) {
    await using vm = await VmState.index(open({ readOnly: true }), { signal })
    for (const { name, length } of vm.ram.blocks) await vm.ram.read(name, 0, Math.min(length, piece))
    if (vm.description !== undefined) await vm.decodeDevices({ signal })
  },
  async saved(open, signal) {
    await using saved = await openSaved(open({ readOnly: true }), { signal })
    await saved.blocks[0]?.content.read(0, 256, { signal })
  },
}

/** The first records of each kind, and the numbers at their starts. */
function streamFields(bytes: Uint8Array): Field[] {
  const seen = new Map<string, number>()
  const fields: Field[] = []
  for (const { kind, offset } of new MigrationParser().push(bytes) as Iterable<{ kind: string; offset: number }>) {
    const count = (seen.get(kind) ?? 0) + 1
    seen.set(kind, count)
    if (count > 3) continue
    for (const [at, width] of [[0, 1], [0, 4], [0, 8], [1, 4], [5, 4], [7, 8], [8, 8], [9, 4]] as const) fields.push({ name: `${kind} ${count} + ${at}`, at: offset + at, bytes: width })
  }
  const description = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).lastIndexOf('{"page_size"')
  return description < 0 ? fields : [...fields, { name: 'VM description: length', at: description - 4, bytes: 4 }]
}

/** Every aligned number of a piece of the file. */
const words = (structure: string, start: number, end: number, width: 4 | 8, little = false): Field[] =>
  Array.from({ length: Math.floor((end - start) / width) }, (_, i) => ({ name: `${structure} + ${i * width}`, at: start + i * width, bytes: width, little }))

const parserTask = (make: () => { push(chunk: Uint8Array): Iterable<unknown> }): Record<string, Task> => ({
  async parse(_open, signal, bytes) {
    const parser = make()
    for (let at = 0; at < bytes.length; at += 4000) {
      for (const _ of parser.push(bytes.slice(at, at + 4000))) signal.throwIfAborted()
      if (at % 400_000 === 0) await new Promise((resolve) => setImmediate(resolve))
    }
  },
})

const textTask = (parse: (text: string) => unknown): Record<string, Task> => ({ parse: async (_open, _signal, bytes) => Promise.resolve(parse(new TextDecoder().decode(bytes))) })

const manifest = {
  format: 'qcow2 saved VM', version: 2, created: '2026-01-01T00:00:00.000Z', qemu: { qemu: { major: 7, minor: 2, micro: 22 }, package: '' }, machine: 'pc-i440fx-7.2', accelerator: 'tcg',
  running: true, status: 'running', cpus: { count: 1, type: 'qemu64' }, devices: ['ram', 'timer'], memory: { kind: 'ram image', file: 'a.qcow2', snapshot: 'vm' }, pageSize: 4096,
  ramBlocks: [{ name: 'pc.ram', length: 16_777_216 }],
  disks: [{ node: 'd0', device: 'virtio0', file: 'd.qcow2', format: 'qcow2', size: 1_048_576, frozen: { overlay: 'o.qcow2', node: 'n' } }, { node: 'd1', file: 'e', format: 'raw', frozen: false }],
}

const monitorAnswers = [greeting, '{"return": {}, "id": 1}', '{"event": "STOP", "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}}', '{"return": {"status": "running", "running": true}, "id": 2}'].join('\r\n') + '\r\n'

async function monitor(bytes: Uint8Array, signal: AbortSignal): Promise<void> {
  const [client, server] = duplexPair()
  const lines = [...Buffer.from(bytes).toString('latin1').matchAll(/[^\n]*\n?/g)].map(([line]) => Buffer.from(line, 'latin1'))
  // the greeting, and then a line for each command; after the last the connection ends
  const say = (count: number): void => {
    for (const line of lines.splice(0, count)) server.write(line)
    if (lines.length === 0) server.end()
  }
  server.on('data', () => say(2))
  say(1)
  await using qmp = await QmpClient.connect(client, { timeout: 500, signal })
  await qmp.execute('query-status', {}, { signal })
}

const clientBytes = Buffer.concat([
  Uint8Array.of(0, 0, 0, 3),
  encodeOption(optionTypes.structuredReply, new Uint8Array(0)),
  encodeOption(optionTypes.go, new Uint8Array(6)),
  ...[commands.read, commands.write, commands.writeZeroes, commands.blockStatus, commands.disconnect].flatMap((command, i) => [
    encodeRequest({ flags: 0, command, cookie: new Uint8Array(8).fill(i), offset: 4096 * i, length: 512 }),
    ...(command === commands.write ? [new Uint8Array(512)] : []),
  ]),
])

async function serve(bytes: Uint8Array): Promise<void> {
  const problems: unknown[] = []
  const server = new NbdServer([{ name: '', device: new MemoryDevice(1 << 20) }], { onConnectionError: (error) => problems.push(error) })
  await server.serve(saying(bytes))
  await server.close()
  if (problems.length > 0) throw problems.find((problem) => !Qcow2Error.is(problem)) ?? problems[0]
}

async function ramImage(): Promise<Uint8Array> {
  const device = new MemoryDevice(0, { growable: true })
  await store(stream(), RamImageWriter.to(device))
  return device.bytes.slice()
}

export const targets: readonly Target[] = [
  imageTarget('qcow2', {}),
  imageTarget('qcow2 with subclusters', { extendedL2: true }),
  imageTarget('qcow2 with LUKS', { encrypted: true }),
  {
    name: 'LUKS',
    async make() {
      const device = new MemoryDevice(0, { growable: true })
      await using _ = await LuksImage.create(device, { size: 1 << 20, passphrase, iterations: 1000 })
      const open: Task = async (file, signal) => {
        await using image = await LuksImage.open(file({ readOnly: true }), { passphrase, readOnly: true, signal })
        await readEnds(image, signal)
      }
      return { bytes: device.bytes.slice(), fields: luksFields(0), tasks: { open } }
    },
  },
  { name: 'stream', make: () => ({ bytes: stream(), fields: streamFields(stream()), tasks: streamTasks }) },
  {
    name: 'mapped-ram',
    async make() {
      const device = new MemoryDevice(0, { growable: true })
      await using vm = await VmState.index(new MemoryDevice(stream()))
      await exportMappedRam(vm, device)
      const bytes = device.bytes.slice(0, 1 << 20)
      return { bytes, tail: device.bytes.slice(1 << 20), fields: [...words('start', 0, 512, 8), ...words('start', 4, 512, 4)], tasks: streamTasks }
    },
  },
  { name: 'libvirt', make: () => ({ bytes: libvirtImage(stream(), 0), fields: words('header', 16, 92, 4, true), tasks: streamTasks }) },
  { name: 'gzip', make: () => ({ bytes: gzipSync(stream()), fields: words('header', 0, 32, 4, true), tasks: streamTasks }) },
  { name: 'zstd', make: () => ({ bytes: zstdFrame(stream()), fields: [...words('frame', 0, 32, 4, true), { name: 'block header', at: 6, bytes: 4, little: true }, { name: 'window', at: 5, bytes: 1 }], tasks: streamTasks }) },
  {
    name: 'RAM image',
    async make() {
      const bytes = await ramImage()
      const trailer = Buffer.from(bytes.buffer).lastIndexOf('RAMIMAGE') - 8
      const own: Field[] = [{ name: 'layout: length', at: trailer, bytes: 4 }, { name: 'layout: version', at: trailer + 4, bytes: 4 }]
      const open: Task = async (file, signal) => {
        await using image = await RamImage.open(file({ readOnly: true }), { signal })
        for (const { name, length } of image.blocks) await image.read(name, 0, Math.min(length, piece))
        await using vm = await image.vmState({ signal })
        if (vm.description !== undefined) await vm.decodeDevices({ signal })
      }
      return { bytes, fields: [...own, ...imageFields(bytes)], tasks: { open, saved: streamTasks['saved']! } }
    },
  },
  { name: 'multifd', make: () => ({ bytes: capture('qemu72-multifd-zstd-ch0.bin'), fields: [...words('init', 0, 64, 4), ...words('packet', 64, 128, 4)], tasks: parserTask(() => new MultifdParser()) }) },
  { name: 'XBZRLE stream', make: () => ({ bytes: capture('qemu72-xbzrle.mig').slice(0, 400_000), fields: streamFields(capture('qemu72-xbzrle.mig').slice(0, 400_000)), tasks: parserTask(() => new MigrationParser()) }) },
  { name: 'return path', make: () => ({ bytes: capture('qemu100-postcopy.dst2src.bin'), fields: words('start', 0, 64, 4), tasks: parserTask(() => new ReturnPathParser()) }) },
  { name: 'manifest', make: () => ({ bytes: Buffer.from(JSON.stringify(manifest)), fields: [], text: true, tasks: textTask(parseManifest) }) },
  { name: 'fault order', make: () => ({ bytes: Buffer.from('{"version":1,"clusterSize":65536,"blocks":["pc.ram"],"faults":[0,1,0,7]}'), fields: [], text: true, tasks: textTask(parseFaultOrder) }) },
  {
    name: 'NBD server’s replies',
    make: () => ({ bytes: conversation, fields: words('reply', 0, 256, 4), tasks: { async converse(_open, _signal, bytes) { const outcome = await converse(bytes); if (outcome !== 'right') throw outcome } } }),
  },
  { name: 'NBD client’s requests', make: () => ({ bytes: clientBytes, fields: words('request', 0, clientBytes.length, 4), tasks: { serve: (_open, _signal, bytes) => serve(bytes) } }) },
  { name: 'QMP', make: () => ({ bytes: Buffer.from(monitorAnswers), fields: [], text: true, tasks: { query: (_open, signal, bytes) => monitor(bytes, signal) } }) },
]
