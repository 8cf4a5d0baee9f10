/** A power cut at any moment leaves an image that opens, with nothing worse than leaks and all that was flushed. */
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { imageOperations, imageParameters, qemuCheck, type ImageOperation, type ImageParameters } from '../../src/testing.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { expectSound, losses, mayCopiedDiffer, recordOperations, stateAt } from './crash.ts'

const long = process.env['QCOW2_LONG'] === '1'
const KiB = 1024

const plain: ImageParameters = {
  size: 256 * KiB,
  clusterSize: 4 * KiB,
  version: 3,
  refcountBits: 16,
  extendedL2: false,
  lazyRefcounts: false,
  preallocation: 'off',
  backing: undefined,
}

const write = (offset: number, length: number, seed: number): ImageOperation => ({ kind: 'write', offset, length, seed })
const flush: ImageOperation = { kind: 'flush' }
const snapshot: ImageOperation = { kind: 'snapshot create' }

interface Case {
  readonly name: string
  readonly parameters?: Partial<ImageParameters>
  readonly setup?: readonly ImageOperation[]
  readonly operations: readonly ImageOperation[]
}

const cases: readonly Case[] = [
  { name: 'allocating writes', operations: [write(0, 10_000, 1), flush, write(40_000, 30_000, 2), write(5000, 100, 3), flush] },
  {
    name: 'copy-on-write under a snapshot',
    setup: [write(0, 100_000, 1), snapshot],
    operations: [write(3000, 50, 2), flush, write(50_000, 20_000, 3), flush],
  },
  {
    name: 'discard and reuse of freed clusters',
    setup: [write(0, 200_000, 1)],
    operations: [{ kind: 'discard', offset: 8192, length: 65_536 }, write(210_000, 40_000, 2), flush, write(16_384, 8192, 3), flush],
  },
  {
    name: 'write zeroes',
    setup: [write(0, 200_000, 1), snapshot],
    operations: [
      { kind: 'write zeroes', offset: 5000, length: 50_000, unmap: false },
      flush,
      { kind: 'write zeroes', offset: 70_000, length: 50_000, unmap: true },
      write(60_000, 1000, 2),
      flush,
    ],
  },
  {
    name: 'growth of refcount blocks and table',
    parameters: { clusterSize: 512, refcountBits: 64, size: 2048 * KiB },
    operations: [write(0, 300_000, 1), flush, write(300_000, 300_000, 2), flush],
  },
  { name: 'snapshot create', setup: [write(0, 60_000, 1)], operations: [snapshot, write(0, 5000, 2), snapshot, flush] },
  {
    name: 'snapshot apply',
    setup: [write(0, 60_000, 1), snapshot, write(10_000, 60_000, 2), snapshot],
    operations: [{ kind: 'snapshot apply', index: 0 }, flush, write(0, 5000, 3), { kind: 'snapshot apply', index: 1 }, flush],
  },
  {
    name: 'snapshot delete',
    setup: [write(0, 60_000, 1), snapshot, write(10_000, 60_000, 2), snapshot],
    operations: [{ kind: 'snapshot delete', index: 0 }, write(100_000, 50_000, 3), flush, { kind: 'snapshot delete', index: 0 }, flush],
  },
  {
    name: 'resize, with growth of the L1 table',
    parameters: { clusterSize: 512 },
    setup: [write(0, 60_000, 1), snapshot],
    operations: [{ kind: 'resize', size: 2048 * KiB }, write(2_000_000, 10_000, 2), flush, { kind: 'resize', size: 128 * KiB }, write(0, 50, 3), flush],
  },
  {
    name: 'VM state',
    setup: [write(0, 60_000, 1), { kind: 'snapshot create', vmState: { length: 50_000, seed: 4 } }],
    operations: [
      write(1000, 5000, 2),
      { kind: 'snapshot create', vmState: { length: 70_001, seed: 5 } },
      { kind: 'snapshot apply', index: 0 },
      flush,
      { kind: 'snapshot delete', index: 0 },
      write(0, 5000, 3),
      flush,
    ],
  },
  {
    name: 'compressed writes',
    operations: [
      { kind: 'write compressed', offset: 0, length: 60_000, seed: 1 },
      flush,
      write(5000, 10_000, 2),
      { kind: 'write compressed', offset: 20_000, length: 30_000, seed: 3 },
      flush,
    ],
  },
  {
    name: 'concurrent writes',
    setup: [write(0, 100_000, 1), snapshot],
    operations: [
      { kind: 'write concurrently', parts: [0, 9000, 20_000, 60_000, 150_000].map((offset, seed) => ({ offset, length: 9000, seed: seed + 2 })) },
      flush,
      { kind: 'write concurrently', parts: [3, 4100, 8200, 150_100, 200_000].map((offset, seed) => ({ offset, length: 4000, seed: seed + 9 })) },
      flush,
    ],
  },
  { name: 'lazy refcounts', parameters: { lazyRefcounts: true }, operations: [write(0, 50_000, 1), flush, write(90_000, 9000, 2), { kind: 'reopen' }] },
  { name: 'subclusters', parameters: { clusterSize: 16 * KiB, extendedL2: true }, operations: [write(300, 5000, 1), flush, write(9000, 700, 2), flush] },
  { name: 'version 2', parameters: { version: 2 }, operations: [write(0, 10_000, 1), snapshot, write(5000, 10_000, 2), flush] },
]

