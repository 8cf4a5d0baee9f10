/** Images that go out through a pipe, and raw disks that come in through one. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { convertStreamToQcow2, convertToQcow2Stream } from '../../src/qcow2/convert-stream.ts'
import type { ConvertToQcow2Options } from '../../src/qcow2/convert.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { diskOf, type DiskPiece } from '../support/disk.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 1000 : 60

/** Runs of zeroes, of text and of noise: dropped, compressed, stored as they are. */
const disk = fc
  .array(fc.record({ length: fc.integer({ min: 1, max: 90_000 }), kind: fc.constantFrom('zero', 'text', 'noise') }), { maxLength: 12 })
  .map((pieces) => diskOf(pieces as DiskPiece[]))

const options: fc.Arbitrary<ConvertToQcow2Options> = fc
  .record({ clusterBits: fc.integer({ min: 9, max: 17 }), refcountBits: fc.constantFrom(1, 16, 64), extendedL2: fc.boolean(), compressed: fc.boolean(), sparseSize: fc.constantFrom(0, 4096) })
  .map(({ clusterBits, extendedL2, ...rest }) => ({ ...rest, extendedL2, clusterSize: 2 ** (extendedL2 ? Math.max(14, clusterBits) : clusterBits), workers: 1 }))

async function expectImage(file: MemoryDevice, content: Uint8Array): Promise<void> {
  const report = await checkImage(file)
  expect([report.corruptions, report.leaks]).toEqual([0, 0])
  await using image = await Qcow2Image.open(file, { readOnly: true })
  expect(image.size).toBe(content.length)
  expect(Buffer.compare(await image.read(0, image.size), content)).toBe(0)
}

function growable(bytes: Uint8Array | number = 0): MemoryDevice {
  return new MemoryDevice(bytes, { growable: true })
}

test('what was sent is a clean image of the disk, whatever the options', async () => {
  await fc.assert(
    fc.asyncProperty(disk, options, async (content, options) => {
      const sent: Uint8Array[] = []
      const send = async (bytes: Uint8Array): Promise<void> => {
        sent.push(bytes.slice())
        await Promise.resolve()
      }
      await convertToQcow2Stream(growable(content.slice()), send, options)
      await expectImage(growable(new Uint8Array(Buffer.concat(sent))), content)
    }),
    { numRuns },
  )
}, 120_000)

test('what arrives in chunks of any size is a clean image of the disk', async () => {
  const cuts = fc.array(fc.integer({ min: 1, max: 200_000 }), { minLength: 1, maxLength: 5 })
  await fc.assert(
    fc.asyncProperty(disk, options, cuts, async (content, options, cuts) => {
      async function* chunks(): AsyncGenerator<Uint8Array, void, undefined> {
        for (let at = 0, n = 0; at < content.length; n++) {
          const length = cuts[n % cuts.length]!
          yield content.subarray(at, at + length)
          at += length
          await Promise.resolve()
        }
      }
      const file = growable()
      await convertStreamToQcow2(chunks(), file, { ...options, onProgress: undefined })
      await expectImage(file, content)
    }),
    { numRuns },
  )
}, 120_000)

test('one call of send at a time', async () => {
  const source = growable(new Uint8Array(32 << 20).fill(7))
  let busy = 0
  await convertToQcow2Stream(source, async () => {
    expect(++busy).toBe(1)
    await new Promise((resolve) => setImmediate(resolve))
    busy--
  })
  expect(busy).toBe(0)
})

test('a reader that fails ends it with its error', async () => {
  const source = growable(new Uint8Array(32 << 20).fill(7))
  let calls = 0
  const send = (): Promise<void> => (++calls > 3 ? Promise.reject(new Error('gone')) : Promise.resolve())
  await expect(convertToQcow2Stream(source, send)).rejects.toThrow('gone')
  await expect(convertToQcow2Stream(source, send, { compressed: true, workers: 1 })).rejects.toThrow('gone')
})

test('a source that changes between the passes is an error', async () => {
  const source = growable(new Uint8Array(8 << 20))
  const send = (): Promise<void> => source.write(0, new Uint8Array(1 << 20).fill(1))
  await expect(convertToQcow2Stream(source, send)).rejects.toMatchObject({ code: 'ERR_BUSY' })
})

test('an interrupt ends both directions', async () => {
  const interrupt = new AbortController()
  const source = growable(new Uint8Array(32 << 20).fill(7))
  const send = (): Promise<void> => {
    interrupt.abort(new Error('enough'))
    return Promise.resolve()
  }
  await expect(convertToQcow2Stream(source, send, { signal: interrupt.signal })).rejects.toThrow('enough')
  async function* endless(): AsyncGenerator<Uint8Array, void, undefined> {
    for (;;) yield await Promise.resolve(new Uint8Array(1 << 20).fill(1))
  }
  const { signal } = interrupt
  await expect(convertStreamToQcow2(endless(), growable(), { signal })).rejects.toThrow('enough')
})
