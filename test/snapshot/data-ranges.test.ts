/** Which parts of a RAM block are sent: all that may hold something, in aligned pieces, each once. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { extent, type Extent } from '../../src/block/device.ts'
import { NullDevice } from '../../src/block/null.ts'
import { dataRanges } from '../../src/snapshot/data-ranges.ts'

/** A device of which only the map matters. */
class Mapped extends NullDevice {
  readonly #kinds: readonly ('data' | 'zero' | 'absent')[]

  constructor(kinds: readonly ('data' | 'zero' | 'absent')[]) {
    super(kinds.length * 4096)
    this.#kinds = kinds
  }

  // eslint-disable-next-line @typescript-eslint/require-await
  protected override async *onMap(): AsyncGenerator<Extent, void, undefined> {
    for (const [page, kind] of this.#kinds.entries()) {
      const data = kind === 'data'
      yield extent({ start: page * 4096, length: 4096, depth: 0, present: kind !== 'absent', zero: !data, data, compressed: false })
    }
  }
}

test('cover every page with data, aligned, in order, disjoint, at most so long', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.constantFrom('data' as const, 'zero' as const, 'absent' as const), { minLength: 1, maxLength: 200 }),
      fc.constantFrom(1, 2, 16),
      fc.constantFrom(1, 2, 5),
      async (kinds, alignPages, pieces) => {
        const align = alignPages * 4096
        const device = new Mapped(kinds)
        const covered = new Set<number>()
        let end = 0
        for await (const { offset, length } of dataRanges(device, align, align * pieces)) {
          expect(offset).toBeGreaterThanOrEqual(end)
          expect(offset % align).toBe(0)
          expect(length).toBeLessThanOrEqual(align * pieces)
          end = offset + length
          expect(end % align === 0 || end === device.size).toBe(true)
          for (let page = offset / 4096; page < end / 4096; page++) covered.add(page)
        }
        kinds.forEach((kind, page) => {
          if (kind === 'data') expect(covered.has(page)).toBe(true)
        })
        for (const page of covered) {
          const first = page - (page % alignPages)
          expect(kinds.slice(first, first + alignPages)).toContain('data')
        }
      },
    ),
    { numRuns: process.env['QCOW2_LONG'] === '1' ? 2000 : 100 },
  )
})
