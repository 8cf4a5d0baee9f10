/** The quick mode of the fuzz (`npm run fuzz` goes on for longer). */
import { expect, test } from 'vitest'
import { fuzz, type Violation } from './fuzz.ts'
import { targets } from './targets.ts'

const long = process.env['QCOW2_LONG'] === '1'
/** Milliseconds for each target. */
const time = long ? 120_000 : 1000
const leastRuns = 5

test.each(targets)('$name', async (target) => {
  const violations: Violation[] = []
  const seed = Number(process.env['FAST_CHECK_SEED'] ?? (process.env['CI'] === undefined ? Date.now() % 2 ** 31 : 20))
  const end = performance.now() + time
  const done = (count: number): boolean => count >= leastRuns && performance.now() > end
  const counts = await fuzz(target, { seed, done, found: (violation) => violations.push(violation) })
  expect(violations).toEqual([])
  expect(counts.runs).toBeGreaterThanOrEqual(leastRuns)
}, 600_000)
