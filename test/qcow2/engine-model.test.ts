/**
 * Arbitrary operation sequences over arbitrary image parameters, against plain bytes in memory. After
 * each sequence the image is read back, and real QEMU judges it: `check` clean, content equal.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import type { CreateOptions } from '../../src/qcow2/new-image.ts'
import { qemus } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const long = process.env['QCOW2_LONG'] === '1'
const maxSize = 3 << 20

interface Parameters {
  clusterSize: number
  version: 2 | 3
  refcountBits: number
  extendedL2: boolean
  lazyRefcounts: boolean
  preallocation: 'off' | 'metadata'
  sectors: number
  backingSize: number | undefined
  cacheSize: number
}

type Operation =
  | { op: 'write' | 'zero' | 'unmap' | 'discard' | 'compress' | 'read'; at: number; length: number; seed: number }
  | { op: 'many'; parts: { at: number; length: number; seed: number }[] }
  | { op: 'flush' | 'reopen' | 'create' }
  | { op: 'apply' | 'delete' | 'openSnapshot'; which: number }
  | { op: 'state'; length: number; seed: number; capture: boolean }
  | { op: 'resize'; sectors: number }

const parameters: fc.Arbitrary<Parameters> = fc
  .record({
    clusterBits: fc.constantFrom(9, 9, 10, 12, 14, 16, 16, 17, 21),
    version: fc.constantFrom(2 as const, 3 as const, 3 as const),
    refcountOrder: fc.nat({ max: 6 }),
    extendedL2: fc.boolean(),
    lazyRefcounts: fc.boolean(),
    preallocation: fc.constantFrom('off' as const, 'off' as const, 'off' as const, 'metadata' as const),
    sectors: fc.integer({ min: 0, max: maxSize / 512 }),
    backingSize: fc.option(fc.integer({ min: 1, max: maxSize + 1000 }), { freq: 2, nil: undefined }),
    cacheSize: fc.constantFrom(1, 1 << 20),
  })
  .map(({ clusterBits, refcountOrder, ...rest }) => {
    const v3 = rest.version === 3
    const extendedL2 = rest.extendedL2 && clusterBits >= 14 && v3
    return {
      ...rest,
      clusterSize: 2 ** clusterBits,
      refcountBits: v3 ? 2 ** refcountOrder : 16,
      extendedL2,
      lazyRefcounts: rest.lazyRefcounts && v3,
      preallocation: rest.backingSize !== undefined && !extendedL2 ? ('off' as const) : rest.preallocation,
    }
  })

const place = { at: fc.double({ min: 0, max: 1, noNaN: true }), seed: fc.nat(255) }
const length = fc.oneof(fc.integer({ min: 1, max: 600 }), fc.integer({ min: 1, max: 200_000 }), fc.constant(65536), fc.constant(4096))
const operation: fc.Arbitrary<Operation> = fc.oneof(
  { weight: 8, arbitrary: fc.record({ op: fc.constant('write' as const), ...place, length }) },
  { weight: 2, arbitrary: fc.record({ op: fc.constantFrom('zero' as const, 'unmap' as const), ...place, length }) },
  { weight: 2, arbitrary: fc.record({ op: fc.constant('discard' as const), ...place, length }) },
  { weight: 2, arbitrary: fc.record({ op: fc.constant('compress' as const), ...place, length }) },
  { weight: 2, arbitrary: fc.record({ op: fc.constant('read' as const), ...place, length }) },
  { weight: 2, arbitrary: fc.record({ op: fc.constant('many' as const), parts: fc.array(fc.record({ ...place, length }), { minLength: 2, maxLength: 12 }) }) },
  { weight: 2, arbitrary: fc.record({ op: fc.constantFrom('flush' as const, 'reopen' as const, 'create' as const) }) },
  { weight: 2, arbitrary: fc.record({ op: fc.constantFrom('apply' as const, 'delete' as const, 'openSnapshot' as const), which: fc.nat(5) }) },
  { weight: 1, arbitrary: fc.record({ op: fc.constant('state' as const), length: fc.nat(300_000), seed: fc.nat(255), capture: fc.boolean() }) },
  { weight: 1, arbitrary: fc.record({ op: fc.constant('resize' as const), sectors: fc.integer({ min: 0, max: maxSize / 512 }) }) },
)

const pattern = (length: number, seed: number): Uint8Array => {
  const bytes = new Uint8Array(length)
  for (let i = 0; i < length; i++) bytes[i] = (i * (seed | 1) + (i >> 8) + seed) & 0xff
  return seed % 3 === 0 ? bytes.fill(seed) : bytes
}

interface ModelSnapshot {
  name: string
  disk: Uint8Array
  state: Uint8Array
}

/** The plain model beside the image, and the rules they share. */
class Pair {
  image!: Qcow2Image
  disk: Uint8Array
  snapshots: ModelSnapshot[] = []
  #names = 0
  readonly file: string
  readonly p: Parameters
  readonly backing: Uint8Array | undefined

