/**
 * Bytes belong to who gets them: every public async iterable of bytes is given to the consumers that Node's users give
 * such things to, all of which ask for more before they are done with what they have. The type checker finds the
 * iterables, so that a new one needs a case here.
 */
import { createReadStream, createWriteStream, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { Readable, Writable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { randomFillSync } from 'node:crypto'
import ts from 'typescript'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { capturedVmState, enlargedVmState } from '../bench/vm-state.ts'
import { MemoryDevice, ReadAheadPrefetcher } from '../src/block.ts'
import { convertToQcow2Stream, Qcow2Image } from '../src/index.ts'
import { encodeRecord, plainStream, readMigration, strippedStream, VmState, type MigrationRecord } from '../src/migration.ts'
import { loadVmState, migrationStream, openSaved, RamImage, RamImageWriter, capture, saveVmState } from '../src/snapshot.ts'
import { expectBytes } from './support/bytes.ts'

/** More than 16 chunks of 1 MiB: what Node's streams hold at most. */
const extra = 24 << 20
const stream = Uint8Array.from(enlargedVmState(capturedVmState(), extra))
const folder = mkdtempSync(join(tmpdir(), 'qcow2-owned-'))
afterAll(() => rmSync(folder, { recursive: true }))

type Chunks = AsyncIterable<Uint8Array>

/** The records as bytes, made of them only when all were taken. */
async function* encodedLater(records: AsyncIterable<MigrationRecord>): AsyncGenerator<Uint8Array, void, undefined> {
  const kept: MigrationRecord[] = []
  for await (const record of Readable.from(records)) kept.push(record as MigrationRecord)
  for (const record of kept) yield encodeRecord(record)
}

/** What a callback is given, as an iterable that takes everything at once. */
function sentBy(send: (take: (bytes: Uint8Array) => Promise<void>) => Promise<void>): Chunks {
  const chunks: Uint8Array[] = []
  return (async function* () {
    await send((bytes) => Promise.resolve(void chunks.push(bytes)))
    yield* chunks
  })()
}

let image: Qcow2Image
let vm: VmState
let ram: RamImage
let vmOfRamImage: VmState

beforeAll(async () => {
  writeFileSync(join(folder, 'vm.mig'), stream)
  image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: extra })
  await image.write(0, randomFillSync(new Uint8Array(extra)))
  await saveVmState(image, stream, { name: 'vm' })
  vm = await VmState.index(new MemoryDevice(stream))
  await capture(createReadStream(join(folder, 'vm.mig')), RamImageWriter.to(join(folder, 'ram.qcow2')))
  ram = await RamImage.open(join(folder, 'ram.qcow2'))
  vmOfRamImage = await ram.vmState()
})

/** By the name the search below gives an iterable: what gives its bytes. */
const cases: Record<string, Record<string, () => Promise<Chunks> | Chunks>> = {
  'ReadAheadPrefetcher[asyncIterator]': { device: () => new ReadAheadPrefetcher(new MemoryDevice(stream)) },
  loadVmState: { snapshot: async () => loadVmState(await image.snapshots.open('vm')) },
  plainStream: { 'stream file': () => plainStream(vm), 'RAM image': () => plainStream(vmOfRamImage) },
  strippedStream: { 'stream file': () => strippedStream(vm), 'RAM image': () => strippedStream(vmOfRamImage) },
  'VmState.rest': { before: () => vm.rest('before'), after: () => vm.rest('after'), 'of a RAM image': () => vmOfRamImage.rest('before') },
  'RamImage.stream': { 'RAM image': () => ram.stream() },
  migrationStream: {
    'RAM image': () => migrationStream(ram),
    'stream file': async () => migrationStream(await openSaved(join(folder, 'vm.mig')), { zeroPages: 'keep' }),
  },
  readMigration: {
    device: () => encodedLater(readMigration(new MemoryDevice(stream))),
    file: () => encodedLater(readMigration(createReadStream(join(folder, 'vm.mig')))),
    'odd chunks': () => encodedLater(readMigration(Readable.from(pieces(stream, 700_001)))),
  },
  'convertToQcow2Stream(send)': { image: () => sentBy((send) => convertToQcow2Stream(image, send)) },
}

function* pieces(bytes: Uint8Array, length: number): Generator<Uint8Array, void, undefined> {
  for (let at = 0; at < bytes.length; at += length) yield bytes.slice(at, at + length)
}

async function copyAtOnce(chunks: Chunks): Promise<Uint8Array> {
  const copies: Uint8Array[] = []
  for await (const chunk of chunks) copies.push(Uint8Array.from(chunk))
  return Buffer.concat(copies)
}

async function collect(chunks: Chunks): Promise<Uint8Array[]> {
  const all: Uint8Array[] = []
  for await (const chunk of chunks) all.push(chunk)
  return all
}

