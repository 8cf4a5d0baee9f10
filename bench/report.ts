/**
 * Results as a text table, as JSON with every run, and as one HTML page that needs nothing else. Owns
 * presentation; computes nothing but rates.
 */
import { escape } from './chart.ts'
import type { GroupResult, RatioResult, Summary, VariantResult } from './harness.ts'
import type { Report } from './scenario.ts'

/** MB/s (1 MB = 1e6 bytes) of `bytes` in `seconds`. */
export function rate(bytes: number, seconds: number): number {
  return bytes / seconds / 1e6
}

/** Three significant digits, never an exponent. */
export function digits(value: number): string {
  if (value >= 100) return value.toFixed(0)
  if (value >= 10) return value.toFixed(1)
  return value.toFixed(value >= 0.1 ? 2 : 3)
}

function range(summary: Summary, shown: (value: number) => string): string {
  const [from, to] = [shown(summary.q1), shown(summary.q3)].sort((a, b) => Number(a) - Number(b))
  return `${from}–${to}`
}

function goalText(ratio: RatioResult): string {
  if (ratio.goal === undefined) return ''
  return ratio.median >= ratio.goal ? `goal ${ratio.goal}x met` : `goal ${ratio.goal}x MISSED`
}

/** Title, median, quartiles, MB/s, processor time, number of runs. */
export function variantCells(group: GroupResult, variant: VariantResult): string[] {
  const perSecond = (seconds: number): string => digits(rate(group.bytes, seconds))
  const single = variant.runs.length === 1
  return [
    variant.title,
    `${digits(variant.seconds.median)} s`,
    single ? '' : range(variant.seconds, digits),
    group.bytes === 0 ? '' : perSecond(variant.seconds.median),
    variant.cpuSeconds === undefined || group.clock === 'virtual' ? '' : `${digits(variant.cpuSeconds.median)} s`,
    String(variant.runs.length),
  ]
}

const variantHead = ['variant', 'median', 'quartiles', 'MB/s', 'CPU', 'runs']

/** A table of variants without the rates, where nothing was moved. */
export function withoutRates(group: GroupResult, rows: readonly (readonly string[])[]): (readonly string[])[] {
  if (group.bytes > 0) return [...rows]
  const column = rows[0]!.indexOf('MB/s')
  return rows.map((row) => row.filter((_, index) => index !== column))
}

/** What is said after the title of a group: how much was moved, and whose clock it was. */
export function groupFacts(group: GroupResult): string {
  return [...(group.bytes === 0 ? [] : [`${digits(group.bytes / 1e6)} MB`]), ...(group.clock === 'virtual' ? ['virtual time'] : [])].join(', ')
}

/** What, median, quartiles, goal. */
export function ratioCells(group: GroupResult, ratio: RatioResult): string[] {
  const titleOf = (id: string): string => group.variants.find((variant) => variant.id === id)?.title ?? id
  const quartiles = ratio.perRound.length === 1 ? '' : range(ratio, digits)
  return [`${titleOf(ratio.fast)} / ${titleOf(ratio.slow)}`, `${digits(ratio.median)}x`, quartiles, goalText(ratio)]
}

/** The result for a terminal. */
export function textReport(report: Report): string {
  const lines = [`\n${report.title}`, '='.repeat(report.title.length)]
  if (report.quick) lines.push('Quick mode: a check that everything runs. The figures mean nothing.')
  for (const group of report.groups) {
    const facts = groupFacts(group)
    lines.push('', facts === '' ? group.title : `${group.title} (${facts})`)
    lines.push(...table(withoutRates(group, [variantHead, ...group.variants.map((variant) => variantCells(group, variant))])))
    for (const ratio of group.ratios) {
      const [what, median, quartiles, goal] = ratioCells(group, ratio)
      lines.push(`  ${[what, median, quartiles, report.quick ? '' : goal].filter((cell) => cell !== '').join('  ')}`)
    }
  }
  for (const note of report.notes) lines.push('', `note: ${note}`)
  return `${lines.join('\n')}\n`
}

