/** Work and memory grow with what is asked for and what is there, not with its square or with what an image claims. */
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { NullDevice } from '../../src/block/null.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'

const MiB = 1 << 20

/** How many 32-bit words are read through a DataView, which is how tables are read, while a task runs. */
async function wordsRead(task: () => Promise<unknown>): Promise<number> {
  // eslint-disable-next-line @typescript-eslint/unbound-method -- applied to the view it is called on
  const { getUint32 } = DataView.prototype
  let count = 0
  DataView.prototype.getUint32 = function (this: DataView, ...place): number {
    count++
    return getUint32.apply(this, place)
  }
  try {
    await task()
  } finally {
    DataView.prototype.getUint32 = getUint32
  }
  return count
}

describe('zeroing over a backing file', () => {
  const overlay = (): Promise<Qcow2Image> =>
    Qcow2Image.create(new MemoryDevice(0, { growable: true }), {
      size: 1024 * MiB,
      backing: { file: 'base', format: 'raw' },
      references: () => new NullDevice(512 * MiB),
    })

  test('each table entry is read a few times, however long the range', async () => {
    await using image = await overlay()
    const entries = (512 * MiB) / 65536
    expect(await wordsRead(() => image.writeZeroes(0, 512 * MiB))).toBeLessThan(entries * 16)
    expect(await wordsRead(() => image.writeZeroes(0, 512 * MiB))).toBeLessThan(entries * 16)
  })

  test('what lies behind the end of the backing file gets no tables', async () => {
    await using image = await overlay()
    await image.writeZeroes(0, 1024 * MiB)
    expect([0, 1].map((index) => image.engine.l1Table.offsetAt(index) > 0)).toEqual([true, false])
  })
})
