/**
 * Property tests: CI repeats one set of runs, so that a red build means that the change is wrong;
 * everywhere else each run looks somewhere new. `FAST_CHECK_SEED=n` repeats a run of one's own.
 */
import fc from 'fast-check'

const seed = process.env['FAST_CHECK_SEED'] ?? (process.env['CI'] === undefined ? undefined : '20')
if (seed !== undefined) fc.configureGlobal({ seed: Number(seed) })