/** Columns padded with spaces; the first to the left, the others to the right. */
export function table(rows: readonly (readonly string[])[]): string[] {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => (row[column] ?? '').length)))
  return rows.map((row) =>
    `  ${row.map((cell, column) => (column === 0 ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!))).join('  ')}`.trimEnd(),
  )
}

/** Everything, for programs; figures stay in files of their own. */
export function jsonReport(report: Report): string {
  return `${JSON.stringify({ ...report, figures: report.figures.map(({ name, title }) => ({ name, title })) }, undefined, 1)}\n`
}

/** One page with all results, charts included: nothing is loaded from elsewhere. */
export function htmlReport(reports: readonly Report[]): string {
  const head = `<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark"><title>qcow2: measured</title><style>${pageStyle}</style>`
  const contents = reports.length < 2 ? '' : `<nav>${reports.map((report) => `<a href="#${report.name}">${escape(report.title)}</a>`).join('')}</nav>`
  return `<!doctype html><html lang="en"><head>${head}</head><body><main><h1>qcow2: measured</h1>${contents}${reports.map(reportSection).join('')}</main></body></html>\n`
}

function reportSection(report: Report): string {
  const quick = report.quick ? '<p class="warning">Quick mode: a check that everything runs. The figures mean nothing.</p>' : ''
  return `<section id="${escape(report.name)}"><h2>${escape(report.title)}</h2>${quick}<p>${escape(report.about)}</p>
${goals(report)}
${report.figures.map((figure) => `<figure>${figure.svg}</figure>`).join('\n')}
${measurements(report)}
${report.notes.map((note) => `<p class="note">${escape(note)}</p>`).join('')}
${machineLine(report)}</section>`
}

/** Every table; folded where goals or drawings say the same at a glance. */
function measurements(report: Report): string {
  const glance = report.figures.length > 0 || goals(report) !== ''
  return `<details${glance ? '' : ' open'}><summary>all measurements</summary>${report.groups.map(groupSection).join('\n')}</details>`
}

function goals(report: Report): string {
  const rows = report.groups.flatMap((group) =>
    group.ratios.filter((ratio) => ratio.goal !== undefined).map((ratio) => ({ group, ratio, met: ratio.median >= ratio.goal! })),
  )
  if (rows.length === 0 || report.quick) return ''
  const cells = rows.map(({ group, ratio, met }) => {
    const [what = '', median = '', quartiles = ''] = ratioCells(group, ratio)
    const verdict = met ? '<span class="good">✓ met</span>' : '<span class="bad">✗ missed</span>'
    return `<tr><td>${escape(group.title)}<br><small>${escape(what)}</small></td><td class="number"><b>${median}</b><br><small>${quartiles}</small></td><td class="number">${ratio.goal}x<br><small>${verdict}</small></td></tr>`
  })
  return `<div class="scroll"><table><thead>${headRow(['ratio (median of the rounds)', 'measured', 'goal'])}</thead><tbody>${cells.join('')}</tbody></table></div>`
}

function groupSection(group: GroupResult): string {
  const note = group.note === undefined ? '' : `<p class="note">${escape(group.note)}</p>`
  const columns = ['variant', ...(group.clock === 'virtual' ? ['time'] : ['median']), ...(group.bytes === 0 ? [] : ['MB/s']), ...(group.clock === 'virtual' ? [] : ['CPU'])]
  const rows = group.variants.map((variant) => {
    const [title = '', median = '', quartiles = '', rateText = '', cpu = ''] = variantCells(group, variant)
    const time = `${escape(median)}${quartiles === '' ? '' : `<br><small>${escape(quartiles)}</small>`}`
    const cells = [time, ...(group.bytes === 0 ? [] : [escape(rateText)]), ...(group.clock === 'virtual' ? [] : [escape(cpu)])]
    return `<tr><td>${escape(title)}</td>${cells.map((cell) => `<td class="number">${cell}</td>`).join('')}</tr>`
  })
  const ratios = group.ratios.map((ratio) => {
    const [what = '', median = '', quartiles = ''] = ratioCells(group, ratio)
    return `<tr><td>${escape(what)}</td><td class="number"><b>${median}</b>${quartiles === '' ? '' : `<br><small>${quartiles}</small>`}</td></tr>`
  })
  const ratioTable = ratios.length === 0 ? '' : `<div class="scroll"><table><thead>${headRow(['times faster', 'median'])}</thead><tbody>${ratios.join('')}</tbody></table></div>`
  return `<h3>${escape(group.title)} <small>${groupFacts(group)}</small></h3>${note}
<div class="scroll"><table><thead>${headRow(columns)}</thead><tbody>${rows.join('')}</tbody></table></div>${ratioTable}${everyRun(group)}`
}

