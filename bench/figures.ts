/** Drawings of measured groups. */
import { barChart, type Bar, type Tone } from './chart.ts'
import type { GroupResult } from './harness.ts'
import { digits, rate } from './report.ts'
import type { Figure } from './scenario.ts'

/** Ours and the old way get a colour of their own; what stands beside them is grey. */
function toneOf(id: string): Tone {
  if (['queue', 'prefetch', 'ours'].includes(id)) return 'new'
  return /^(old|qemu-)/.test(id) ? 'old' : 'peer'
}

/** Bars of one group's medians, every run as a dot. */
export function groupFigure(group: GroupResult): Figure {
  const bars = group.variants.map((variant): Bar => {
    const { median } = variant.seconds
    const text = group.bytes === 0 ? `${digits(median)} s` : `${digits(median)} s · ${digits(rate(group.bytes, median))} MB/s`
    return { label: variant.title, value: median, text, tone: toneOf(variant.id), runs: variant.runs.map((each) => each.seconds) }
  })
  const title = group.bytes === 0 ? group.title : `${group.title}: ${digits(group.bytes / 1e6)} MB`
  return { name: group.id, title, svg: barChart({ title, axis: 'seconds, less is better; bar: median, dots: runs', bars }) }
}