describe('every prefix', () => {
  test.each(cases)('$name', async ({ parameters, setup, operations }) => {
    const run = await recordOperations({ ...plain, ...parameters }, setup ?? [], operations)
    const { events } = run.recording
    const step = long ? 1 : Math.max(1, Math.ceil(events / 30))
    for (let at = 0; at <= events; at += step) {
      for (const { name, survives } of losses) {
        const file = stateAt(run, at, survives(at))
        await expectSound(run, at, file).catch((cause: unknown) => {
          throw new Error(`cut before event ${at} of ${events}, ${name}: ${(cause as Error).message}`, { cause })
        })
      }
    }
  })
})

test('any operations, any cut, any loss', { timeout: long ? 1_800_000 : 60_000 }, async () => {
  await fc.assert(
    fc.asyncProperty(
      imageParameters({ backing: false, maxSize: 256 * KiB, clusterSizes: [512, 4096, 16_384, 65_536] }),
      imageOperations({ maxSize: 256 * KiB, maxLength: 8 }),
      imageOperations({ maxSize: 256 * KiB, maxLength: 8 }),
      fc.array(fc.record({ moment: fc.double({ min: 0, max: 1, noNaN: true }), loss: fc.nat(losses.length - 1), seed: fc.nat(10_000) }), {
        minLength: 1,
        maxLength: 6,
      }),
      async (parameters, setup, operations, cuts) => {
        const run = await recordOperations(parameters, setup, operations)
        for (const { moment, loss, seed } of cuts) {
          const at = Math.round(moment * run.recording.events)
          await expectSound(run, at, stateAt(run, at, losses[loss]!.survives(seed)))
        }
      },
    ),
    { numRuns: long ? 5000 : 100 },
  )
})

describeWithQemu('states after a power cut', (qemu) => {
  test.each(cases)('qemu-img check: $name', async ({ parameters, setup, operations }) => {
    const path = join(tempFolder(), 'crashed.qcow2')
    const run = await recordOperations({ ...plain, ...parameters }, setup ?? [], operations)
    const { events } = run.recording
    const states = long ? events : 3
    for (let state = 0; state <= states; state++) {
      const at = Math.round((state / states) * events)
      for (const { name, survives } of long ? losses : [losses[state % losses.length]!]) {
        writeFileSync(path, stateAt(run, at, survives(at)))
        const where = `cut before event ${at} of ${events}, ${name}`
        const mayDiffer = mayCopiedDiffer(run, at)
        const check = await qemuCheck(path, { qemuImg: qemu.path('qemu-img'), ...(mayDiffer ? { repair: 'leaks' } : {}) })
        expect(mayDiffer ? [0] : [0, 3], `${where}: ${check?.output}`).toContain(check?.exitCode)
      }
    }
  })
})
