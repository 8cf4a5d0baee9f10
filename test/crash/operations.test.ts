/**
 * A power cut at any moment of an operation on whole images: bitmaps, amend, commit, rebase, rename, compact, repair, and
 * writes over an external data file. The disk reads in every state as it did before, over several files too.
 */
import { mkdirSync, writeFileSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { MemoryDevice, record, Recording, type BlockDevice, type RecordedChange } from '../../src/block.ts'
import { amendImage, checkImage, commitImage, compactImage, Qcow2Image, rebaseImage, repairImage, type CreateOptions } from '../../src/index.ts'
import type { DirtyRange } from '../../src/qcow2/bitmaps-bits.ts'
import { emptyFile, keepOpen, powerCut, qemuConvert, seededBytes, type Survival } from '../../src/testing.ts'
import { expectBytes } from '../support/bytes.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { losses } from './crash.ts'

const KiB = 1024
const diskSize = 256 * KiB

/** Files by name; the image under test is `top.qcow2`. */
type Files = Readonly<Record<string, Uint8Array>>
type Open = (name: string) => BlockDevice

interface Operation {
  readonly name: string
  readonly make: () => Promise<Files>
  readonly run: (open: Open) => Promise<unknown>
  /** What else has to hold in every state. */
  readonly also?: (image: Qcow2Image, before: Files) => Promise<void>
  /** The disk changes too: `also` says what it may read. */
  readonly writes?: boolean
  /** Corruptions there may be, those the operation is to repair; default 0. */
  readonly corruptions?: number
}

/** Opens an image among `files`, read-only or on the device given, with what it names among them. */
async function openImage(files: Files, device?: BlockDevice, open?: Open): Promise<Qcow2Image> {
  const references = ({ name }: { name: string }): BlockDevice | Promise<BlockDevice> => {
    if (open !== undefined && name.endsWith('.data')) return open(name)
    const bytes = files[name]!
    return name.endsWith('.qcow2') ? openImage({ ...files, 'top.qcow2': bytes }) : new MemoryDevice(bytes, { readOnly: true })
  }
  return await Qcow2Image.open(device ?? new MemoryDevice(files['top.qcow2']!, { readOnly: true }), { readOnly: device === undefined, references })
}

/** Makes a file of the image that `fill` works on. */
async function made(options: Partial<CreateOptions>, fill: (image: Qcow2Image) => Promise<void>, files: Files = {}): Promise<Uint8Array> {
  const file = emptyFile()
  const references = ({ name }: { name: string }): BlockDevice => new MemoryDevice(files[name]!, { readOnly: true })
  const image = await Qcow2Image.create(keepOpen(file), { size: diskSize, clusterSize: 4 * KiB, references, ...options })
  await fill(image)
  await image.close()
  return file.bytes.slice()
}

/** Data, zeroes, something discarded, two snapshots with data of their own. */
async function fillUp(image: Qcow2Image): Promise<void> {
  await image.write(0, seededBytes(60_000, 1))
  await image.writeZeroes(100_000, 20_000)
  await image.snapshots.create({ name: 'first' })
  await image.write(4000, seededBytes(9000, 2))
  await image.writeZeroes(20_480, 8192)
  await image.snapshots.create({ name: 'second' })
  await image.write(200_000, seededBytes(5000, 3))
  await image.discard(40_960, 8192)
}

const raw = (size: number, seed: number): Uint8Array => seededBytes(size, seed)
const single = (options: Partial<CreateOptions> = {}, fill = fillUp) => async (): Promise<Files> => ({ 'top.qcow2': await made(options, fill) })
const overlay = (backing: Files, format: 'raw' | 'qcow2', fill: (image: Qcow2Image) => Promise<void>) => async (): Promise<Files> => {
  const [file] = Object.keys(backing)
  return { ...backing, 'top.qcow2': await made({ backing: { file: file!, format } }, fill, backing) }
}
const onImage = (work: (image: Qcow2Image) => Promise<void>, files: Files = {}) => async (open: Open): Promise<void> => {
  const image = await openImage(files, open('top.qcow2'), open)
  await work(image)
  await image.close()
}

async function readAll(ranges: AsyncIterable<DirtyRange>): Promise<string> {
  const found = []
  for await (const { offset, length } of ranges) found.push(`${offset}+${length}`)
  return found.join(' ')
}

async function* ranges(...list: (readonly [number, number])[]): AsyncGenerator<DirtyRange> {
  for (const [offset, length] of list) yield await Promise.resolve({ offset, length })
}

const withBitmaps = single({}, async (image) => {
  await fillUp(image)
  await image.bitmaps.add({ name: 'a', granularity: 4096 })
  await image.bitmaps.add({ name: 'b', granularity: 4096 })
  await image.bitmaps.merge('a', ranges([0, 8192], [65_536, 4096]))
  await image.bitmaps.merge('b', ranges([131_072, 65_536]))
})
const [a, b, both] = ['0+8192 65536+4096', '131072+65536', '0+8192 65536+4096 131072+65536']

/** Every bitmap named holds one of the contents allowed, and those that no operation removes are there. */
const bitmapsAre = (allowed: Readonly<Record<string, readonly string[]>>) => async (image: Qcow2Image): Promise<void> => {
  const names = (await image.bitmaps.list()).map(({ name }) => name)
  for (const [name, contents] of Object.entries(allowed)) {
    expect(contents, `bitmap ${name}`).toContain(names.includes(name) ? await readAll(image.bitmaps.read(name)) : 'absent')
  }
  expect(Object.keys(allowed)).toEqual(expect.arrayContaining(names))
}

const snapshotsAre = (...possible: readonly string[][]) => (image: Qcow2Image): Promise<void> => {
  expect(possible).toContainEqual(Array.from(image.snapshots, ({ name }) => name))
  return Promise.resolve()
}

const base = raw(diskSize, 10)
const other = raw(diskSize / 2, 11)
const upper = async (image: Qcow2Image): Promise<void> => {
  await image.write(3000, seededBytes(30_000, 12))
  await image.writeZeroes(100_000, 50_000, { unmap: true })
  await image.snapshots.create({ name: 'first' })
  await image.write(180_000, seededBytes(9000, 13))
}

/** Stored counters too low, and some too high. */
async function damaged(): Promise<Files> {
  const bytes = await made({}, fillUp)
  const view = new DataView(bytes.buffer, bytes.byteOffset)
  const block = Number(view.getBigUint64(Number(view.getBigUint64(48))))
  for (let cluster = 6; cluster < 12; cluster++) view.setUint16(block + cluster * 2, view.getUint16(block + cluster * 2) + (cluster % 2 === 0 ? 3 : -1))
  return { 'top.qcow2': bytes }
}

const leaky = single({}, async (image) => {
  await fillUp(image)
  for (const [cluster, count] of [[70, 1], [71, 1], [90, 2]] as const) await image.engine.refcounts.adjust(cluster, 1, count)
})

const dataFile = async (): Promise<Files> => {
  const data = emptyFile()
  const file = emptyFile()
  const image = await Qcow2Image.create(keepOpen(file), { size: diskSize, clusterSize: 4 * KiB, dataFile: 'disk.data', references: () => keepOpen(data) })
  await image.write(0, seededBytes(100_000, 1))
  await image.close()
  return { 'top.qcow2': file.bytes.slice(), 'disk.data': data.bytes.slice() }
}

const operations: readonly Operation[] = [
  { name: 'amend to version 2', make: single({}), run: (open) => amendImage(open('top.qcow2'), { version: 2 }) },
  { name: 'amend an overlay to version 2', make: overlay({ base }, 'raw', upper), run: (open) => amendImage(open('top.qcow2'), { version: 2 }) },
  { name: 'amend to version 3', make: single({ version: 2 }), run: (open) => amendImage(open('top.qcow2'), { version: 3, lazyRefcounts: true }) },
  { name: 'amend refcounts to 64 bits', make: single({}), run: (open) => amendImage(open('top.qcow2'), { refcountBits: 64 }) },
  { name: 'amend refcounts to 2 bits', make: single({}), run: (open) => amendImage(open('top.qcow2'), { refcountBits: 2 }) },
  { name: 'bitmap add', make: withBitmaps, run: onImage((image) => image.bitmaps.add({ name: 'c' })), also: bitmapsAre({ a: [a], b: [b], c: ['', 'absent'] }) },
  { name: 'bitmap merge', make: withBitmaps, run: onImage((image) => image.bitmaps.merge('a', 'b')), also: bitmapsAre({ a: [a, both], b: [b] }) },
  { name: 'bitmap clear', make: withBitmaps, run: onImage((image) => image.bitmaps.clear('a')), also: bitmapsAre({ a: [a, ''], b: [b] }) },
  { name: 'bitmap disable', make: withBitmaps, run: onImage((image) => image.bitmaps.disable('a')), also: bitmapsAre({ a: [a], b: [b] }) },
  {
    name: 'bitmap remove',
    make: withBitmaps,
    run: onImage(async (image) => {
      await image.bitmaps.remove('a')
      await image.bitmaps.remove('b')
    }),
    also: bitmapsAre({ a: [a, 'absent'], b: [b, 'absent'] }),
  },
  {
    name: 'first write with bitmaps',
    make: withBitmaps,
    writes: true,
    run: onImage(async (image) => {
      await image.write(10_000, seededBytes(500, 9))
      await image.flush()
    }),
    async also(image, before) {
      await using old = await openImage(before)
      const unchanged = Buffer.compare(await image.read(0, image.size), await old.read(0, old.size)) === 0
      // a bitmap that may be trusted stands for a disk that did not change
      for (const { name } of unchanged ? [] : await image.bitmaps.list()) {
        await expect(readAll(image.bitmaps.read(name)), `bitmap ${name}`).rejects.toMatchObject({ code: 'ERR_CORRUPT' })
      }
    },
  },
  {
    name: 'snapshot rename',
    make: single({}),
    run: onImage((image) => image.snapshots.rename('first', 'renamed, with a name that needs more room than before')),
    also: snapshotsAre(['first', 'second'], ['renamed, with a name that needs more room than before', 'second']),
  },
  {
    name: 'commit into a raw file',
    make: overlay({ 'base.raw': base }, 'raw', upper),
    async run(open) {
      await onImage((image) => commitImage(image, open('base.raw')), { 'base.raw': base })(open)
    },
    also: snapshotsAre(['first']),
  },
  {
    name: 'commit into a qcow2 image',
    make: async () => {
      const below = { 'base.qcow2': await made({}, fillUp) }
      const references = (): Promise<BlockDevice> => openImage({ 'top.qcow2': below['base.qcow2'] })
      return { ...below, 'top.qcow2': await made({ backing: { file: 'base.qcow2', format: 'qcow2' }, references }, upper) }
    },
    async run(open) {
      const target = await Qcow2Image.open(open('base.qcow2'))
      const bytes = await open('base.qcow2').read(0, open('base.qcow2').size)
      await onImage((image) => commitImage(image, target), { 'base.qcow2': bytes })(open)
      await target.close()
    },
  },
  {
    name: 'rebase to another file',
    make: async () => ({ ...(await overlay({ 'base.raw': base }, 'raw', upper)()), 'other.raw': other }),
    run: onImage((image) => rebaseImage(image, { file: 'other.raw', format: 'raw', device: new MemoryDevice(other, { readOnly: true }) }), { 'base.raw': base }),
  },
  {
    name: 'rebase to no file',
    make: overlay({ 'base.raw': base }, 'raw', upper),
    run: onImage((image) => rebaseImage(image, undefined), { 'base.raw': base }),
  },
  {
    name: 'compact',
    make: async () => ({ 'top.qcow2': Buffer.concat([await made({}, fillUp), new Uint8Array(100_000)]) }),
    run: async (open) => expect(await compactImage(open('top.qcow2'))).toBeGreaterThan(90_000),
    also: snapshotsAre(['first', 'second']),
  },
  { name: 'repair of leaks', make: leaky, run: (open) => repairImage(open('top.qcow2'), { repair: 'leaks' }), also: snapshotsAre(['first', 'second']) },
  { name: 'repair of counters', make: damaged, corruptions: 100, run: (open) => repairImage(open('top.qcow2'), { repair: 'all' }), also: snapshotsAre(['first', 'second']) },
  {
    name: 'repair that builds the refcounts anew',
    make: async () => {
      const bytes = await made({}, fillUp)
      bytes.fill(0, 4096, 8192)
      return { 'top.qcow2': bytes }
    },
    corruptions: 1000,
    run: (open) => repairImage(open('top.qcow2'), { repair: 'all' }),
    also: snapshotsAre(['first', 'second']),
  },
  {
    name: 'writes over an external data file',
    make: dataFile,
    writes: true,
    run: onImage(async (image) => {
      await image.write(120_000, seededBytes(50_000, 2))
      await image.flush()
      await image.writeZeroes(0, 30_000, { unmap: true })
      await image.write(40_960, seededBytes(4096, 3))
      await image.discard(60_000, 20_000)
      await image.flush()
    }),
    async also(image, before) {
      await using old = await openImage(before)
      const [disk, was] = [await image.read(0, image.size), await old.read(0, old.size)]
      const next = was.slice()
      next.set(seededBytes(50_000, 2), 120_000)
      const last = next.slice().fill(0, 0, 30_000).fill(0, 61_440, 77_824)
      last.set(seededBytes(4096, 3), 40_960)
      for (let at = 0; at < disk.length; at++) if (![was[at], next[at], last[at]].includes(disk[at])) expect.fail(`byte ${at} reads ${disk[at]}`)
    },
  },
]

/** A moment in all recordings: how many events of each had happened. */
type Moment = ReadonlyMap<string, number>

/** What was done to each file, and the moments at which the power can go. */
interface Run {
  readonly before: Files
  readonly recordings: ReadonlyMap<string, Recording>
  readonly moments: readonly Moment[]
}

/** Notes after each event what the other recordings were at. */
class NotingRecording extends Recording {
  readonly #note: () => void

  constructor(note: () => void) {
    super()
    this.#note = note
  }

  override async add(change: RecordedChange, perform: () => Promise<void>): Promise<void> {
    const done = super.add(change, perform)
    this.#note()
    await done
    this.#note()
  }
}

async function recordRun({ make, run }: Operation): Promise<Run> {
  const before = await make()
  const recordings = new Map<string, Recording>()
  const moments: Moment[] = []
  const note = (): void => void moments.push(new Map(Array.from(recordings, ([name, { events }]) => [name, events])))
  const devices = new Map<string, BlockDevice>()
  for (const [name, bytes] of Object.entries(before)) {
    const recording = new NotingRecording(note)
    recordings.set(name, recording)
    devices.set(name, record(new MemoryDevice(bytes.slice(), { growable: true }), recording))
  }
  note()
  await run((name) => keepOpen(devices.get(name)!))
  return { before, recordings, moments }
}

function stateAt({ before, recordings }: Run, moment: Moment, survives: Survival): Files {
  const cut = ([name, recording]: [string, Recording]): [string, Uint8Array] => [name, powerCut(before[name]!, recording, { at: moment.get(name)!, survives })]
  return Object.fromEntries(Array.from(recordings, cut))
}

const diskOf = async (files: Files): Promise<Uint8Array> => {
  await using image = await openImage(files)
  return await image.read(0, image.size)
}

describe('a power cut during', () => {
  test.each(operations)('$name', async (operation) => {
    const run = await recordRun(operation)
    expect(run.moments.length, 'events').toBeGreaterThan(2)
    const disk = await diskOf(run.before)
    for (const [at, moment] of run.moments.entries()) {
      for (const { name, survives } of losses) {
        const files = stateAt(run, moment, survives(at))
        await expectSound(operation, files, run.before, disk).catch((cause: unknown) => {
          throw new Error(`cut at moment ${at} of ${run.moments.length}, ${name}: ${(cause as Error).message}`, { cause })
        })
      }
    }
    const last = stateAt(run, run.moments.at(-1)!, () => true)
    expect(await checkImage(new MemoryDevice(last['top.qcow2']!))).toMatchObject({ corruptions: 0, leaks: 0 })
  })
})

async function expectSound({ also, writes, corruptions = 0 }: Operation, files: Files, before: Files, disk: Uint8Array): Promise<void> {
  for (const [name, bytes] of Object.entries(files)) {
    if (!name.endsWith('.qcow2')) continue
    const report = await checkImage(new MemoryDevice(bytes))
    expect(report.corruptions, report.findings.map(({ message }) => message).join('; ')).toBeLessThanOrEqual(corruptions)
    expect(report).toMatchObject({ checkErrors: 0, overlaps: 0 })
  }
  await using image = await openImage(files)
  if (writes !== true) expectBytes(await image.read(0, image.size), disk)
  await also?.(image, before)
}

describeWithQemu('as QEMU sees it, a power cut during', (qemu) => {
  test.each(operations.filter(({ corruptions }) => corruptions === undefined))('$name', async (operation) => {
    const run = await recordRun(operation)
    const disk = await diskOf(run.before)
    const count = 4
    for (let state = 0; state <= count; state++) {
      const at = Math.round((state / count) * (run.moments.length - 1))
      const { name, survives } = losses[state % losses.length]!
      const files = stateAt(run, run.moments[at]!, survives(at))
      const folder = join(tempFolder(), String(state))
      mkdirSync(folder)
      for (const [file, bytes] of Object.entries(files)) writeFileSync(join(folder, file), bytes)
      // QEMU looks for a data file in the directory it runs in
      const data = 'disk.data' in files ? `,data-file.driver=file,data-file.filename=${folder}/disk.data` : ''
      const check = await qemu.img('check', '--image-opts', `driver=qcow2,file.driver=file,file.filename=${folder}/top.qcow2${data}`)
      expect([0, 3], `cut at moment ${at} of ${run.moments.length}, ${name}: ${check.stdout}${check.stderr}`).toContain(check.code)
      if (operation.writes === true) continue
      await qemuConvert(join(folder, 'top.qcow2'), join(folder, 'raw'), { qemuImg: qemu.path('qemu-img') })
      expectBytes(await readFile(join(folder, 'raw')), disk)
    }
  })
})
