/** A disk that grows with its new clusters in their place: holes that read as zeroes, whatever was free before. */
import { statSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import type { CreateOptions } from '../../src/qcow2/new-image.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from '../cli/run.ts'

const sound = { corruptions: 0, leaks: 0, checkErrors: 0 }
const MiB = 1 << 20
const passphrase = 'secret'

const shapes: readonly (readonly [string, Omit<CreateOptions, 'size'>])[] = [
  ['version 3', {}],
  ['version 2', { version: 2 }],
  ['extended L2', { extendedL2: true, clusterSize: 16384 }],
  ['small clusters', { clusterSize: 512 }],
  ['LUKS', { encryption: { format: 'luks', passphrase, iterations: 1000 } }],
  ['AES', { encryption: { format: 'aes', passphrase } }],
]

test.each(shapes)('%s: after any writes and discards the new part is zeroes, and the image sound', async (_name, shape) => {
  const change = fc.record({ at: fc.nat(800_000), length: fc.integer({ min: 1, max: 200_000 }), discard: fc.boolean() })
  await fc.assert(
    fc.asyncProperty(fc.array(change, { maxLength: 6 }), fc.integer({ min: 2, max: 2000 }), async (changes, sectors) => {
      const host = new MemoryDevice(0, { growable: true })
      const image = await Qcow2Image.create(host, { size: MiB + 512, ...shape })
      const model = Buffer.alloc(MiB + 512)
      for (const { at, length, discard } of changes) {
        if (discard) {
          const [from, to] = [Math.ceil(at / 65536) * 65536, Math.ceil((at + length) / 65536) * 65536]
          await image.discard(from, Math.min(to, MiB) - Math.min(from, MiB))
          model.fill(0, Math.min(from, MiB), Math.min(to, MiB))
          await image.flush()
        } else {
          await image.write(at, new Uint8Array(length).fill(0xa5))
          model.fill(0xa5, at, at + length)
        }
      }
      const size = MiB + 512 + sectors * 512
      await image.resize(size, { preallocation: 'metadata' })
      expect(Buffer.from(await image.read(0, size)).equals(Buffer.concat([model, Buffer.alloc(sectors * 512)]))).toBe(true)
      await image.close()
      const report = await checkImage(new MemoryDevice(host.bytes.slice(), { growable: true }))
      expect(report).toMatchObject(sound)
    }),
    { numRuns: 12 },
  )
})

test('every whole cluster gets its place, and no space', async () => {
  const path = join(tempFolder(), 'disk')
  expect(await run(['create', '-q', '-f', 'qcow2', path, '1M'])).toMatchObject({ code: 0 })
  expect(await run(['resize', '-q', '--preallocation=metadata', path, '1G'])).toMatchObject({ code: 0, stderr: '' })
  const stats = statSync(path)
  expect(stats.size).toBeGreaterThan(1023 * MiB)
  expect(stats.blocks * 512).toBeLessThan(2 * MiB)
  expect(await checkImage(path)).toMatchObject({ ...sound, allocatedClusters: 1023 * 16 })
})

test('what a longer backing file holds does not show', async () => {
  const folder = tempFolder()
  const base = join(folder, 'base')
  const below = await Qcow2Image.create(base, { size: 4 * MiB })
  await below.write(0, new Uint8Array(4 * MiB).fill(7))
  await below.close()
  await using image = await Qcow2Image.create(join(folder, 'top'), { size: MiB, backing: { file: 'base', format: 'qcow2' } })
  await image.resize(6 * MiB, { preallocation: 'metadata' })
  expect(Buffer.from(await image.read(MiB, 5 * MiB)).every((byte) => byte === 0)).toBe(true)
  expect((await image.read(0, 1))[0]).toBe(7)
})

describeWithQemu('resize --preallocation=metadata', (qemu) => {
  test.each([[''], ['extended_l2=on'], ['compat=0.10']])('takes as much as of qemu-img, and QEMU finds the image sound (%s)', async (options) => {
    const folder = tempFolder()
    const [ours, theirs] = [join(folder, 'ours'), join(folder, 'theirs')]
    for (const path of [ours, theirs]) await qemu.imgOk('create', '-q', '-f', 'qcow2', ...(options === '' ? [] : ['-o', options]), path, '10M')
    expect(await run(['resize', '-q', '--preallocation=metadata', ours, '100M'])).toMatchObject({ code: 0, stderr: '' })
    await qemu.imgOk('resize', '-q', '--preallocation=metadata', theirs, '100M')
    await qemu.imgOk('check', ours)
    await qemu.imgOk('compare', ours, theirs)
    expect(Math.abs(statSync(ours).size - statSync(theirs).size)).toBeLessThanOrEqual(2 * 65536)
    expect(statSync(ours).blocks).toBeLessThanOrEqual(statSync(theirs).blocks)
  })
})
