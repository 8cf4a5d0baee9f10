/** The experiment on the simulated disk gives, anywhere, the figures and pictures of docs/experiment.md. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { documented, imageFolder } from '../../bench/images.ts'
import { disk15k, mediaRate } from '../../src/block.ts'

const { groups, figures } = await documented()

function rate(group: string, variant: string): number {
  const found = groups.find(({ id }) => id === group)!
  return found.bytes / found.variants.find(({ id }) => id === variant)!.seconds.median / 1e6
}

/** The numbers in the last columns of the tables of a page, row by row. */
function figuresOf(page: string): number[] {
  const rows = readFileSync(join(import.meta.dirname, '../../docs', page), 'utf8').split('\n').filter((line) => /^\|.*\d+(\.\d+)?\**\s*\|$/.test(line))
  return rows.flatMap((row) => row.split('|').slice(2, -1).map((cell) => Number(cell.replaceAll('*', ''))))
}

describe('the old pattern and the new', () => {
  test('26.9 MB/s of 150, and at least 99 % of the media rate', () => {
    expect(rate('simulated-create', 'old')).toBeCloseTo(26.9, 1)
    const media = mediaRate(disk15k) / 1e6
    for (const variant of ['queue', 'queue-64k']) expect(rate('simulated-create', variant) / media).toBeGreaterThan(0.99)
    for (const variant of ['prefetch', 'prefetch-plain']) expect(rate('simulated-load', variant) / media).toBeGreaterThan(0.99)
  })

  test('alignment without a queue is no cure', () => {
    expect(rate('simulated-create', 'sync-64k')).toBeLessThan(rate('simulated-create', 'old'))
  })
})

test('docs/experiment.md quotes these figures', () => {
  const create = ['old', 'old-stream', 'old-fresh', 'sync-64k', 'sync-1m', 'queue-64k', 'queue'].map((id) => rate('simulated-create', id))
  const load = ['old', 'old-slow-host', 'old-plain', 'prefetch'].map((id) => rate('simulated-load', id))
  const speeds = [5400, 7200, 10_000, 15_000].flatMap((rpm) => [rate('simulated-rpm', `old-${rpm}`), rate('simulated-rpm', `queue-${rpm}`)])
  const quoted = figuresOf('experiment.md')
  expect(quoted).toEqual([...create, ...load, ...speeds].map((value) => Number(value.toFixed(1))))
})

test('docs/images shows them (npx tsx bench/images.ts draws them anew)', () => {
  for (const figure of figures) expect(readFileSync(join(imageFolder, `${figure.name}.svg`), 'utf8'), figure.name).toBe(figure.svg)
})