function everyRun(group: GroupResult): string {
  if (group.clock === 'virtual') return ''
  const rows = group.variants.map((variant) => htmlRow([variant.title, variant.runs.map((run) => digits(run.seconds)).join(' ')], ''))
  return `<details><summary>every run, in seconds, in the order of rounds</summary><div class="scroll"><table><tbody>${rows.join('')}</tbody></table></div></details>`
}

function headRow(cells: readonly string[]): string {
  return `<tr>${cells.map((cell, n) => `<th${n === 0 ? '' : ' class="number"'}>${escape(cell)}</th>`).join('')}</tr>`
}

function htmlRow(cells: readonly string[], kind = 'number'): string {
  return `<tr>${cells.map((cell, n) => `<td${n === 0 || kind === '' ? '' : ` class="${kind}"`}>${escape(cell)}</td>`).join('')}</tr>`
}

function machineLine(report: Report): string {
  const { machine } = report
  const when = `${report.date.slice(0, 16).replace('T', ' ')} UTC, ${report.rounds} ${report.rounds === 1 ? 'round' : 'rounds'}, seed ${report.seed}, ${digits(report.seconds)} s in all`
  const where = `${machine.cpu}, ${machine.cores} cores, ${digits(machine.memory / 2 ** 30)} GiB, ${machine.kernel}, ${machine.filesystem}`
  const versions = Object.entries(machine.versions).map(([name, version]) => (version.startsWith(name) ? version : `${name} ${version}`))
  return `<p class="note">Measured ${[when, where, versions.join(', ')].map(escape).join('. ')}.</p>`
}

const pageStyle = `
:root{--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--ground:#fff;--panel:#f6f8fa;--link:#0969da;--good:#116329;--bad:#a40e26}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b3;--line:#3d444d;--ground:#0d1117;--panel:#151b23;--link:#58a6ff;--good:#56d364;--bad:#ff7b72}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:40rem;margin:0 auto;padding:1.25rem 1rem 4rem}h1{font-size:1.6rem;line-height:1.2;margin:.2rem 0 1rem}h2{font-size:1.3rem;line-height:1.3;margin:0 0 .5rem}section+section{margin-top:3rem;border-top:1px solid var(--line);padding-top:1.75rem}nav+section{margin-top:1.75rem}
h3{font-size:1.05rem;margin:1.5rem 0 .25rem}small{color:var(--soft);font-weight:400}a{color:var(--link)}nav{display:grid;gap:.3rem}
figure{margin:1.75rem 0}.chart{display:block;width:100%;height:auto}.note{color:var(--soft);margin:.25rem 0 .75rem;font-size:.92rem}
.warning{background:var(--panel);border-left:4px solid var(--bad);padding:.6rem .9rem}.scroll{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem}th,td{text-align:left;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}th{color:var(--soft);font-weight:500;vertical-align:bottom}td:first-child{min-width:9rem}
.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}td:last-child,th:last-child{padding-right:0}.good{color:var(--good)}.bad{color:var(--bad)}
details{margin:.25rem 0 1rem}summary{cursor:pointer;padding:.4rem 0;color:var(--soft)}`
