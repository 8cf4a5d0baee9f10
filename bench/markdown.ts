/** Stored results as a page of the documentation: first every goal, then every table. Owns presentation; computes nothing. */
import type { GroupResult, Machine, RatioResult } from './harness.ts'
import { ratioCells, variantCells, withoutRates } from './report.ts'
import type { Report } from './scenario.ts'

/** The page `docs/results.md`. */
export function resultsPage(reports: readonly Report[]): string {
  const lines = [
    '---',
    'title: Benchmark results',
    '---',
    '',
    '# Benchmark results',
    '',
    '<!-- Made by `npx tsx bench/write-results.ts` from the files in docs/results: edit those by measuring again. -->',
    '',
    'How each figure is taken: [benchmarks](benchmarks.md). A ratio says how many times faster the first of two is; it is the median of the ratios',
    'of the rounds, with its quartiles behind it.',
    '',
    '## Goals',
    '',
    ...markdownTable(['scenario', 'what', 'ratio', 'goal', ''], reports.flatMap(goalRows), 2),
  ]
  for (const report of reports) lines.push('', ...section(report))
  return `${lines.join('\n')}\n`
}

function goalRows(report: Report): string[][] {
  return report.groups.flatMap((group) =>
    group.ratios.filter(({ goal }) => goal !== undefined).map((ratio) => {
      const [what = '', median = '', quartiles = ''] = ratioCells(group, ratio)
      return [`[${report.name}](#${anchor(report.title)})`, `${group.title}: ${what}`, spread(median, quartiles), goalCell(ratio), ratio.median >= ratio.goal! ? 'met' : '**missed**']
    }),
  )
}

const goalCell = ({ goal = 0 }: RatioResult): string => `${Number(goal.toFixed(2))}x`

const spread = (median: string, quartiles: string): string => (quartiles === '' ? median : `${median} (${quartiles})`)

function section(report: Report): string[] {
  const { machine, rounds } = report
  return [
    `## ${report.title}`,
    '',
    `${report.about} Measured on ${report.date.slice(0, 10)}, ${rounds} rounds, ${machineLine(machine)}. [Every run](results/${report.name}.json).`,
    ...report.groups.flatMap((group) => ['', ...groupSection(group)]),
    ...report.notes.flatMap((note) => ['', `- ${note}`]),
  ]
}

function machineLine({ cores, memory, filesystem, kernel, versions }: Machine): string {
  const software = Object.entries(versions).map(([name, version]) => `${name} ${version}`)
  return [`${cores} cores`, `${Math.round(memory / 2 ** 30)} GiB`, filesystem, kernel, ...software].join(', ')
}

function groupSection(group: GroupResult): string[] {
  const variants = group.variants.map((variant) => {
    const [title = '', median = '', quartiles = '', rate = '', cpu = ''] = variantCells(group, variant)
    return [title, spread(median, quartiles), rate, cpu]
  })
  const [head, ...rows] = withoutRates(group, [['variant', group.clock === 'virtual' ? 'virtual time' : 'time', 'MB/s', 'processor'], ...variants])
  const ratios = group.ratios.map((ratio) => {
    const [what = '', median = '', quartiles = ''] = ratioCells(group, ratio)
    return [what, spread(median, quartiles)]
  })
  return [
    `### ${group.title}`,
    '',
    ...(group.note === undefined ? [] : [group.note, '']),
    ...markdownTable(head!, rows, 1),
    ...(ratios.length === 0 ? [] : ['', ...markdownTable(['times faster', 'ratio'], ratios, 1)]),
  ]
}

/** Columns from `firstNumber` on are aligned to the right. */
function markdownTable(head: readonly string[], rows: readonly (readonly string[])[], firstNumber: number): string[] {
  const line = (cells: readonly string[]): string => `| ${cells.map((cell) => cell.replaceAll('|', '\\|')).join(' | ')} |`
  return [line(head), line(head.map((_, column) => (column < firstNumber ? '---' : '--:'))), ...rows.map(line)]
}

const anchor = (title: string): string => title.toLowerCase().replace(/[^a-z0-9 -]/g, '').replaceAll(' ', '-')
