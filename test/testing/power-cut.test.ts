import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { fault, MemoryDevice, record, Recording } from '../../src/block.ts'
import { powerCut, sectorSize } from '../../src/testing/power-cut.ts'
import { blockDeviceSuite, pattern } from '../suites/block-device.ts'
import { expectBytes } from '../support/bytes.ts'

blockDeviceSuite('record', (content) => record(new MemoryDevice(content, { growable: true }), new Recording()))

const filled = (length: number, value: number): Uint8Array => new Uint8Array(length).fill(value)

describe('powerCut', () => {
  test('everything arrived: the device itself', async () => {
    const change = fc.record({
      kind: fc.constantFrom('write', 'zero', 'discard', 'resize', 'flush'),
      offset: fc.nat(5000),
      length: fc.nat(3000),
    })
    await fc.assert(
      fc.asyncProperty(fc.array(change), async (changes) => {
        const before = pattern(4096)
        const memory = new MemoryDevice(before.slice(), { growable: true })
        const recording = new Recording()
        const device = record(memory, recording)
        for (const [index, { kind, offset, length }] of changes.entries()) {
          if (kind === 'write') await device.write(offset, pattern(length, index))
          else if (kind === 'zero') await device.writeZeroes(offset, length)
          else if (kind === 'discard') await device.discard(Math.min(offset, device.size), Math.max(0, Math.min(length, device.size - offset)))
          else if (kind === 'resize') await device.resize(length)
          else await device.flush()
        }
        expectBytes(powerCut(before, recording), memory.bytes)
        expectBytes(powerCut(before, recording, { at: 0 }), before)
      }),
    )
  })

  test('only what completed before a completed flush was asked for must have arrived', async () => {
    let proceed!: () => void
    const until = new Promise<void>((resolve) => (proceed = resolve))
    const recording = new Recording()
    const slow = fault(new MemoryDevice(4 * sectorSize), ({ index }) => (index === 1 ? { kind: 'delay', until } : undefined))
    const device = record(slow, recording)
    await device.write(0, filled(sectorSize, 1))
    const late = device.write(sectorSize, filled(sectorSize, 2))
    await device.flush()
    const flushed = recording.events
    await device.write(2 * sectorSize, filled(sectorSize, 3))
    proceed()
    await late
    const before = filled(4 * sectorSize, 0)
    const lost = { survives: () => false }
    const firstBytes = (bytes: Uint8Array): number[] => [0, 1, 2, 3].map((sector) => bytes[sector * sectorSize]!)
    expect(firstBytes(powerCut(before, recording, lost))).toEqual([1, 0, 0, 0])
    expect(firstBytes(powerCut(before, recording, { ...lost, at: flushed - 1 }))).toEqual([0, 0, 0, 0])
    expect(firstBytes(powerCut(before, recording, { at: flushed }))).toEqual([1, 2, 0, 0])
    expect(firstBytes(powerCut(before, recording))).toEqual([1, 2, 3, 0])
  })

  test('tears at sectors of the disk, not of the request', async () => {
    const recording = new Recording()
    const device = record(new MemoryDevice(2048), recording)
    await device.write(100, filled(1000, 7))
    const torn = powerCut(new Uint8Array(2048), recording, { survives: (_request, sector) => sector === 1 })
    const expected = new Uint8Array(2048)
    expected.fill(7, 512, 1024)
    expectBytes(torn, expected)
  })

  test('a failed request may have arrived, but is never durable', async () => {
    const recording = new Recording()
    const device = record(fault(new MemoryDevice(512), ({ index }) => (index === 0 ? { kind: 'fail' } : undefined)), recording)
    await expect(device.write(0, filled(512, 9))).rejects.toMatchObject({ code: 'ERR_IO' })
    await device.flush()
    const before = new Uint8Array(512)
    expectBytes(powerCut(before, recording, { survives: () => false }), before)
    expectBytes(powerCut(before, recording), filled(512, 9))
  })
})
