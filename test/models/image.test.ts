/**
 * Random operations on random images against a plain array of bytes; after each sequence the real
 * qemu-img finds nothing wrong and reads the same bytes.
 */
import { rmSync, statSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { buildImage, checkImageFile, emptyFile, imageOperations, imageParameters, qemuConvert, type ImageParameters, type ModelDisk } from '../../src/testing.ts'
import { expectBytes } from '../support/bytes.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const long = process.env['QCOW2_LONG'] === '1'

test('in memory: every image reads as its model', { timeout: long ? 1_800_000 : 60_000 }, async () => {
  await fc.assert(
    fc.asyncProperty(imageParameters({ backing: false, maxSize: 512 << 10 }), imageOperations({ maxSize: 512 << 10 }), async (parameters, operations) => {
      await buildImage(emptyFile(), parameters, operations)
    }),
    { numRuns: long ? 3000 : 100 },
  )
})

describeWithQemu('images as QEMU sees them', (qemu) => {
  const qemuImg = qemu.path('qemu-img')

  test('check clean, and convert equals the model', { timeout: long ? 1_800_000 : 120_000 }, async () => {
    const folder = tempFolder()
    const path = join(folder, 'image.qcow2')
    const raw = join(folder, 'image.raw')
    const compare = async (model: Uint8Array, snapshot?: string): Promise<void> => {
      await qemuConvert(path, raw, { qemuImg, ...(snapshot === undefined ? {} : { snapshot }) })
      expect(statSync(raw).size).toBe(model.length)
      expectBytes(await readFile(raw), model)
      rmSync(raw)
    }
    await fc.assert(
      fc.asyncProperty(imageParameters(), imageOperations({ maxLength: 20 }), async (parameters, operations) => {
        const model = await buildImage(path, parameters, operations)
        const verdict = await checkImageFile(path, { qemuImg })
        expect(verdict.qemu?.output, 'qemu-img check').toMatch(/"check-errors": 0/)
        expect(verdict).toMatchObject({ clean: true })
        await compare(model.bytes)
        for (const name of sameSizeSnapshots(model).slice(-1)) await compare(model.snapshot(name).disk, name)
      }),
      { numRuns: long ? 2000 : 50 },
    )
  })
})

/** `qemu-img convert -l` reads a snapshot with the size that the disk has now, not its own. */
function sameSizeSnapshots(model: ModelDisk): string[] {
  return model.snapshots.filter((name) => model.snapshot(name).disk.length === model.size)
}

test('narrow counters may refuse a snapshot of many clusters compressed into one', async () => {
  const parameters: ImageParameters = {
    size: 65_536,
    clusterSize: 512,
    version: 3,
    refcountBits: 8,
    extendedL2: false,
    lazyRefcounts: false,
    preallocation: 'off',
    backing: undefined,
  }
  const model = await buildImage(emptyFile(), parameters, [
    { kind: 'write compressed', offset: 0, length: 65_025, seed: 1 },
    { kind: 'snapshot create' },
    { kind: 'snapshot create' },
    { kind: 'snapshot apply', index: 0 },
  ])
  expect(model.compressed).toBe(true)
})

describe('the model', () => {
  test('is itself right: a difference is found', async () => {
    const parameters = fc.sample(imageParameters({ backing: false }), { numRuns: 1, seed: 1 })[0]!
    const file = emptyFile()
    const model = await buildImage(file, { ...parameters, size: 4096 }, [{ kind: 'write', offset: 0, length: 4096, seed: 3 }])
    expect(model.bytes.every((byte) => byte === 0)).toBe(false)
  })
})
