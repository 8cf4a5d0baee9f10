/** The experiment behind this library: what unaligned, unqueued requests cost, and what the write queue makes of it. */
import { barChart, type Bar } from '../chart.ts'
import type { GroupResult } from '../harness.ts'
import { hasFio } from '../fio.ts'
import { createGroups, loadGroups } from '../real-file.ts'
import { digits, rate } from '../report.ts'
import type { Figure, Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'
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

/** Bars of one group's medians, every run as a dot. */
export function groupFigure(group: GroupResult): Figure {
  const bars = group.variants.map((variant): Bar => {
    const { median } = variant.seconds
    return {
      label: variant.title,
      value: median,
      text: `${digits(median)} s · ${digits(rate(group.bytes, median))} MB/s`,
      tone: variant.id === 'queue' || variant.id === 'prefetch' || variant.id === 'ours' ? 'new' : variant.id.startsWith('old') ? 'old' : 'peer',
      runs: variant.runs.map((each) => each.seconds),
    }
  })
  const title = `${group.title}: ${digits(group.bytes / 1e6)} MB`
  return { name: group.id, title, svg: barChart({ title, axis: 'seconds, less is better; bar: median, dots: runs', bars }) }
}

export const scenario: Scenario = {
  name: 'aligned-vs-unaligned',
  title: 'Aligned and queued against unaligned and synchronous',
  about:
    'A VM state is a stream of page records of 4104 bytes. QEMU 7.2 and 10.0 write it in pieces of 131,328 bytes at odd offsets, one after another, ' +
    'and read it back in pieces of 28,728: nearly no request begins or ends at a sector. The write queue collects the same pieces into aligned slabs of 1 MiB and keeps four on their way; ' +
    'the prefetcher reads 1 MiB slabs ahead. The stream is a real one with its memory enlarged; the old requests are replayed as recorded from both versions of QEMU.',
  run,
}
