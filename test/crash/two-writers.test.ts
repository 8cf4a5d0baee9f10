/**
 * Any one request may fail, with two snapshots under construction: after a failure that leaves the header old or
 * new nothing more is written, whoever writes, so the image has leaks at most.
 */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { fault, type FaultPlan } from '../../src/block.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import type { SnapshotWriter } from '../../src/qcow2/snapshot-writer.ts'
import { keepOpen } from '../../src/testing/build-image.ts'
import '../support/seed.ts'
import { expectOnlyLeaks } from './crash.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 5000 : 250
const KiB = 1024
const size = 512 * KiB

test('a failed flush after the header was written stops the other writer of VM state too', async () => {
  const file = new MemoryDevice(0, { growable: true })
  let [armed, header] = [false, false]
  const plan: FaultPlan = ({ operation, offset }) => {
    if (armed && operation === 'write' && offset === 0) header = true
    if (!armed || !header || operation !== 'flush') return undefined
    armed = false
    return { kind: 'fail' }
  }
  const image = await Qcow2Image.create(fault(keepOpen(file), plan), { size: 1 << 20 })
  await image.write(0, new Uint8Array(65_536).fill(1))
  const [a, b] = [await image.snapshots.begin({ name: 'a' }), await image.snapshots.begin({ name: 'b' })]
  await a.write(new Uint8Array(300_000).fill(7))
  await b.write(new Uint8Array(3_000_000).fill(0x55))
  await image.flush()
  armed = true
  await expect(a.finish()).rejects.toMatchObject({ code: 'ERR_IO' })
  const late = async (): Promise<void> => {
    await b.write(new Uint8Array(2_000_000).fill(0x55))
    await b.finish()
  }
  await expect(late()).rejects.toMatchObject({ code: 'ERR_IO' })
  const writes: (() => Promise<unknown>)[] = [
    () => image.write(0, new Uint8Array(512)),
    () => image.writeZeroes(0, 65_536),
    () => image.discard(0, 65_536),
    () => image.resize(2 << 20),
    () => image.flush(),
    () => image.bitmaps.add({ name: 'x' }),
    () => image.snapshots.create({ name: 'c' }),
  ]
  for (const write of writes) await expect(write()).rejects.toMatchObject({ code: 'ERR_IO' })
  await image.close()
  expect(await checkImage(file)).toMatchObject({ corruptions: 0 })
})

const step = fc.record({ kind: fc.constantFrom('state', 'state', 'write', 'write', 'zeroes', 'discard', 'flush', 'capture', 'finish', 'abort', 'begin', 'create', 'delete', 'apply', 'resize', 'add bitmap', 'remove bitmap'), first: fc.boolean(), at: fc.nat(size / 512 - 1), length: fc.constantFrom(512, 4 * KiB, 40 * KiB, 200 * KiB), wait: fc.boolean() })
type Step = typeof step extends fc.Arbitrary<infer T> ? T : never

/** What a step does; of a snapshot or bitmap that is not there, nothing. */
async function perform(image: Qcow2Image, writers: (SnapshotWriter | undefined)[], { kind, first, at, length }: Step): Promise<unknown> {
  const which = first ? 0 : 1
  const writer = writers[which]
  const offset = (at * 512) % image.size
  const bytes = Math.min(length, image.size - offset)
  const name = [...image.snapshots][first ? 0 : image.snapshots.count - 1]?.id
  switch (kind) {
    case 'state':
      return writer?.write(new Uint8Array(length).fill(at))
    case 'write':
      return image.write(offset, new Uint8Array(bytes).fill(at))
    case 'zeroes':
      return image.writeZeroes(offset, bytes, { unmap: first })
    case 'discard':
      return image.discard(offset, bytes)
    case 'flush':
      return image.flush()
    case 'capture':
      return writer?.captureDisk()
    case 'finish':
      return writer?.finish()
    case 'abort':
      writers[which] = undefined
      return writer?.abort()
    case 'begin':
      if (writer !== undefined && !writer.closed) return undefined
      writers[which] = await image.snapshots.begin({ name: 's' })
      return undefined
    case 'create':
      return image.snapshots.create({ name: 'c' })
    case 'delete':
      return name === undefined ? undefined : image.snapshots.delete(name)
    case 'apply':
      return name === undefined ? undefined : image.snapshots.apply(name)
    case 'resize':
      return image.resize(Math.max(512, at * 512))
    case 'add bitmap':
      return image.bitmaps.add({ name: String(first) })
    default:
      return image.bitmaps.remove(String(first))
  }
}

test('two snapshots under construction, any operations, any failing request', { timeout: 600_000 }, async () => {
  const failing = fc.record({ at: fc.nat(150), kind: fc.constantFrom('fail', 'tear', 'flush', 'flush after the header'), forever: fc.boolean() })
  await fc.assert(
    fc.asyncProperty(fc.array(step, { minLength: 4, maxLength: 20 }), failing, fc.constantFrom(512, 4096, 65_536), async (steps, wrong, clusterSize) => {
      const file = new MemoryDevice(0, { growable: true })
      let seen = 0
      let header = false
      const plan: FaultPlan = ({ operation, offset, length }) => {
        if (operation === 'read') return undefined
        const afterHeader = header
        header = operation === 'write' && offset === 0
        if (wrong.kind.startsWith('flush') && operation !== 'flush') return undefined
        if (wrong.kind === 'flush after the header' && !afterHeader) return undefined
        const index = seen++
        const due = wrong.kind === 'flush after the header' ? wrong.at % 8 : wrong.kind === 'flush' ? wrong.at % 50 : wrong.at
        if (index < due || (index > due && !wrong.forever)) return undefined
        return wrong.kind === 'tear' ? { kind: 'tear', length: Math.floor(length / 1024) * 512 } : { kind: 'fail' }
      }
      const image = await Qcow2Image.create(keepOpen(file), { size, clusterSize })
      await image.write(0, new Uint8Array(100 * KiB).fill(1))
      await image.snapshots.create({ name: 'old' })
      await image.close()
      const opened = await Qcow2Image.open(fault(keepOpen(file), plan))
      const writers = [await opened.snapshots.begin({ name: 'a' }).catch(() => undefined), await opened.snapshots.begin({ name: 'b' }).catch(() => undefined)]
      const running: Promise<unknown>[] = []
      for (const each of steps) {
        const done = perform(opened, writers, each).catch(() => undefined)
        running.push(done)
        if (each.wait) await done
      }
      await Promise.all(running)
      await opened.close().catch(() => undefined)
      await expectOnlyLeaks(file.bytes.slice(0, file.size), true)
    }),
    { numRuns },
  )
})
