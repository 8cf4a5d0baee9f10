/** Structured fuzz: valid samples of every parser and peer, changed at random, and all that is done with them. What breaks the promise of bounded time and memory and typed errors is a violation. */
import { ClaimingDevice } from './claiming-device.ts'
import { withinBounds, type Outcome } from './cost.ts'
import type { Open, Sample, Target } from './targets.ts'
import { mutated, mutatedJson, randomFrom } from './values.ts'

export interface Violation {
  readonly target: string
  readonly seed: number
  readonly operation: string
  readonly error: unknown
}

export interface Counts extends Record<Outcome, number> {
  runs: number
}

/** Devices on changed bytes of a sample. */
export function openOf({ tail }: Sample, bytes: Uint8Array, size?: number): Open {
  return (options = {}) => new ClaimingDevice(tail === undefined ? [bytes] : [bytes, tail], { size, ...options })
}

/** What a seed makes of a sample. */
export function variantOf(sample: Sample, seed: number): { readonly bytes: Uint8Array; readonly size: number | undefined } {
  const random = randomFrom(seed)
  const size = random(4) === 0 ? 2 ** (33 + random(20)) : undefined
  if (sample.text === true) return { bytes: Buffer.from(mutatedJson(Buffer.from(sample.bytes).toString('utf8'), random)), size }
  return { bytes: mutated(sample.bytes, sample.fields, random), size }
}

/**
 * Runs variants of a target, from `seed` on, until `done` says so.
 * @param running told before each operation
 */
export async function fuzz(
  target: Target,
  options: { readonly seed: number; readonly done: (runs: number) => boolean; readonly found: (violation: Violation) => void; readonly running?: (seed: number, operation: string) => void },
): Promise<Counts> {
  const sample = await target.make()
  const counts: Counts = { runs: 0, result: 0, refused: 0, aborted: 0 }
  let [seed, operation] = [options.seed, '']
  const stray = (error: unknown): void => options.found({ target: target.name, seed, operation: `${operation}, rejection that nobody handles`, error })
  process.on('unhandledRejection', stray)
  try {
    for (; !options.done(counts.runs); seed++) {
      const { bytes, size } = variantOf(sample, seed)
      for (const [name, task] of Object.entries(sample.tasks)) {
        operation = name
        options.running?.(seed, operation)
        try {
          counts[await withinBounds((signal) => task(openOf(sample, bytes, size), signal, bytes))]++
        } catch (error) {
          options.found({ target: target.name, seed, operation, error })
        }
      }
      counts.runs++
    }
    await new Promise((resolve) => setImmediate(resolve))
  } finally {
    process.off('unhandledRejection', stray)
  }
  return counts
}
