/**
 * What every `BlockDevice` must do, run on each of them through a factory. Adapts to what the device
 * says of itself: alignment, read-only, growable.
 */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { allocateAligned, Qcow2Error, type BlockDevice, type Extent, type MapOptions } from '../../src/block.ts'
import { expectBytes } from '../support/bytes.ts'

/** Makes a device that holds `content`. The suite closes it. */
export type DeviceFactory = (content: Uint8Array) => Promise<BlockDevice> | BlockDevice

/** What of the suite applies. */
export interface SuiteOptions {
  /** Size in bytes of the devices to ask for; default 256 KiB. A multiple of 4096. */
  readonly size?: number
  /** Whether `resize` works; default true for a growable device. */
  readonly resizable?: boolean
  /** Runs of each property; default 30. */
  readonly numRuns?: number
}

/** Registers the whole suite for one kind of device. */
export function blockDeviceSuite(name: string, create: DeviceFactory, options: SuiteOptions = {}): void {
  const size = options.size ?? 256 << 10
  const context: Context = { create, size, numRuns: options.numRuns ?? 30, resizable: options.resizable }
  describe(`${name} as a BlockDevice`, () => {
    readingTests(context)
    writingTests(context)
    resizingTests(context)
    refusalTests(context)
    lifecycleTests(context)
  })
}

interface Context {
  readonly create: DeviceFactory
  readonly size: number
  readonly numRuns: number
  readonly resizable: boolean | undefined
}

/** Bytes that differ at every offset a test could confuse. */
export function pattern(length: number, seed = 1): Uint8Array {
  const bytes = new Uint8Array(length)
  let state = seed
  for (let at = 0; at < length; at++) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    bytes[at] = state >>> 24
  }
  return bytes
}

/** A copy of `bytes` in memory that every device accepts. */
export function aligned(bytes: Uint8Array): Uint8Array {
  const copy = allocateAligned(bytes.length)
  copy.set(bytes)
  return copy
}

/** The outcome of a call that must reject. */
async function failure(call: Promise<unknown>): Promise<unknown> {
  return call.then(
    () => expect.fail('expected a rejection'),
    (error: unknown) => error,
  )
}

async function firstExtent(device: BlockDevice, options?: MapOptions): Promise<unknown> {
  return device.map(options)[Symbol.asyncIterator]().next()
}

async function readAll(device: BlockDevice): Promise<Uint8Array> {
  const bytes = allocateAligned(device.size)
  await device.readInto(0, bytes)
  return bytes
}

/** Ranges in units of the request alignment, within `[0, size)`. */
function ranges(size: number, unit: number): fc.Arbitrary<{ offset: number; length: number }> {
  const units = size / unit
  return fc
    .tuple(fc.nat(units - 1), fc.nat(Math.min(units, 48 * Math.max(1, 1024 / unit))))
    .map(([start, count]) => ({ offset: start * unit, length: Math.min(count, units - start) * unit }))
}

function readingTests({ create, size, numRuns }: Context): void {
  test('has the content it was made with', async () => {
    const content = pattern(size)
    await using device = await create(content)
    expect(device.size).toBe(size)
    expectBytes(await readAll(device), content)
  })

  test('reads any range', async () => {
    const content = pattern(size)
    await using device = await create(content)
    await fc.assert(
      fc.asyncProperty(ranges(size, device.limits.requestAlignment), async ({ offset, length }) => {
        const target = allocateAligned(length).fill(0xee)
        await device.readInto(offset, target)
        expectBytes(target, content.subarray(offset, offset + length))
        expectBytes(await device.read(offset, length), content.subarray(offset, offset + length))
      }),
      { numRuns },
    )
  })

  test('serves concurrent reads', async () => {
    const content = pattern(size)
    await using device = await create(content)
    const piece = size / 16
    const parts = await Promise.all(
      Array.from({ length: 16 }, async (_, index) => {
        const target = allocateAligned(piece)
        await device.readInto(index * piece, target)
        return target
      }),
    )
    expectBytes(Buffer.concat(parts), content)
  })

  test('maps every byte once, in order, and zero extents read as zeroes', async () => {
    const content = pattern(size)
    content.fill(0, size / 4, size / 2)
    await using device = await create(content)
    let at = 0
    for await (const extent of device.map()) {
      expect(extent.start).toBe(at)
      expect(extent.length).toBeGreaterThan(0)
      if (extent.zero) expect(content.subarray(at, at + extent.length).every((byte) => byte === 0)).toBe(true)
      at += extent.length
    }
    expect(at).toBe(size)
    const part: Extent[] = []
    for await (const extent of device.map({ offset: size / 4, length: size / 4 })) part.push(extent)
    expect(part[0]?.start).toBe(size / 4)
    expect(part.reduce((sum, extent) => sum + extent.length, 0)).toBe(size / 4)
  })
}

