/**
 * `npm run bench -- [scenario ...] [options]`: runs scenarios, prints tables, writes JSON, SVG and one
 * HTML page.
 */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { describeMachine } from './harness.ts'
import { htmlReport, jsonReport, textReport } from './report.ts'
import type { Report, Scenario } from './scenario.ts'

const usage = `npm run bench -- [scenario ...] [options]

  --list           the scenarios
  --rounds N       rounds that count (default 7)
  --size MiB       VM state moved by each run (default: the scenario's own)
  --folder PATH    where the measured files go; the disk to measure (default .)
  --out PATH       where results go (default bench/results)
  --seed N         order of the runs (default 1)
  --quick          tiny sizes, one round: does everything run? the figures mean nothing
  --help
`

/** All scenarios, by the file names in `scenarios/`. */
export async function loadScenarios(): Promise<Scenario[]> {
  const folder = join(import.meta.dirname, 'scenarios')
  const files = readdirSync(folder).filter((file) => file.endsWith('.ts')).sort()
  const modules = await Promise.all(files.map((file) => import(join(folder, file)) as Promise<{ scenario: Scenario }>))
  return modules.map((module) => module.scenario)
}

export interface BenchOptions {
  readonly quick: boolean
  readonly rounds: number
  readonly seed: number
  readonly folder: string
  readonly size?: number
  readonly onProgress?: (line: string) => void
}

/** Runs one scenario in a folder of its own, which is removed afterwards. */
export async function runScenario(scenario: Scenario, options: BenchOptions): Promise<Report> {
  const folder = mkdtempSync(join(resolve(options.folder), '.qcow2-bench-'))
  const before = performance.now()
  try {
    const result = await scenario.run({ ...options, folder, warmup: options.quick ? 0 : 1 })
    const { name, title, about } = scenario
    const { quick, rounds, seed } = options
    const seconds = (performance.now() - before) / 1000
    return { name, title, about, date: new Date().toISOString(), quick, rounds, seed, seconds, machine: describeMachine(folder), ...result }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

/** Writes `NAME.json`, its figures, and `report.html` over all results in the folder. */
export function store(out: string, reports: readonly Report[]): void {
  mkdirSync(out, { recursive: true })
  for (const report of reports) {
    writeFileSync(join(out, `${report.name}.json`), jsonReport(report))
    for (const figure of report.figures) writeFileSync(join(out, `${figure.name}.svg`), figure.svg)
  }
  const stored = readdirSync(out).filter((file) => file.endsWith('.json')).sort().map((file) => readReport(out, file))
  writeFileSync(join(out, 'report.html'), htmlReport(stored))
}

function readReport(out: string, file: string): Report {
  const report = JSON.parse(readFileSync(join(out, file), 'utf8')) as Report
  return { ...report, figures: report.figures.map((figure) => ({ ...figure, svg: readFileSync(join(out, `${figure.name}.svg`), 'utf8') })) }
}

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      list: { type: 'boolean' }, rounds: { type: 'string' }, size: { type: 'string' }, folder: { type: 'string' },
      out: { type: 'string' }, seed: { type: 'string' }, quick: { type: 'boolean' }, help: { type: 'boolean' },
    },
  })
  const scenarios = await loadScenarios()
  if (values.help === true) return void process.stdout.write(usage)
  if (values.list === true) return void process.stdout.write(scenarios.map(({ name, title }) => `${name.padEnd(24)}${title}\n`).join(''))
  const unknown = positionals.filter((name) => !scenarios.some((scenario) => scenario.name === name))
  if (unknown.length > 0) throw new Error(`no scenario ${unknown.join(', ')}; there are: ${scenarios.map(({ name }) => name).join(', ')}`)
  const quick = values.quick === true
  const options: BenchOptions = {
    quick,
    rounds: quick ? 1 : integer('rounds', values.rounds, 7),
    seed: integer('seed', values.seed, 1),
    folder: values.folder ?? '.',
    ...(values.size === undefined ? {} : { size: integer('size', values.size, 0) }),
    onProgress: (line) => process.stderr.write(process.stderr.isTTY ? `\r\u001b[K${line}` : `${line}\n`),
  }
  const out = resolve(values.out ?? (quick ? join(tmpdir(), 'qcow2-bench-quick') : join(import.meta.dirname, 'results')))
  for (const scenario of scenarios) {
    if (positionals.length > 0 && !positionals.includes(scenario.name)) continue
    const report = await runScenario(scenario, options)
    if (process.stderr.isTTY) process.stderr.write('\r\u001b[K')
    process.stdout.write(textReport(report))
    store(out, [report])
  }
  process.stdout.write(`\nEvery run, drawings and a page for the browser: ${out}\n`)
}

function integer(name: string, text: string | undefined, fallback: number): number {
  if (text === undefined) return fallback
  const value = Number(text)
  if (!Number.isSafeInteger(value) || value < 1) throw new Error(`--${name} must be a whole number of at least 1, not ${text}`)
  return value
}

if (process.argv[1] === import.meta.filename) {
  main().catch((error: unknown) => {
    process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`)
    process.exitCode = 1
  })
}
