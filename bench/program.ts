/** The built program, to be timed from its start as a user runs it. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { timed } from './timed.ts'
import type { Variant } from './harness.ts'

const program = join(import.meta.dirname, '../dist/cli.cjs')

/** Without it (`npm run build`) the whole process cannot be measured. */
export const isBuilt: boolean = existsSync(program)

/** Said where it is missing. */
export const notBuilt = 'dist/cli.cjs is missing: run `npm run build` to measure the whole process too.'

/** A variant that runs the program; none where it is not built. */
export function programVariant(args: readonly string[], hooks: Pick<Variant, 'prepare' | 'finish'> = {}): Variant[] {
  if (!isBuilt) return []
  return [{ id: 'program', title: 'this library, the program from its start', ...hooks, run: () => timed(process.execPath, [program, ...args]) }]
}
