/** A request that fails at any moment is an error for the caller, and leaves an image with nothing worse than leaks. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import type { FaultPlan } from '../../src/block.ts'
import { imageOperations, imageParameters } from '../../src/testing.ts'
import { expectSound, recordWithFaults } from './crash.ts'

const long = process.env['QCOW2_LONG'] === '1'
const KiB = 1024

/** Fails requests that change the device, from the given one on: that one only, or all that follow. */
function failing(from: number, kind: 'fail' | 'tear', forever: boolean): FaultPlan {
  let changes = 0
  return ({ operation, length }) => {
    if (operation === 'read') return undefined
    const index = changes++
    if (index < from || (index > from && !forever)) return undefined
    return kind === 'tear' ? { kind, length: Math.floor(length / 1024) * 512 } : { kind }
  }
}

test('any operations, any failing request', { timeout: long ? 1_800_000 : 60_000 }, async () => {
  await fc.assert(
    fc.asyncProperty(
      imageParameters({ backing: false, maxSize: 256 * KiB, clusterSizes: [512, 4096, 16_384, 65_536] }),
      imageOperations({ maxSize: 256 * KiB, maxLength: 6 }),
      imageOperations({ maxSize: 256 * KiB, maxLength: 8 }),
      fc.nat(60),
      fc.constantFrom('fail' as const, 'tear' as const),
      fc.boolean(),
      async (parameters, setup, operations, from, kind, forever) => {
        let hits = 0
        const plan = failing(from, kind, forever)
        const { run, file, failure } = await recordWithFaults(parameters, setup, operations, (request) => {
          const wrong = plan(request)
          if (wrong !== undefined) hits++
          return wrong
        })
        expect(failure !== undefined, 'the failure reaches the caller').toBe(hits > 0)
        await expectSound(run, run.recording.events, file)
      },
    ),
    { numRuns: long ? 5000 : 200 },
  )
})
