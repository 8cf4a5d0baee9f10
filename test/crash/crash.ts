/**
 * Performs operations on a recorded image, then looks at every state a power cut could have left. Owns what
 * must hold in each: the image opens, nothing worse than leaks, what was flushed is there, snapshots are whole.
 */
import { expect } from 'vitest'
import { fault, MemoryDevice, type BlockDevice, type FaultPlan } from '../../src/block.ts'
import { checkImage, Qcow2Image, repairImage } from '../../src/index.ts'
import {
  buildImage,
  emptyFile,
  keepOpen,
  touchedRanges,
  performOperations,
  powerCut,
  record,
  Recording,
  seededBytes,
  type ImageOperation,
  type ImageParameters,
  type ModelDisk,
  type ModelSnapshot,
  type Survival,
} from '../../src/testing.ts'

/** What the disk and its snapshots are between two operations. */
interface Stage {
  /** Event at which the operation that leads to it began and ended. */
  readonly began: number
  readonly ended: number
  readonly operation: ImageOperation | undefined
  readonly disk: Uint8Array
  readonly snapshots: ReadonlyMap<string, ModelSnapshot>
}

/** An image with all that happened to it. */
export interface CrashRun {
  readonly parameters: ImageParameters
  readonly before: Uint8Array
  readonly recording: Recording
  readonly stages: readonly Stage[]
}

/** Makes an image, unrecorded, with `setup`; then performs `operations` under the recorder. */
export async function recordOperations(
  parameters: ImageParameters,
  setup: readonly ImageOperation[],
  operations: readonly ImageOperation[],
): Promise<CrashRun> {
  return (await recordWithFaults(parameters, setup, operations, () => undefined)).run
}

/** As `recordOperations`, on a device that goes wrong by `plan`: ends at the first operation that fails by it. */
export async function recordWithFaults(
  parameters: ImageParameters,
  setup: readonly ImageOperation[],
  operations: readonly ImageOperation[],
  plan: FaultPlan,
): Promise<{ run: CrashRun; file: Uint8Array; failure: unknown }> {
  const file = emptyFile()
  const model = await buildImage(file, parameters, setup)
  const before = file.bytes.slice()
  const recording = new Recording()
  const device = (): BlockDevice => keepOpen(recorded)
  const recorded = fault(record(file, recording), plan)
  const stages: Stage[] = [stageOf(model, 0, 0, undefined)]
  let began = 0
  let current: ImageOperation | undefined
  let failure: unknown
  const observe = (moment: 'before' | 'after', operation: ImageOperation): void => {
    current = operation
    if (moment === 'before') began = recording.events
    else stages.push(stageOf(model, began, recording.events, operation))
  }
  try {
    const image = await Qcow2Image.open(device())
    await performOperations({ image, model, parameters, reopen: () => Qcow2Image.open(device()), observe }, operations)
  } catch (error) {
    if (!isInjected(error)) throw error
    failure = error
    if (current !== undefined) completeModel(model, current)
    stages.push(stageOf(model, began, recording.events + 1, current?.kind === 'flush' || current?.kind === 'reopen' ? undefined : current))
  }
  return { run: { parameters, before, recording, stages }, file: file.bytes, failure }
}

/** The error of a fault, or one that it caused. */
function isInjected(error: unknown): boolean {
  for (let each = error; each instanceof Error; each = each.cause) if (each.message.includes('injected fault')) return true
  return false
}

/** Makes the model what it were if the operation that failed half-way had been completed. */
function completeModel(model: ModelDisk, operation: ImageOperation): void {
  const names = model.snapshots
  switch (operation.kind) {
    case 'snapshot create': {
      const { length, seed } = operation.vmState ?? { length: 0, seed: 0 }
      model.createSnapshot(model.newName, seededBytes(length, seed))
      return
    }
    case 'snapshot apply':
    case 'snapshot delete': {
      const name = names[operation.index % Math.max(1, names.length)]
      if (name === undefined) return
      if (operation.kind === 'snapshot apply') model.applySnapshot(name)
      else model.deleteSnapshot(name)
      return
    }
    case 'resize':
      model.resize(operation.size)
      return
    default:
  }
}

function stageOf(model: ModelDisk, began: number, ended: number, operation: ImageOperation | undefined): Stage {
  const snapshots = new Map(model.snapshots.map((name) => [name, model.snapshot(name)]))
  return { began, ended, operation, disk: model.bytes.slice(), snapshots }
}

/** The file after a power cut before event `at`. */
export function stateAt(run: CrashRun, at: number, survives?: Survival): Uint8Array {
  return powerCut(run.before, run.recording, survives === undefined ? { at } : { at, survives })
}

