/** A repair never makes data worse: what the guest could read of a damaged or truncated image it can read afterwards. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { Qcow2Error } from '../../src/core/errors.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { repairImage } from '../../src/qcow2/repair.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { damage, damages, makeImages } from './damaged-images.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 5000 : 60
const piece = 512

/** The active disk, 512 bytes each; undefined for what cannot be read. Empty if the image does not open. */
async function contentOf(bytes: Uint8Array): Promise<(string | undefined)[]> {
  try {
    await using image = await Qcow2Image.open(new MemoryDevice(bytes, { readOnly: true }), { readOnly: true })
    const pieces: (string | undefined)[] = []
    const end = Math.min(image.size, 8 << 20)
    for (let at = 0; at < end; at += 1 << 16) {
      const all = await image.read(at, Math.min(1 << 16, end - at)).catch(() => undefined)
      for (let from = at; from < Math.min(end, at + (1 << 16)); from += piece) {
        const part = all === undefined ? await image.read(from, piece).catch(() => undefined) : all.subarray(from - at, from - at + piece)
        pieces.push(part === undefined ? undefined : Buffer.from(part).toString('latin1'))
      }
    }
    return pieces
  } catch (error) {
    if (Qcow2Error.is(error)) return []
    throw error
  }
}

/** Pieces that could be read before, and now read otherwise or not at all. */
function worse(before: readonly (string | undefined)[], after: readonly (string | undefined)[]): number[] {
  return [...before.keys()].filter((index) => before[index] !== undefined && before[index] !== after[index])
}

describeWithQemu('content after a repair', (qemu: Qemu) => {
  const folder = mkdtempSync(join(tmpdir(), 'qcow2-repair-'))
  let images = new Map<string, Uint8Array>()
  beforeAll(async () => {
    images = await makeImages(qemu, folder)
  }, 60_000)
  afterAll(() => rmSync(folder, { recursive: true, force: true }))

  const cut = fc.oneof(fc.constant(undefined), fc.double({ min: 0.02, max: 1, noNaN: true }))

  test.each(['leaks', 'all'] as const)('is what could be read before it (%s), of damaged and truncated images', async (repair) => {
    let repaired = 0
    await fc.assert(
      fc.asyncProperty(fc.nat(), damages, cut, async (which, list, length) => {
        const whole = damage([...images.values()][which % images.size]!, list)
        const bytes = length === undefined ? whole : whole.subarray(0, Math.ceil(whole.length * length))
        const before = await contentOf(bytes)
        const device = new MemoryDevice(bytes.slice(), { growable: true })
        const report = await repairImage(device, { repair }).catch((error: unknown) => {
          if (!Qcow2Error.is(error)) throw error
          return undefined
        })
        const after = await contentOf(await device.read(0, device.size))
        if (report !== undefined && report.corruptionsFixed + report.leaksFixed > 0) repaired++
        const changed = worse(before, after)
        if (changed.length === 0) return
        // a counter or flag that was repaired can bring an entry to light that contradicts another: then QEMU's repair does it, too
        const path = join(folder, 'theirs.qcow2')
        writeFileSync(path, bytes)
        await qemu.img('check', '-r', repair, path)
        const theirs = await contentOf(readFileSync(path))
        expect(changed.filter((index) => theirs[index] === before[index]), 'pieces that QEMU keeps').toEqual([])
      }),
      { numRuns },
    )
    expect(repaired).toBeGreaterThan(numRuns / 10)
  }, 600_000)
})