type Change =
  | { readonly kind: 'write' | 'write zeroes' | 'discard'; readonly offset: number; readonly length: number; readonly seed: number }
  | { readonly kind: 'flush' }

function changes(size: number, unit: number): fc.Arbitrary<Change[]> {
  const kinds = fc.constantFrom('write' as const, 'write' as const, 'write zeroes' as const, 'discard' as const)
  const change = fc
    .tuple(kinds, ranges(size, unit), fc.nat(1000))
    .map(([kind, range, seed]): Change => ({ kind, ...range, seed }))
  return fc.array(fc.oneof({ weight: 8, arbitrary: change }, { weight: 1, arbitrary: fc.constant<Change>({ kind: 'flush' }) }), {
    maxLength: 12,
  })
}

/** Performs one change on the device and on the model. A discarded range may read either way. */
async function perform(change: Change, device: BlockDevice, model: Uint8Array): Promise<void> {
  if (change.kind === 'flush') return device.flush()
  const { offset, length } = change
  const range = model.subarray(offset, offset + length)
  switch (change.kind) {
    case 'write':
      range.set(pattern(length, change.seed))
      return device.write(offset, aligned(range))
    case 'write zeroes':
      range.fill(0)
      return device.writeZeroes(offset, length, { unmap: change.seed % 2 === 0 })
    case 'discard': {
      await device.discard(offset, length)
      const now = allocateAligned(length)
      await device.readInto(offset, now)
      expect(now.every((byte, index) => byte === 0 || byte === range[index])).toBe(true)
      range.set(now)
    }
  }
}

function writingTests({ create, size, numRuns }: Context): void {
  test('any sequence of changes reads back', async () => {
    const probe = await create(pattern(size))
    const { readOnly, limits } = probe
    await probe.close()
    if (readOnly) return
    await fc.assert(
      fc.asyncProperty(changes(size, limits.requestAlignment), async (sequence) => {
        const model = pattern(size)
        await using device = await create(model.slice())
        for (const change of sequence) await perform(change, device, model)
        expectBytes(await readAll(device), model)
      }),
      { numRuns },
    )
  })

  test('takes concurrent writes side by side', async () => {
    await using device = await create(new Uint8Array(size))
    if (device.readOnly) return
    const unit = Math.max(device.limits.requestAlignment, size / 64)
    const content = pattern(size)
    const writes: Promise<void>[] = []
    for (let at = 0; at < size; at += unit) writes.push(device.write(at, aligned(content.subarray(at, at + unit))))
    await Promise.all(writes)
    await device.flush()
    expectBytes(await readAll(device), content)
  })

  test('takes a write with forced unit access', async () => {
    await using device = await create(new Uint8Array(size))
    if (device.readOnly) return
    const bytes = aligned(pattern(4096))
    await device.write(4096, bytes, { fua: true })
    await device.writeZeroes(0, 4096, { fua: true })
    const target = allocateAligned(4096)
    await device.readInto(4096, target)
    expectBytes(target, bytes)
  })
}

