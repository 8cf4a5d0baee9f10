/** The harness: every variant once a round, in changing order; statistics; ratios from neighbours in time. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { measure, summarize, type Variant } from '../../bench/harness.ts'

const silent = { rounds: 6, warmup: 1, seed: 7 }

function logging(log: string[], ids: readonly string[]): Variant[] {
  return ids.map((id, n) => ({
    id,
    title: id,
    prepare: () => void log.push(`prepare ${id}`),
    run: () => {
      log.push(id)
      return { seconds: n + 1 }
    },
    finish: () => void log.push(`finish ${id}`),
  }))
}

describe('measure', () => {
  test('runs each variant once a round, prepared and finished, in an order that changes and repeats with the seed', async () => {
    const order = async (): Promise<string[]> => {
      const log: string[] = []
      const result = await measure({ id: 'g', title: 'G', bytes: 1, variants: logging(log, ['a', 'b', 'c']) }, silent)
      expect(result.variants.map((variant) => variant.runs.map((run) => run.round))).toEqual(Array(3).fill([0, 1, 2, 3, 4, 5]))
      return log
    }
    const log = await order()
    expect(await order()).toEqual(log)
    expect(log).toHaveLength(7 * 3 * 3)
    const rounds = Array.from({ length: 7 }, (_, round) => log.slice(round * 9, round * 9 + 9))
    for (const round of rounds) {
      expect([round[1], round[4], round[7]].sort()).toEqual(['a', 'b', 'c'])
      for (const at of [0, 3, 6]) expect([round[at], round[at + 2]]).toEqual([`prepare ${round[at + 1]}`, `finish ${round[at + 1]}`])
    }
    expect(new Set(rounds.map((round) => `${round[1]}${round[4]}${round[7]}`)).size).toBeGreaterThan(1)
  })

  test('a ratio is the median over rounds of slow by fast', async () => {
    const slow = [10, 20, 30, 40, 50]
    const fast = [10, 5, 3, 20, 10]
    let round = 0
    const variants: Variant[] = [
      { id: 'slow', title: 'slow', run: () => ({ seconds: slow[Math.floor(round++ / 2)]! }) },
      { id: 'fast', title: 'fast', run: () => ({ seconds: fast[Math.floor(round++ / 2)]! }) },
    ]
    const result = await measure({ id: 'g', title: 'G', bytes: 1, variants, ratios: [{ fast: 'fast', slow: 'slow', goal: 4 }] }, { rounds: 5, warmup: 0, seed: 1 })
    expect(result.ratios[0]).toMatchObject({ perRound: [1, 4, 10, 2, 5], median: 4, q1: 2, q3: 5, goal: 4 })
  })

  test('virtual time is measured once; an unknown variant in a ratio is a mistake', async () => {
    const log: string[] = []
    const result = await measure({ id: 'g', title: 'G', bytes: 1, clock: 'virtual', variants: logging(log, ['a']) }, silent)
    expect(result.variants[0]!.runs).toHaveLength(1)
    await expect(measure({ id: 'g', title: 'G', bytes: 1, variants: logging([], ['a']), ratios: [{ fast: 'a', slow: 'z' }] }, silent)).rejects.toThrow('no variant z')
  })
})

test('quartiles stay within the values and in order', () => {
  expect(summarize([4, 1, 3, 2])).toEqual({ q1: 1.75, median: 2.5, q3: 3.25 })
  fc.assert(
    fc.property(fc.array(fc.double({ min: 0, max: 1e6, noNaN: true }), { minLength: 1 }), (values) => {
      const { q1, median, q3 } = summarize(values)
      expect(Math.min(...values)).toBeLessThanOrEqual(q1)
      expect(q1).toBeLessThanOrEqual(median)
      expect(median).toBeLessThanOrEqual(q3)
      expect(q3).toBeLessThanOrEqual(Math.max(...values))
    }),
  )
})
