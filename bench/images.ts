/** Draws the pictures of the docs that come from the simulated disk: `npx tsx bench/images.ts`. */
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Figure } from './scenario.ts'
import { simulatedFigures, simulatedGroups } from './simulated.ts'
import type { GroupResult } from './harness.ts'
import { capturedVmState, enlargedVmState, qemuWriteLengths } from './vm-state.ts'

/** What the docs quote and show: 256 MiB of memory more than the captured guest has. */
export async function documented(): Promise<{ groups: GroupResult[]; figures: Figure[] }> {
  const lengths = qemuWriteLengths(enlargedVmState(capturedVmState(), 256 << 20))
  const groups = await simulatedGroups(lengths, { rounds: 1, warmup: 0, seed: 1 })
  return { groups, figures: await simulatedFigures(lengths, groups) }
}

export const imageFolder: string = join(import.meta.dirname, '../docs/images')

if (process.argv[1] === import.meta.filename) {
  mkdirSync(imageFolder, { recursive: true })
  const { figures } = await documented()
  for (const figure of figures) writeFileSync(join(imageFolder, `${figure.name}.svg`), figure.svg)
}