function resizingTests({ create, size, resizable }: Context): void {
  test('resizes, with zeroes for new bytes, or refuses', async () => {
    const content = pattern(size)
    await using device = await create(content)
    if (device.readOnly) {
      expect(await failure(device.resize(size))).toMatchObject({ code: 'ERR_READ_ONLY' })
    } else if (resizable ?? device.growable) {
      await device.resize(size * 2)
      expect(device.size).toBe(size * 2)
      await device.resize(size / 2)
      expect(device.size).toBe(size / 2)
      await device.resize(size)
      const expected = new Uint8Array(size)
      expected.set(content.subarray(0, size / 2))
      expectBytes(await readAll(device), expected)
    } else {
      expect(await failure(device.resize(size * 2))).toMatchObject({ code: 'ERR_UNSUPPORTED' })
      expect(device.size).toBe(size)
    }
  })

  test('a write past the end grows a growable device and is refused by others', async () => {
    const content = pattern(size)
    await using device = await create(content)
    if (device.readOnly) return
    const bytes = aligned(pattern(4096, 7))
    if (!device.growable) {
      expect(await failure(device.write(size, bytes))).toBeInstanceOf(RangeError)
      expect(await failure(device.writeZeroes(size - 4096, 8192))).toBeInstanceOf(RangeError)
      expect(device.size).toBe(size)
      return
    }
    await device.write(size + 4096, bytes)
    expect(device.size).toBe(size + 8192)
    await device.writeZeroes(size + 4096, 8192)
    expect(device.size).toBe(size + 12_288)
    const expected = new Uint8Array(size + 12_288)
    expected.set(content)
    expectBytes(await readAll(device), expected)
  })
}

function refusalTests({ create, size }: Context): void {
  test('takes requests of any length at any offset, or says what it demands', async () => {
    const content = pattern(size)
    await using device = await create(content)
    const any = device.limits.requestAlignment === 1
    if (device.limits.memoryAlignment > 1) return
    for (const [offset, length] of [[1, 1], [511, 2], [1000, 5001], [size - 7, 7]] as const) {
      const reading = device.read(offset, length)
      if (any) expectBytes(await reading, content.subarray(offset, offset + length))
      else if (offset % device.limits.requestAlignment !== 0) expect(await failure(reading)).toMatchObject({ code: 'ERR_ALIGNMENT' })
      if (device.readOnly || !any) continue
      const bytes = pattern(length, offset)
      content.set(bytes, offset)
      await device.write(offset, bytes)
      content.fill(0, offset + 1, Math.min(size, offset + 1 + length))
      await device.writeZeroes(offset + 1, Math.min(size, offset + 1 + length) - offset - 1)
    }
    if (any) expectBytes(await readAll(device), content)
  })

  test('refuses ranges that are no part of it', async () => {
    await using device = await create(pattern(size))
    const unit = allocateAligned(4096)
    for (const offset of [-4096, -1, 0.5, Number.NaN, Number.MAX_SAFE_INTEGER + 1, size, size - 2048]) {
      expect(await failure(device.readInto(offset, unit))).toBeInstanceOf(RangeError)
      expect(await failure(device.read(offset, 4096))).toBeInstanceOf(RangeError)
    }
    expect(await failure(device.read(0, -1))).toBeInstanceOf(RangeError)
    expect(await failure(device.read(0, 1.5))).toBeInstanceOf(RangeError)
    if (!device.readOnly) {
      expect(await failure(device.write(-4096, unit))).toBeInstanceOf(RangeError)
      expect(await failure(device.writeZeroes(0, -1))).toBeInstanceOf(RangeError)
      expect(await failure(device.discard(-1, 4096))).toBeInstanceOf(RangeError)
      expect(await failure(device.resize(-1))).toBeInstanceOf(RangeError)
    }
    expect(await failure(firstExtent(device, { offset: size + 1 }))).toBeInstanceOf(RangeError)
  })

  test('accepts empty requests', async () => {
    await using device = await create(pattern(size))
    const empty = new Uint8Array(0)
    await device.readInto(0, empty)
    await device.readInto(size, empty)
    if (device.readOnly) return
    await device.write(0, empty)
    await device.writeZeroes(0, 0)
    await device.discard(0, 0)
  })

  test('refuses what is no bytes', async () => {
    await using device = await create(pattern(size))
    for (const wrong of ['text', new ArrayBuffer(4096), new DataView(new ArrayBuffer(4096)), new Uint16Array(4096)] as unknown as Uint8Array[]) {
      await expect(device.readInto(0, wrong)).rejects.toThrow(/^bytes must be a Uint8Array/)
      if (!device.readOnly) await expect(device.write(0, wrong)).rejects.toThrow(/^bytes must be a Uint8Array/)
    }
  })

  test('refuses changes when read-only', async () => {
    await using device = await create(pattern(size))
    if (!device.readOnly) return
    for (const call of [device.write(0, allocateAligned(4096)), device.writeZeroes(0, 4096), device.discard(0, 4096)]) {
      expect(await failure(call)).toMatchObject({ code: 'ERR_READ_ONLY' })
    }
    await device.flush()
  })

  test('refuses requests that break its alignment', async () => {
    await using device = await create(pattern(size))
    const { requestAlignment, memoryAlignment } = device.limits
    if (requestAlignment > 1) {
      const buffer = allocateAligned(2 * requestAlignment)
      expect(await failure(device.readInto(1, buffer.subarray(0, requestAlignment)))).toMatchObject({ code: 'ERR_ALIGNMENT' })
      expect(await failure(device.readInto(0, buffer.subarray(0, requestAlignment - 1)))).toMatchObject({ code: 'ERR_ALIGNMENT' })
    }
    if (memoryAlignment > 1) {
      const buffer = allocateAligned(8192)
      expect(await failure(device.readInto(0, buffer.subarray(1, 4097)))).toMatchObject({ code: 'ERR_ALIGNMENT' })
      expect(await failure(device.readInto(0, new Uint8Array(4096)))).toMatchObject({ code: 'ERR_ALIGNMENT' })
    }
  })

  test('an aborted signal rejects with its reason', async () => {
    await using device = await create(pattern(size))
    const reason = new Error('stop')
    const options = { signal: AbortSignal.abort(reason) }
    const buffer = allocateAligned(4096)
    expect(await failure(device.readInto(0, buffer, options))).toBe(reason)
    expect(await failure(firstExtent(device, options))).toBe(reason)
    if (device.readOnly) return
    expect(await failure(device.write(0, buffer, options))).toBe(reason)
    expect(await failure(device.writeZeroes(0, 4096, options))).toBe(reason)
    expect(await failure(device.discard(0, 4096, options))).toBe(reason)
    expect(await failure(device.flush(options))).toBe(reason)
    expect(await failure(device.resize(size, options))).toBe(reason)
  })
}