  constructor(file: string, p: Parameters, backing: Uint8Array | undefined) {
    this.file = file
    this.p = p
    this.backing = backing
    this.disk = new Uint8Array(p.sectors * 512)
    if (backing !== undefined) this.disk.set(backing.subarray(0, this.disk.length))
  }

  async run(step: Operation): Promise<void> {
    const { image } = this
    switch (step.op) {
      case 'write': case 'zero': case 'unmap': case 'discard': case 'compress': case 'read':
        return this.#ranged(step.op, step)
      case 'many': {
        const disjoint: { at: number; bytes: Uint8Array }[] = []
        let from = 0
        for (const part of [...step.parts].sort((a, b) => a.at - b.at)) {
          const at = Math.max(from, Math.floor(part.at * this.disk.length))
          const bytes = pattern(Math.min(part.length, this.disk.length - at), part.seed)
          if (bytes.length === 0) continue
          disjoint.push({ at, bytes })
          from = at + bytes.length
        }
        for (const { at, bytes } of disjoint) this.disk.set(bytes, at)
        await Promise.all(disjoint.map(({ at, bytes }) => image.write(at, bytes)))
        return
      }
      case 'flush':
        return image.flush()
      case 'reopen':
        await image.close()
        this.image = await Qcow2Image.open(this.file, { cacheSize: this.p.cacheSize })
        return
      case 'create':
        return this.#snapshot(async (name) => { await image.snapshots.create({ name }) }, new Uint8Array(0))
      case 'state': {
        const state = pattern(step.length, step.seed)
        let taken: Uint8Array | undefined
        return this.#snapshot(async (name) => {
          await using writer = await image.snapshots.begin({ name })
          await writer.write(state.subarray(0, state.length >> 1))
          if (step.capture) {
            await writer.captureDisk()
            taken = this.disk.slice()
          }
          const bytes = pattern(Math.min(700, this.disk.length), step.seed)
          await Promise.all([writer.write(state.subarray(state.length >> 1)), image.write(0, bytes)])
          this.disk.set(bytes)
          await writer.finish()
        }, state, () => taken)
      }
      case 'apply': case 'delete': case 'openSnapshot':
        return this.#withSnapshot(step.op, step.which)
      case 'resize':
        return this.#resize(step.sectors * 512)
    }
  }

  async #ranged(op: 'write' | 'zero' | 'unmap' | 'discard' | 'compress' | 'read', step: { at: number; length: number; seed: number }): Promise<void> {
    const { image, disk, p } = this
    let at = Math.floor(step.at * disk.length)
    let end = Math.min(disk.length, at + step.length)
    if (op === 'compress') {
      at = Math.floor(at / p.clusterSize) * p.clusterSize
      end = Math.min(disk.length, Math.ceil(end / p.clusterSize) * p.clusterSize)
    }
    if (op === 'write' || op === 'compress') {
      const bytes = pattern(end - at, step.seed)
      disk.set(bytes, at)
      await (op === 'write' ? image.write(at, bytes) : image.writeCompressed(at, bytes))
    } else if (op === 'zero' || op === 'unmap') {
      disk.fill(0, at, end)
      await image.writeZeroes(at, end - at, { unmap: op === 'unmap' })
    } else if (op === 'read') {
      expect(Buffer.compare(await image.read(at, end - at), disk.subarray(at, end))).toBe(0)
    } else {
      for (let c = Math.ceil(at / p.clusterSize) * p.clusterSize; c < end; c += p.clusterSize) {
        const whole = c + p.clusterSize <= end || end === disk.length
        const shows = p.version === 2 && this.backing !== undefined && c < this.backing.length
        if (whole && !shows) disk.fill(0, c, Math.min(c + p.clusterSize, end))
      }
      await image.discard(at, end - at)
    }
  }

  /** Narrow counters overflow: then the operation is refused and nothing has changed. */
  async #snapshot(task: (name: string) => Promise<void>, state: Uint8Array, disk: () => Uint8Array | undefined = () => undefined): Promise<void> {
    const name = `s${this.#names++}`
    try {
      await task(name)
    } catch (error) {
      if (this.p.refcountBits > 4 || (error as { code?: string }).code !== 'ERR_RANGE') throw error
      return
    }
    this.snapshots.push({ name, disk: disk() ?? this.disk.slice(), state })
  }

  async #withSnapshot(op: 'apply' | 'delete' | 'openSnapshot', which: number): Promise<void> {
    const snapshot = this.snapshots[which % Math.max(1, this.snapshots.length)]
    if (snapshot === undefined) return
    if (op === 'delete') {
      await this.image.snapshots.delete(snapshot.name)
      this.snapshots.splice(this.snapshots.indexOf(snapshot), 1)
    } else if (op === 'openSnapshot') {
      await this.compareSnapshot(snapshot)
    } else if (this.p.version === 3 || snapshot.disk.length === this.disk.length) {
      try {
        await this.image.snapshots.apply(snapshot.name)
      } catch (error) {
        if (this.p.refcountBits > 4 || (error as { code?: string }).code !== 'ERR_RANGE') throw error
        return
      }
      this.disk = snapshot.disk.slice()
    }
  }

  async #resize(size: number): Promise<void> {
    if (this.p.version === 2 && this.snapshots.length > 0) return
    await this.image.resize(size)
    const next = new Uint8Array(size)
    next.set(this.disk.subarray(0, size))
    this.disk = next
  }

  async compareSnapshot(snapshot: ModelSnapshot): Promise<void> {
    await using device = await this.image.snapshots.open(snapshot.name)
    expect(device.size).toBe(snapshot.disk.length)
    expect(Buffer.compare(await device.read(0, device.size), snapshot.disk)).toBe(0)
    expect(Buffer.compare(await device.vmState.read(0, device.vmState.size), snapshot.state)).toBe(0)
  }
}

