/** The page of stored results in the documentation is made from the stored results. */
import { readFileSync } from 'node:fs'
import { resolve } from 'node:path'
import { expect, test } from 'vitest'
import { resultsPage } from '../../bench/markdown.ts'
import { storedResults } from '../../bench/stored.ts'

const docs = resolve(import.meta.dirname, '../../docs')

test('docs/results.md shows what is stored; `npx tsx bench/write-results.ts` writes it anew', () => {
  const reports = storedResults(resolve(docs, 'results'))
  expect(reports.length).toBeGreaterThan(0)
  expect(readFileSync(resolve(docs, 'results.md'), 'utf8')).toBe(resultsPage(reports))
})

test('stored results are of whole runs', () => {
  for (const { name, quick, groups } of storedResults(resolve(docs, 'results'))) {
    expect({ name, quick }).toEqual({ name, quick: false })
    expect(groups.length).toBeGreaterThan(0)
  }
})