/** Checks one state; `file` is what `stateAt` gave for `at`. */
export async function expectSound(run: CrashRun, at: number, file: Uint8Array): Promise<void> {
  await expectOnlyLeaks(file, mayCopiedDiffer(run, at))
  await using image = await Qcow2Image.open(new MemoryDevice(file, { readOnly: true }), { readOnly: true })
  const possible = possibleStages(run.stages, at)
  expect(possible.map(({ disk }) => disk.length), 'size of the disk').toContain(image.size)
  expectFlushed(await image.read(0, image.size), possible, run.parameters.clusterSize)
  await expectSnapshots(image, possible)
}

/**
 * Nothing worse than leaks. A snapshot operation changes counters and COPIED flags, which lie in different
 * places, so while one is under way they may disagree, in QEMU as here: freeing the leaks must then set it right.
 */
export async function expectOnlyLeaks(file: Uint8Array, mayDiffer: boolean): Promise<void> {
  const report = await checkImage(new MemoryDevice(file))
  const corruptions = report.findings.filter(({ kind }) => kind === 'corruption').map(({ message }) => message)
  expect(mayDiffer ? corruptions.filter((message) => !message.includes('COPIED')) : corruptions, 'corruptions').toEqual([])
  expect(report.checkErrors).toBe(0)
  if (corruptions.length === 0) return
  const repaired = await repairImage(new MemoryDevice(file.slice(), { growable: true }), { repair: 'leaks' })
  expect(repaired).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 })
}

/** True while a snapshot operation is under way. */
export function mayCopiedDiffer(run: CrashRun, at: number): boolean {
  return run.stages.some(({ began, ended, operation }) => began < at && at <= ended && operation?.kind.startsWith('snapshot'))
}

/** The last stage that was flushed before `at`, and all that followed up to the operation under way. */
function possibleStages(stages: readonly Stage[], at: number): Stage[] {
  let flushed = 0
  let last = 0
  for (const [index, { began, ended, operation }] of stages.entries()) {
    if (began < at) last = index
    if (ended <= at && (operation?.kind === 'flush' || operation?.kind === 'reopen')) flushed = index
  }
  return stages.slice(flushed, Math.max(flushed, last) + 1)
}

/** A byte that no request has touched since the flush is one that the disk had at some stage since. */
function expectFlushed(disk: Uint8Array, possible: readonly Stage[], clusterSize: number): void {
  if (possible.some((stage) => Buffer.compare(stage.disk, disk) === 0)) return
  const touched = touchedSince(possible, disk.length, clusterSize)
  for (let at = 0; at < disk.length; at++) {
    if (touched[at] === 1 || possible.some((stage) => at >= stage.disk.length || stage.disk[at] === disk[at])) continue
    expect.fail(`flushed byte ${at} reads ${disk[at]}, not ${possible[0]!.disk[at]}`)
  }
}

function touchedSince(possible: readonly Stage[], length: number, clusterSize: number): Uint8Array {
  const touched = new Uint8Array(length)
  for (const [index, { operation }] of possible.entries()) {
    if (index === 0 || operation === undefined || operation.kind === 'read') continue
    for (const range of touchedRanges(operation, possible[index - 1]!.disk.length, clusterSize)) {
      touched.fill(1, range.offset, Math.min(length, range.offset + range.length))
    }
  }
  return touched
}

/** Snapshots of every stage are there; others may be; all are whole. */
async function expectSnapshots(image: Qcow2Image, possible: readonly Stage[]): Promise<void> {
  const names = Array.from(image.snapshots, ({ name }) => name)
  for (const name of possible[0]!.snapshots.keys()) {
    if (possible.every(({ snapshots }) => snapshots.has(name))) expect(names).toContain(name)
  }
  for (const name of names) {
    const expected = possible.find(({ snapshots }) => snapshots.has(name))?.snapshots.get(name)
    if (expected === undefined) expect.fail(`there is a snapshot ${name} that nobody made`)
    await using disk = await image.snapshots.open(name)
    expect(Buffer.compare(await disk.read(0, disk.size), expected.disk), `disk of ${name}`).toBe(0)
    expect(Buffer.compare(await disk.vmState.read(0, disk.vmState.size), expected.vmState), `VM state of ${name}`).toBe(0)
  }
}

/** Ways for a write cache to lose its content; the seed chooses within the last two. */
export const losses: readonly { readonly name: string; readonly survives: (seed: number) => Survival }[] = [
  { name: 'all arrived', survives: () => () => true },
  { name: 'nothing arrived', survives: () => () => false },
  { name: 'some requests arrived', survives: (seed) => (request) => hash(seed, request.submitted, 0) % 2 === 0 },
  { name: 'some sectors arrived', survives: (seed) => (request, sector) => hash(seed, request.submitted, sector) % 2 === 0 },
]

function hash(...values: number[]): number {
  let state = 0x811c_9dc5
  for (const value of values) {
    state = Math.imul(state ^ value, 0x0100_0193) >>> 0
    state = Math.imul(state ^ (state >>> 15), 0x85eb_ca6b) >>> 0
  }
  return (state ^ (state >>> 13)) >>> 0
}
