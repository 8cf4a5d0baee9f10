/** Every length, count and offset of every structure that is read, at its extremes, in files as they are and in sparse ones: a result or a typed error, in bounded time and memory, and the event loop turns. */
import { describe, expect, test } from 'vitest'
import { withinBounds, type Outcome } from './cost.ts'
import { openOf } from './fuzz.ts'
import { targets, type Sample } from './targets.ts'
import { claimedJson, extremes, randomFrom, withField } from './values.ts'

const long = process.env['QCOW2_LONG'] === '1'

/** Milliseconds for each sample: as many of its variants as that allows, in an order by chance. */
const quick = 1500
const leastVariants = 5

type Variant = readonly [name: string, change: () => Uint8Array, size: number | undefined]

/** Each value of each field, in a file that is as long as it was and in one with a hole up to 1 PiB. */
function variantsOf({ bytes, tail, fields, text }: Sample): Variant[] {
  const json = text === true ? [...claimedJson(Buffer.from(bytes).toString('utf8'))] : []
  const length = bytes.length + (tail?.length ?? 0)
  return [
    ...json.map((changed): Variant => [changed, () => Buffer.from(changed), undefined]),
    ...fields.flatMap((field) => extremes(field.bytes, length).flatMap((value) => [undefined, 2 ** 50].map((size): Variant => {
      return [`${field.name} = ${value}, file of ${size ?? length} bytes`, () => withField(bytes, field, value), size]
    }))),
  ]
}

function shuffled<T>(list: T[]): T[] {
  const random = randomFrom(Number(process.env['FAST_CHECK_SEED'] ?? (process.env['CI'] === undefined ? Date.now() % 2 ** 31 : 20)))
  for (let i = list.length - 1; i > 0; i--) {
    const other = random(i + 1)
    ;[list[i], list[other]] = [list[other]!, list[i]!]
  }
  return list
}

describe.each(targets)('$name', (target) => {
  test('the valid sample gives results', async () => {
    const sample = await target.make()
    for (const [name, task] of Object.entries(sample.tasks)) {
      const outcome = await withinBounds((signal) => task(openOf(sample, sample.bytes), signal, sample.bytes))
      // a disk image is no saved VM
      if (name !== 'saved VM') expect([name, outcome]).toEqual([name, 'result'])
    }
  })

  test('claims', async () => {
    const sample = await target.make()
    const outcomes: Record<Outcome, number> = { result: 0, refused: 0, aborted: 0 }
    const violations: string[] = []
    const start = performance.now()
    let count = 0
    for (const [name, change, size] of long ? variantsOf(sample) : shuffled(variantsOf(sample))) {
      if (!long && count++ >= leastVariants && performance.now() - start > quick) break
      const bytes = change()
      for (const [operation, task] of Object.entries(sample.tasks)) {
        try {
          outcomes[await withinBounds((signal) => task(openOf(sample, bytes, size), signal, bytes))]++
        } catch (error) {
          violations.push(`${operation}, ${name}: ${error instanceof Error ? error.stack?.split('\n').slice(0, 4).join(' | ') : String(error)}`)
        }
      }
    }
    expect(violations).toEqual([])
    expect(outcomes.refused + outcomes.result).toBeGreaterThan(0)
  }, long ? 3_600_000 : 180_000)
})