/** What users do with an iterable; each gives the bytes as it has them in the end. */
const consumers: Record<string, (chunks: Chunks) => Promise<Uint8Array>> = {
  'Array.fromAsync': async (chunks) => Buffer.concat(await collect(chunks)),
  'pipeline(Readable.from(…), slow sink)': async (chunks) => {
    const all: Uint8Array[] = []
    const write = (chunk: Uint8Array, _: string, done: () => void): void => {
      void sleep(1).then(() => {
        all.push(Uint8Array.from(chunk))
        done()
      })
    }
    await pipeline(Readable.from(chunks), new Writable({ objectMode: true, highWaterMark: 4, write }))
    return Buffer.concat(all)
  },
  'pipeline(…, createWriteStream), 8 MiB held': async (chunks) => {
    const path = join(folder, 'written')
    await pipeline(chunks, createWriteStream(path, { highWaterMark: 8 << 20 }))
    return readFileSync(path)
  },
  'new Response(ReadableStream.from(…))': async (chunks) => {
    const body = (ReadableStream as unknown as { from(chunks: Chunks): ReadableStream<Uint8Array> }).from(chunks)
    return new Uint8Array(await new Response(body).arrayBuffer())
  },
  'a stream of bytes, which takes the memory away': async (chunks) => {
    const iterator = chunks[Symbol.asyncIterator]()
    const body = new ReadableStream({
      type: 'bytes',
      async pull(controller) {
        const next = await iterator.next()
        if (next.done === true) controller.close()
        else if (next.value.length > 0) controller.enqueue(next.value)
      },
    })
    return new Uint8Array(await new Response(body).arrayBuffer())
  },
  'each chunk filled with something else': async (chunks) => {
    const all: Uint8Array[] = []
    for await (const chunk of chunks) {
      all.push(Uint8Array.from(chunk))
      chunk.fill(0xee)
    }
    return Buffer.concat(all)
  },
}

for (const [name, sources] of Object.entries(cases)) {
  describe(name, () => {
    test.each(Object.keys(sources))('%s', async (source) => {
      const open = sources[source]!
      const expected = await copyAtOnce(await open())
      expect(expected.length).toBeGreaterThan(0)
      for (const consume of Object.values(consumers)) expectBytes(await consume(await open()), expected)
      expectBytes(await copyAtOnce(await open()), expected)
    })
  })
}

test('every public async iterable of bytes has a case, but those called borrowed', () => {
  const found = publicIterables().filter((name) => !/borrowed/i.test(name))
  expect(found).toEqual(Object.keys(cases).sort())
})

/** Given by the caller, or the socket of the caller. */
const inputs = new Set(['NbdTransport.incoming', 'CreateSnapshotOptions.vmState'])

/** Functions and members of the package's doors that give bytes piece by piece, and callbacks that take them. */
function publicIterables(): string[] {
  const source = resolve(import.meta.dirname, '../src')
  const doors = ['index', 'block', 'migration', 'nbd', 'snapshot', 'testing', 'browser'].map((door) => join(source, `${door}.ts`))
  const config = ts.readConfigFile(resolve(source, '../tsconfig.json'), (path) => readFileSync(path, 'utf8'))
  const { options } = ts.parseJsonConfigFileContent({ ...config.config, include: doors }, ts.sys, resolve(source, '..'))
  const program = ts.createProgram(doors, options)
  const checker = program.getTypeChecker()
  const found = new Set<string>()

  const isBytes = (type: ts.Type): boolean => /^(Uint8Array|Buffer)(<|$)/.test(checker.typeToString(type))
  const carriesBytes = (type: ts.Type): boolean =>
    isBytes(type) || (type.isUnion() ? type.types : [type]).some((part) => part.isClassOrInterface() && part.getProperties().some((property) => isBytes(checker.getTypeOfSymbol(property))))
  const givesBytes = (type: ts.Type): boolean => {
    if (type.isUnion()) return type.types.some(givesBytes)
    const text = checker.typeToString(type)
    if (!/^(Promise|AsyncGenerator|AsyncIterable|AsyncIterableIterator|AsyncIterator|ReadableStream|Readable)\b/.test(text)) return false
    const [element] = checker.getTypeArguments(type as ts.TypeReference)
    if (text.startsWith('Promise')) return element !== undefined && givesBytes(element)
    return element === undefined || carriesBytes(element)
  }
  const lookAtCalls = (name: string, type: ts.Type, at: ts.Node): void => {
    for (const signature of type.getCallSignatures()) {
      if (givesBytes(signature.getReturnType())) found.add(name)
      for (const parameter of signature.getParameters()) {
        const takes = checker.getTypeOfSymbolAtLocation(parameter, at).getCallSignatures()
        if (takes.some((call) => call.getParameters().some((each) => isBytes(checker.getTypeOfSymbolAtLocation(each, at))))) found.add(`${name}(${parameter.name})`)
      }
    }
  }
  const lookAtMembers = (name: string, type: ts.Type, at: ts.Node): void => {
    for (const member of type.getProperties()) {
      const wellKnown = /^__@(\w+)@\d+$/.exec(member.name)
      const full = wellKnown === null ? `${name}.${member.name}` : `${name}[${wellKnown[1]!}]`
      if (member.name.includes('#') || inputs.has(full)) continue
      const memberType = checker.getTypeOfSymbolAtLocation(member, at)
      if (givesBytes(memberType)) found.add(full)
      lookAtCalls(full, memberType, at)
    }
  }
  for (const door of doors) {
    const file = program.getSourceFile(door)!
    for (const exported of checker.getExportsOfModule(checker.getSymbolAtLocation(file)!)) {
      const symbol = (exported.flags & ts.SymbolFlags.Alias) === 0 ? exported : checker.getAliasedSymbol(exported)
      const at = symbol.declarations![0]!
      lookAtCalls(symbol.name, checker.getTypeOfSymbolAtLocation(symbol, at), at)
      if ((symbol.flags & ts.SymbolFlags.Class) !== 0) lookAtMembers(symbol.name, checker.getTypeOfSymbolAtLocation(symbol, at), at)
      if ((symbol.flags & (ts.SymbolFlags.Class | ts.SymbolFlags.Interface)) !== 0) lookAtMembers(symbol.name, checker.getDeclaredTypeOfSymbol(symbol), at)
    }
  }
  return [...found].sort()
}
