/** Long work that finds its bytes at once: the event loop turns meanwhile, so that a timer or a key press can end it. */
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { anyRequest, BaseDevice, extent, type BlockLimits, type Extent } from '../../src/block/device.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { compareDevices } from '../../src/qcow2/compare.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { tempFolder } from '../support/temp.ts'

/** Nothing but zeroes, known in extents of `step` bytes. */
class Zeroes extends BaseDevice {
  readonly readOnly = true
  readonly limits: BlockLimits = anyRequest
  readonly size: number
  readonly #step: number
  asked = 0

  constructor(size: number, step: number) {
    super()
    this.size = size
    this.#step = step
  }

  protected onRead(_offset: number, target: Uint8Array): Promise<void> {
    target.fill(0)
    return Promise.resolve()
  }

  protected onWrite(): Promise<void> {
    return Promise.reject(new Error('read-only'))
  }

  protected onFlush(): Promise<void> {
    return Promise.resolve()
  }

  protected onClose(): Promise<void> {
    return Promise.resolve()
  }

  // eslint-disable-next-line @typescript-eslint/require-await -- what a map is
  protected override async *onMap(offset: number, length: number): AsyncGenerator<Extent, void, undefined> {
    for (let start = offset; start < offset + length; start += this.#step) {
      this.asked++
      yield extent({ start, length: Math.min(this.#step, offset + length - start), depth: 0, present: false, zero: true, data: false, compressed: false })
    }
  }
}

/** An abort that only a turn of the event loop brings. */
function soon(): AbortSignal {
  const controller = new AbortController()
  setTimeout(() => controller.abort(new Error('enough')), 50)
  return controller.signal
}

test('compare takes extents as they are, however long', async () => {
  const [a, b] = [new Zeroes(2 ** 52, 2 ** 50), new Zeroes(2 ** 52, 2 ** 51)]
  expect(await compareDevices(a, b)).toEqual({ equal: true, sizesDiffer: false })
  expect([a.asked, b.asked]).toEqual([4, 2])
})

test('compare', async () => {
  await expect(compareDevices(new Zeroes(2 ** 52, 2 ** 20), new Zeroes(2 ** 52, 2 ** 20), { signal: soon() })).rejects.toThrow('enough')
})

test('check', async () => {
  const path = join(tempFolder(), 'disk')
  await (await Qcow2Image.create(path, { size: 2 ** 38, preallocation: 'metadata' })).close()
  await expect(checkImage(path, { signal: soon() })).rejects.toThrow('enough')
})