function lifecycleTests({ create, size }: Context): void {
  test('closes once, and refuses everything afterwards', async () => {
    const device = await create(pattern(size))
    expect(device.closed).toBe(false)
    await Promise.all([device.close(), device.close()])
    await device.close()
    expect(device.closed).toBe(true)
    const buffer = allocateAligned(4096)
    const calls = [
      device.readInto(0, buffer),
      device.write(0, buffer),
      device.writeZeroes(0, 4096),
      device.discard(0, 4096),
      device.flush(),
      device.resize(size),
      firstExtent(device),
    ]
    for (const call of calls) {
      const error = await failure(call)
      expect(Qcow2Error.is(error, 'ERR_CLOSED')).toBe(true)
    }
  })

  test('close waits for requests in flight', async () => {
    const content = pattern(size)
    const device = await create(content)
    const unit = device.limits.requestAlignment
    const skip = unit > 1 ? unit : 3
    const whole = device.read(0, size)
    const others = Array.from({ length: 8 }, (_, index) => device.read(index * skip, size - 16 * skip))
    const zeroes = device.readOnly ? [] : [device.writeZeroes(size - 4096, 4096), device.write(size - 8192, aligned(pattern(4096, 9)), { fua: true })]
    const [bytes] = await Promise.all([whole, device.close(), ...zeroes])
    const untouched = device.readOnly ? size : size - 8192
    expectBytes(bytes.subarray(0, untouched), content.subarray(0, untouched))
    for (const [index, other] of others.entries()) {
      const end = Math.min(untouched, size - 16 * skip + index * skip)
      expectBytes((await other).subarray(0, end - index * skip), content.subarray(index * skip, end))
    }
  })

  test('a read that is aborted rejects with its reason, or is done, and touches its memory no more', async () => {
    const content = pattern(size)
    await using device = await create(content)
    const reason = new Error('stop')
    for (const turns of [0, 1, 2, 5]) {
      const stop = new AbortController()
      const target = allocateAligned(size)
      const reading = device.readInto(0, target, { signal: stop.signal }).then(() => 'done', (error: unknown) => error)
      for (let i = 0; i < turns; i++) await Promise.resolve()
      stop.abort(reason)
      const outcome = await reading
      if (outcome === 'done') expectBytes(target, content)
      else expect(outcome).toBe(reason)
      const now = target.slice()
      await new Promise((resolve) => setImmediate(resolve))
      expectBytes(target, now)
    }
    expectBytes(await readAll(device), content)
  })
}
