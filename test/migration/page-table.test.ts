/** The table of a RAM block's pages equals a plain array, and takes no memory for long runs. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { PageTable } from '../../src/migration/page-table.ts'

const pages = 10_000

test('pages set one by one and in runs, in any order', () => {
  const page = fc.oneof(fc.nat(pages), fc.constantFrom(0, 1024, 2048, 9216, pages))
  const change = fc.record({ kind: fc.constantFrom('set', 'range', 'all'), a: page, b: page, entry: fc.constantFrom(0, 1, 4096, -3) })
  fc.assert(fc.property(fc.array(change, { maxLength: 12 }), (changes) => {
    const table = new PageTable(pages)
    const model = new Array<number>(pages).fill(0)
    for (const { kind, a, b, entry } of changes) {
      if (kind === 'all') {
        table.fill(entry)
        model.fill(entry)
      } else if (kind === 'range') {
        table.fillRange(Math.min(a, b), Math.max(a, b), entry)
        model.fill(entry, Math.min(a, b), Math.max(a, b))
      } else if (a < pages) {
        table.set(a, entry)
        model[a] = entry
      }
    }
    const found: number[] = []
    table.forEachRun((entry, count) => found.push(...new Array<number>(count).fill(entry)))
    expect(found).toEqual(model)
    expect(model.every((entry, at) => table.get(at) === entry)).toBe(true)
  }), { numRuns: 200 })
})

test('runs of a block of 2^42 bytes', () => {
  const table = new PageTable(2 ** 30)
  table.fill(1)
  table.set(7, 4096)
  for (let from = 5000; from < 2 ** 30; from += 2 ** 27) table.fillRange(from, from + 2 ** 26, 0)
  expect(table.segments).toBeLessThan(20)
  expect([table.get(7), table.get(4999), table.get(6000), table.get(5000 + 2 ** 26)]).toEqual([4096, 1, 0, 1])
})
