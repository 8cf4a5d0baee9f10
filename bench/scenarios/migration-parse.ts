/** The parser beside memcpy, the index of a stored stream beside reading the file, a RAM image beside the plain file. */
import { closeSync, fsyncSync, openSync, readSync, rmSync, statSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { openFile, ReadAheadPrefetcher } from '../../src/block.ts'
import { MigrationParser, VmState } from '../../src/migration.ts'
import { RamImageWriter } from '../../src/snapshot.ts'
import { groupFigure } from '../figures.ts'
import { fio, hasFio } from '../fio.ts'
import { measure, type GroupResult, type Measured, type Variant } from '../harness.ts'
import { GuestMemory } from '../load.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'
import { capturedVmState, enlargedVmState } from '../vm-state.ts'

const pageSize = 4096
const chunkSize = 1 << 20

function* chunksOf(stream: Uint8Array): Generator<Uint8Array> {
  for (let at = 0; at < stream.length; at += chunkSize) yield stream.subarray(at, at + chunkSize)
}

function variant(id: string, title: string, run: () => Promise<Measured | undefined> | undefined): Variant {
  return { id, title, run }
}

function parseAndScatter(stream: Uint8Array, memory: GuestMemory): undefined {
  const parser = new MigrationParser()
  for (const chunk of chunksOf(stream)) for (const record of parser.push(chunk)) if (record.kind === 'ram-pages') memory.store(record)
  return undefined
}

interface Places {
  readonly from: Float64Array
  readonly to: Float64Array
}

/** Where each page of main memory is in the stream and where it goes: known beforehand, so that only copying is left. */
function placesOf(stream: Uint8Array, pages: number): Places {
  const places = { from: new Float64Array(pages), to: new Float64Array(pages) }
  let next = 0
  for (const record of new MigrationParser().push(stream)) {
    if (record.kind !== 'ram-pages' || record.block.name !== 'pc.ram') continue
    for (let i = 0; i < record.count; i++) {
      if (record.lengths[i] !== pageSize) continue
      places.from[next] = record.bytesOffset + record.positions[i]!
      places.to[next++] = record.pageOffsets[i]!
    }
  }
  return { from: places.from.subarray(0, next), to: places.to.subarray(0, next) }
}

/** The same pages from the same places to the same places: what any receiver has to do at least. */
function copyPages(stream: Uint8Array, target: Uint8Array, { from, to }: Places): undefined {
  for (let i = 0; i < from.length; i++) target.set(stream.subarray(from[i], from[i]! + pageSize), to[i])
  return undefined
}

function copyOnce(source: Uint8Array, target: Uint8Array): undefined {
  target.set(source)
  return undefined
}

async function memoryGroup(context: ScenarioContext, stream: Uint8Array): Promise<GroupResult> {
  const memory = new GuestMemory(stream)
  const target = memory.block('pc.ram')
  const places = placesOf(stream, target.length / pageSize)
  const bytes = places.from.length * pageSize
  return measure(
    {
      id: 'migration-scatter',
      title: 'A stream in memory to guest memory',
      note: 'memcpy moves the same pages between the same places; one memcpy moves as many bytes in one call, which no stream allows',
      bytes,
      variants: [
        variant('ours', 'parse and scatter', () => parseAndScatter(stream, memory)),
        variant('memcpy', 'memcpy page by page', () => copyPages(stream, target, places)),
        variant('memcpy-once', 'one memcpy', () => copyOnce(stream.subarray(0, bytes), target)),
      ],
      ratios: [{ fast: 'ours', slow: 'memcpy', goal: 0.95 }, { fast: 'ours', slow: 'memcpy-once' }],
    },
    context,
  )
}

/** About 1 MiB of raw pages again and again, as from a socket into the processor's cache: the cost of the parser alone. */
async function walkGroup(context: ScenarioContext, stream: Uint8Array): Promise<{ group: GroupResult; pages: number }> {
  const { from } = placesOf(stream, stream.length / pageSize)
  const count = 255
  const step = pageSize + 8
  const first = from.findIndex((position, i) => from[i + count]! - position === count * step)
  if (first === -1) throw new Error('no run of raw pages in the stream')
  const last = first + count
  const head = stream.subarray(0, from[first]! - 8)
  const chunk = stream.subarray(from[first]! - 8, from[last]! - 8)
  const turns = context.quick ? 2 : 1000
  const group = await measure(
    {
      id: 'migration-walk',
      title: 'Walking over page headers',
      note: `a piece of ${count} pages again and again`,
      bytes: chunk.length * turns,
      variants: [
        variant('ours', 'parser, nothing done with the pages', () => {
          const parser = new MigrationParser()
          for (const _ of parser.push(head)) continue
          for (let turn = 0; turn < turns; turn++) for (const _ of parser.push(chunk)) continue
          return undefined
        }),
      ],
    },
    context,
  )
  return { group, pages: count * turns }
}

function readWhole(path: string): undefined {
  const file = openSync(path, 'r')
  const buffer = Buffer.allocUnsafe(chunkSize)
  while (readSync(file, buffer) > 0) continue
  closeSync(file)
  return undefined
}

async function indexFile(path: string, direct: boolean): Promise<undefined> {
  await using vm = await VmState.index(await openFile(path, { readOnly: true, direct }))
  if (vm.devices.length === 0) throw new Error('no devices found')
  return undefined
}

async function fileGroup(context: ScenarioContext, path: string): Promise<GroupResult> {
  const { size } = statSync(path)
  return measure(
    {
      id: 'migration-index',
      title: 'Indexing a stored stream',
      note: 'the file is in the page cache: the storage is as fast as it can be',
      bytes: size,
      variants: [variant('ours', 'VmState.index', () => indexFile(path, false)), variant('read', 'read(2), 1 MiB at a time', () => readWhole(path))],
      ratios: [{ fast: 'ours', slow: 'read' }],
    },
    context,
  )
}

async function readAheadWhole(path: string): Promise<undefined> {
  await using device = await openFile(path, { readOnly: true, direct: true })
  await using prefetcher = new ReadAheadPrefetcher(device)
  while ((await prefetcher.next()) !== undefined) continue
  return undefined
}

async function storageGroup(context: ScenarioContext, path: string): Promise<GroupResult> {
  const { size } = statSync(path)
  const whole = size - (size % chunkSize)
  const variants = [
    variant('ours', 'VmState.index, O_DIRECT', () => indexFile(path, true)),
    variant('read', 'read ahead, nothing done with the bytes, O_DIRECT', () => readAheadWhole(path)),
  ]
  if (hasFio) variants.push(variant('fio', 'fio libaio 1 MiB x 8: read only', () => fio({ file: path, bytes: whole, operation: 'read', direct: true })))
  return measure(
    {
      id: 'migration-index-direct',
      title: 'Indexing a stored stream past the page cache',
      bytes: size,
      variants,
      ratios: [{ fast: 'ours', slow: 'read', goal: 0.95 }, ...(hasFio ? [{ fast: 'ours', slow: 'fio' }] : [])],
    },
    context,
  )
}

function writeWhole(path: string, bytes: Uint8Array): undefined {
  const file = openSync(path, 'w')
  for (const chunk of chunksOf(bytes)) writeSync(file, chunk)
  fsyncSync(file)
  closeSync(file)
  return undefined
}

async function storeImage(stream: Uint8Array, path: string): Promise<undefined> {
  const writer = RamImageWriter.to(path)
  const parser = new MigrationParser()
  for (const chunk of chunksOf(stream)) {
    for (const record of parser.push(chunk)) writer.record(record)
    await writer.settle()
  }
  await writer.finish()
  return undefined
}

async function imageGroup(context: ScenarioContext, stream: Uint8Array): Promise<GroupResult> {
  const image = join(context.folder, 'ram.qcow2')
  const plain = join(context.folder, 'plain')
  const remove = (): void => {
    rmSync(image, { force: true })
    rmSync(plain, { force: true })
  }
  return measure(
    {
      id: 'ram-image',
      title: 'A stream stored',
      note: 'half of the guest memory is zeroes, which the RAM image does not store; both are flushed',
      bytes: stream.length,
      variants: [
        { id: 'ours', title: 'as RAM image', prepare: remove, run: () => storeImage(stream, image) },
        { id: 'plain', title: 'as a file', prepare: remove, run: () => writeWhole(plain, stream), finish: remove },
      ],
      ratios: [{ fast: 'ours', slow: 'plain' }],
    },
    context,
  ).finally(remove)
}

/** Every other 2 MiB of the random pages made zero, still sent as whole pages. */
function halfZero(stream: Uint8Array): Uint8Array {
  const half = Uint8Array.from(stream)
  const parser = new MigrationParser()
  for (const record of parser.push(stream)) {
    if (record.kind !== 'ram-pages' || record.block.name !== 'pc.ram') continue
    for (let i = 0; i < record.count; i++) {
      const at = record.bytesOffset + record.positions[i]!
      if (record.pageOffsets[i]! >= 4 << 20 && (record.pageOffsets[i]! / (2 << 20)) % 2 < 1) half.fill(0, at, at + record.lengths[i]!)
    }
  }
  return half
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const size = (context.quick ? 4 : (context.size ?? 256)) << 20
  const stream = new Uint8Array(enlargedVmState(capturedVmState(), size))
  const memory = await memoryGroup(context, stream)
  const { group: header, pages } = await walkGroup(context, stream)
  const path = join(context.folder, 'stream')
  writeFileSync(path, stream)
  const index = await fileGroup(context, path)
  const storage = await storageGroup(context, path)
  rmSync(path)
  const image = await imageGroup(context, halfZero(stream))
  const walked = header.variants[0]!
  const nanoseconds = ((walked.cpuSeconds ?? walked.seconds).median * 1e9) / pages
  const groups = [memory, header, index, storage, image]
  return {
    groups,
    figures: [groupFigure(memory), groupFigure(index), groupFigure(storage), groupFigure(image)],
    notes: [`Header walk: ${nanoseconds.toFixed(1)} ns of processor time a page (goal: at most 40).`],
  }
}

export const scenario: Scenario = {
  name: 'migration-parse',
  title: 'The migration stream at memory speed',
  about:
    "A real VM state, made longer with random pages. In memory, the parser with every page put in its place stands beside memcpy of the same bytes. Stored, building the index of all pages stands beside reading the file, " +
    'and a RAM image (guest memory as data of a qcow2 image) beside writing the stream to a file.',
  run,
}
