/**
 * Charts as plain SVG: bars from zero with the value at the end, and requests over time as in a block
 * trace. Owns shapes, colours and axes; knows nothing of what the figures mean. Every chart stands alone
 * as a file, follows the reader's light or dark setting, and is told apart by shape and words as well as
 * by colour (Okabe and Ito's palette).
 */

/** Text height that stays readable when the chart is as wide as a phone. */
const width = 480
const fontSize = 14
const line = 20
/** From the top of a panel, with its label, to its plot. */
const labelSpace = 30

/** Which of the fixed colours a mark takes. */
export type Tone = 'old' | 'new' | 'peer' | 'plain'

export interface Bar {
  readonly label: string
  readonly value: number
  /** The value as people read it, at the bar's end. */
  readonly text: string
  readonly tone: Tone
  /** Single runs, drawn as dots over the bar. */
  readonly runs?: readonly number[]
}

export interface BarChart {
  readonly title: string
  /** What the length of a bar stands for, with unit and which way is better. */
  readonly axis: string
  readonly bars: readonly Bar[]
}

/** One request: drawn from (start, offset) to (end, offset + length). Milliseconds and bytes. */
export interface Tick {
  readonly operation: 'read' | 'write'
  readonly offset: number
  readonly length: number
  readonly start: number
  readonly end: number
}

export interface TracePanel {
  readonly label: string
  readonly tone: Tone
  readonly ticks: readonly Tick[]
}

export interface TraceChart {
  /** Unique on a page. */
  readonly name: string
  readonly title: string
  /** Panels under each other with the same axes. */
  readonly panels: readonly TracePanel[]
  /** Milliseconds shown. */
  readonly span: number
  /** Bytes shown, from offset 0. */
  readonly reach: number
}

export interface DepthPanel {
  readonly label: string
  readonly tone: Tone
  /** Requests in flight: from each time (ms) on, so many. */
  readonly steps: readonly (readonly [time: number, depth: number])[]
}

/** A bar for each value, from zero, one under the other. */
export function barChart(chart: BarChart): string {
  const top = 2 * line + 14
  const rowHeight = 56
  const longest = Math.max(...chart.bars.flatMap((bar) => [bar.value, ...(bar.runs ?? [])]), Number.MIN_VALUE)
  const textSpace = Math.max(...chart.bars.map((bar) => bar.text.length)) * 8 + 12
  const scale = (width - textSpace - 2) / longest
  const rows = chart.bars.map((bar, n) => {
    const y = top + n * rowHeight
    const dots = (bar.runs ?? []).map((run) => `<circle class="dot" cx="${px(run * scale)}" cy="${y + 30}" r="2.2"/>`)
    const end = Math.max(bar.value, ...(bar.runs ?? [])) * scale
    return [
      `<text class="label" x="0" y="${y + 12}">${escape(bar.label)}</text>`,
      `<rect class="${bar.tone}" x="0" y="${y + 19}" width="${px(Math.max(bar.value * scale, 1))}" height="22"/>`,
      ...dots,
      `<text class="value" x="${px(end + 7)}" y="${y + 35}">${escape(bar.text)}</text>`,
    ].join('')
  })
  const height = top + chart.bars.length * rowHeight - 8
  return svg(chart.title, height, [heading(chart.title, chart.axis), ...rows])
}

/** Offset over time, each request a tick of its length, as in a block trace. */
export function traceChart(chart: TraceChart): string {
  const shown = chart.panels
  const { reach } = chart
  const left = 62
  const plotWidth = width - left - 8
  const plotHeight = 150
  const x = (time: number): number => left + (time / chart.span) * plotWidth
  const parts = [heading(chart.title, 'offset (MB) over time (ms); each stroke is one request, first byte to last')]
  let top = 2 * line + 14
  for (const panel of shown) {
    const bottom = top + labelSpace + plotHeight
    const y = (offset: number): number => bottom - (offset / reach) * plotHeight
    parts.push(`<text class="label" x="0" y="${top + 14}">${escape(panel.label)}</text>`)
    parts.push(axes({ left, bottom, plotWidth, plotHeight, span: chart.span, top: reach / 1e6, unit: (value) => round(value) }))
    const clip = `clip${chart.panels.indexOf(panel)}-${chart.name}`
    parts.push(`<clipPath id="${clip}"><rect x="${left}" y="${bottom - plotHeight - 3}" width="${plotWidth}" height="${plotHeight + 6}"/></clipPath>`)
    const marks = panel.ticks.map((tick, n) => tickMark(tick, `${panel.tone}${n % 2 === 0 ? '' : ' pale'}`, x, y))
    parts.push(`<g clip-path="url(#${clip})">${marks.join('')}</g>`)
    top = bottom + 36
  }
  if (shown.some((panel) => panel.ticks.some(isMark))) parts.push(legend(top))
  return svg(chart.title, top + 18, parts)
}