async function play(p: Parameters, steps: readonly Operation[]): Promise<void> {
  const folder = tempFolder()
  const file = join(folder, 'image.qcow2')
  const backing = p.backingSize === undefined ? undefined : pattern(p.backingSize, 77)
  if (backing !== undefined) writeFileSync(join(folder, 'base.raw'), backing)
  const pair = new Pair(file, p, backing)
  const { sectors, backingSize: _, ...shape } = p
  const options: CreateOptions = { ...shape, size: sectors * 512, ...(backing === undefined ? {} : { backing: { file: 'base.raw', format: 'raw' } }) }
  pair.image = await Qcow2Image.create(file, options)
  try {
    for (const step of steps) await pair.run(step)
    expect(Buffer.compare(await pair.image.read(0, pair.image.size), pair.disk)).toBe(0)
    for (const snapshot of pair.snapshots) await pair.compareSnapshot(snapshot)
  } finally {
    await pair.image.close()
  }
  const qemu = qemus[qemus.length - 1]
  if (qemu === undefined) return
  const checked = await qemu.img('check', '-f', 'qcow2', file)
  expect(checked, checked.stdout + checked.stderr).toMatchObject({ code: 0 })
  const raw = join(folder, 'out.raw')
  await qemu.imgOk('convert', '-f', 'qcow2', '-O', 'raw', file, raw)
  expect(Buffer.compare(readFileSync(raw), pair.disk)).toBe(0)
}

describe('the engine against a plain model', () => {
  test('operation sequences', { timeout: 1_800_000 }, async () => {
    await fc.assert(
      fc.asyncProperty(parameters, fc.array(operation, { minLength: 1, maxLength: 25 }), play),
      { numRuns: long ? 1500 : 60, endOnFailure: !long },
    )
  })
})
