/** The experiment behind this library: what unaligned, unqueued requests cost, and what the write queue makes of it. */
import { groupFigure } from '../figures.ts'
import { hasFio } from '../fio.ts'
import { createGroups, loadGroups } from '../real-file.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'
import { simulatedFigures, simulatedGroups } from '../simulated.ts'
import { capturedVmState, enlargedVmState, qemuWriteLengths } from '../vm-state.ts'

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const size = context.size ?? (context.quick ? 4 : 256)
  const bytes = enlargedVmState(capturedVmState(), size << 20)
  const lengths = qemuWriteLengths(bytes)
  const simulated = await simulatedGroups(lengths, context)
  const create = await createGroups({ bytes, lengths }, context)
  const load = await loadGroups({ bytes, lengths }, context)
  return {
    groups: [...simulated, ...create, ...load],
    figures: [...(await simulatedFigures(lengths, simulated)), ...[create[0]!, create[1]!, load[0]!].map(groupFigure)],
    notes: hasFio ? [] : ['fio is not installed: what this disk can do at its best was not measured.'],
  }
}

export const scenario: Scenario = {
  name: 'aligned-vs-unaligned',
  title: 'Aligned and queued against unaligned and synchronous',
  about:
    'A VM state is a stream of page records of 4104 bytes. QEMU 7.2 and 10.0 write it in pieces of 131,328 bytes at odd offsets, one after another, ' +
    'and read it back in pieces of 28,728: nearly no request begins or ends at a sector. The write queue collects the same pieces into aligned slabs of 1 MiB and keeps four on their way; ' +
    'the prefetcher reads chunks of 1 MiB ahead. The stream is a real one with its memory enlarged; the old requests are replayed as recorded from both versions of QEMU.',
  run,
}