/** Requests in flight over time, as steps. */
export function depthChart(chart: { title: string; panels: readonly DepthPanel[]; span: number }): string {
  const left = 62
  const plotWidth = width - left - 8
  const plotHeight = 80
  const deepest = Math.max(...chart.panels.flatMap((panel) => panel.steps.map(([, depth]) => depth)), 1)
  const x = (time: number): number => left + (Math.min(time, chart.span) / chart.span) * plotWidth
  const parts = [heading(chart.title, 'requests in the disk’s queue over time (ms)')]
  let top = 2 * line + 14
  for (const panel of chart.panels) {
    const bottom = top + labelSpace + plotHeight
    const y = (depth: number): number => bottom - (depth / deepest) * plotHeight
    parts.push(`<text class="label" x="0" y="${top + 14}">${escape(panel.label)}</text>`)
    const steps = panel.steps.filter(([time]) => time < chart.span)
    let path = `M${px(x(0))} ${px(y(0))}`
    for (const [time, depth] of steps) path += `H${px(x(time))}V${px(y(depth))}`
    parts.push(`<path class="area ${panel.tone}" d="${path}H${px(x(chart.span))}V${px(y(0))}Z"/>`)
    parts.push(axes({ left, bottom, plotWidth, plotHeight, span: chart.span, top: deepest, unit: (value) => String(value), whole: true }))
    top = bottom + 36
  }
  return svg(chart.title, top - 6, parts)
}

/** A request far smaller than a pixel is a dot. */
const isMark = (tick: Tick): boolean => tick.operation === 'read' && tick.length <= 4096

function tickMark(tick: Tick, tone: string, x: (time: number) => number, y: (offset: number) => number): string {
  const [x1, x2, y1, y2] = [x(tick.start), x(tick.end), y(tick.offset), y(tick.offset + tick.length)]
  if (isMark(tick)) return `<circle class="read" cx="${px(x1)}" cy="${px(y1)}" r="2.4"/>`
  return `<line class="stroke ${tone}" x1="${px(x1)}" y1="${px(y1)}" x2="${px(Math.max(x2, x1 + 1))}" y2="${px(Math.min(y2, y1 - 1))}"/>`
}

interface Axes {
  readonly left: number
  readonly bottom: number
  readonly plotWidth: number
  readonly plotHeight: number
  readonly span: number
  readonly top: number
  readonly unit: (value: number) => string
  readonly whole?: boolean
}

function axes({ left, bottom, plotWidth, plotHeight, span, top, unit, whole }: Axes): string {
  const parts = [`<path class="axis" d="M${left} ${bottom - plotHeight}V${bottom}H${left + plotWidth}"/>`]
  for (const value of niceSteps(span, 5)) {
    const at = left + (value / span) * plotWidth
    parts.push(`<text class="scale middle" x="${px(at)}" y="${bottom + 17}">${round(value)}</text>`)
  }
  for (const value of niceSteps(top, whole === true ? Math.min(top, 4) : 4)) {
    const at = bottom - (value / top) * plotHeight
    if (value > 0) parts.push(`<line class="grid" x1="${left}" x2="${left + plotWidth}" y1="${px(at)}" y2="${px(at)}"/>`)
    parts.push(`<text class="scale end" x="${left - 7}" y="${px(at + 5)}">${escape(unit(value))}</text>`)
  }
  return parts.join('')
}

/** Round values from 0 to `end`, about `count` of them. */
export function niceSteps(end: number, count: number): number[] {
  const rough = end / Math.max(count, 1)
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999) ?? rough
  const values: number[] = []
  for (let n = 0; n * step <= end * 1.0001; n++) values.push(n * step)
  return values
}

function legend(top: number): string {
  return [
    `<line class="stroke old" x1="2" x2="14" y1="${top + 6}" y2="${top - 6}"/><line class="stroke old pale" x1="14" x2="26" y1="${top + 6}" y2="${top - 6}"/>`,
    `<text class="scale" x="34" y="${top + 5}">write</text>`,
    `<circle class="read" cx="96" cy="${top}" r="3.2"/><text class="scale" x="108" y="${top + 5}">read of one sector</text>`,
  ].join('')
}

function heading(title: string, axis: string): string {
  return `<text class="title" x="0" y="16">${escape(title)}</text><text class="scale" x="0" y="${16 + line}">${escape(axis)}</text>`
}

const style = `
.chart{font:${fontSize}px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--old:#d55e00;--new:#0072b2;--peer:#8a8f98;--read:#b3327a;--ground:#fff}
@media (prefers-color-scheme:dark){.chart{--ink:#e6edf3;--soft:#9da7b3;--line:#3d444d;--old:#ff8f3f;--new:#56b4e9;--peer:#8b949e;--read:#f08bc3;--ground:#0d1117}}
.chart text{fill:var(--ink)}.chart .title{font-weight:600;font-size:15px}.chart .scale{fill:var(--soft);font-size:12px}
.chart .value{font-weight:600}.chart .middle{text-anchor:middle}.chart .end{text-anchor:end}
.chart .old{fill:var(--old);stroke:var(--old)}.chart .new{fill:var(--new);stroke:var(--new)}.chart .peer,.chart .plain{fill:var(--peer);stroke:var(--peer)}
.chart rect,.chart .area{stroke-width:0}.chart .stroke{stroke-width:3}.chart .pale{stroke-opacity:.5}.chart .read{fill:var(--read)}
.chart .dot{fill:var(--ground);stroke:var(--ink);stroke-width:1}.chart .area{opacity:.75}
.chart .axis{stroke:var(--soft);fill:none}.chart .grid{stroke:var(--line)}`

function svg(title: string, height: number, parts: readonly string[]): string {
  return `<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 ${width} ${Math.ceil(height)}" role="img" aria-label="${escape(title)}"><style>${style}</style><rect width="100%" height="100%" fill="var(--ground)"/>${parts.join('\n')}</svg>\n`
}

function px(value: number): string {
  return value.toFixed(1)
}

function round(value: number): string {
  return String(Number(value.toPrecision(3)))
}

/** Text safe within SVG and HTML. */
export function escape(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;')
}
