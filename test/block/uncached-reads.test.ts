/** Large reads past the page cache: the same bytes, by another descriptor, only where the page cache has nothing. */
import * as fs from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { allocateAligned } from '../../src/block/slab.ts'
import { UncachedReads } from '../../src/block/uncached-reads.ts'
import { systemFlags } from '../support/descriptors.ts'
import { tempFolder } from '../support/temp.ts'

const size = (3 << 20) + 12_345
const cached = Number.POSITIVE_INFINITY
const cold = 0

/** A file of bytes that tell their place. */
function writeFile(): { readonly path: string; readonly content: Uint8Array } {
  const words = Uint32Array.from({ length: Math.ceil(size / 4) }, (_, index) => Math.imul(index, 2_654_435_761))
  const content = new Uint8Array(words.buffer, 0, size)
  const path = join(tempFolder(), 'file')
  fs.writeFileSync(path, content)
  return { path, content }
}

async function open(path: string, within: number): Promise<UncachedReads> {
  const device = UncachedReads.over(await openFile(path, { readOnly: true, syncLimit: 65_536 }), 65_536, within)
  if (!(device instanceof UncachedReads)) throw new Error('not suited')
  return device
}

/** Descriptors of this process on a file: whether each is for direct I/O. */
function descriptors(path: string): boolean[] {
  return systemFlags(path).map((flags) => (flags & fs.constants.O_DIRECT) !== 0)
}

describe.each([['cached', cached], ['cold', cold]] as const)('a file that is %s', (_, within) => {
  test('reads as its bytes, at any place, in any memory', async () => {
    const { path, content } = writeFile()
    await using device = await open(path, within)
    device.start()
    const request = fc.tuple(fc.nat(size - 1), fc.nat(1 << 20), fc.nat(4096), fc.boolean())
    await fc.assert(
      fc.asyncProperty(request, async ([offset, wanted, shift, aligned]) => {
        const length = Math.min(wanted, size - offset)
        const memory = aligned ? allocateAligned(length) : new Uint8Array(length + shift).subarray(shift)
        await device.readInto(offset, memory)
        expect(Buffer.compare(memory, content.subarray(offset, offset + length))).toBe(0)
      }),
      { numRuns: 60 },
    )
  })
})

describe.runIf(process.platform === 'linux')('which way a read goes', () => {
  test('large reads of a cold file go past the page cache, once that was asked for; small ones never', async () => {
    const { path } = writeFile()
    const device = await open(path, cold)
    await device.read(0, 1 << 20)
    expect(descriptors(path)).toEqual([false])
    device.start()
    await device.read(0, 65_536)
    expect(descriptors(path)).toEqual([false])
    await device.read(0, 262_144)
    expect(descriptors(path).sort()).toEqual([false, true])
    await device.close()
    expect(descriptors(path)).toEqual([])
  })

  test('what the page cache holds is read from there', async () => {
    const { path } = writeFile()
    await using device = await open(path, cached)
    device.start()
    await device.read(0, 1 << 20)
    expect(descriptors(path)).toEqual([false])
  })

  test('another file that has got the name is not read', async () => {
    const { path, content } = writeFile()
    await using device = await open(path, cold)
    device.start()
    fs.renameSync(path, `${path}.old`)
    fs.writeFileSync(path, new Uint8Array(size))
    expect(Buffer.compare(await device.read(0, 1 << 20), content.subarray(0, 1 << 20))).toBe(0)
    expect(descriptors(path)).toEqual([])
  })
})

test('only a file opened read-only by its path, with synchronous reads, is taken', async () => {
  const { path } = writeFile()
  const memory = new MemoryDevice(new Uint8Array(8192))
  expect(UncachedReads.over(memory, 65_536)).toBe(memory)
  await using asynchronous = await openFile(path, { readOnly: true })
  expect(UncachedReads.over(asynchronous, 0)).toBe(asynchronous)
  await using writable = await openFile(path, { syncLimit: 65_536 })
  expect(UncachedReads.over(writable, 65_536)).toBe(writable)
})
