/**
 * Measures variants of the same work against each other. Owns the order of runs (every round runs every
 * variant once, shuffled), warm-up, clocks and statistics; knows nothing of what is measured or drawn.
 *
 * Absolute figures of one machine and minute say little. What counts is the median of the per-round
 * ratios: both runs of a ratio are neighbours in time, so a slow minute slows both.
 */
import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import os from 'node:os'

/** One timed run. */
export interface Run {
  readonly round: number
  /** Wall clock, or virtual time where the group says so. */
  readonly seconds: number
  /** User and system time of the process that did the work; absent where it could not be read. */
  readonly cpuSeconds?: number
}

/** What a variant may report in place of what the harness measured. */
export interface Measured {
  readonly seconds?: number
  readonly cpuSeconds?: number
  /** Seconds from the start to several moments of one run, by name; see {@link measureMoments}. */
  readonly moments?: Readonly<Record<string, number>>
}

/** One way to do the work. */
export interface Variant {
  /** Short and unique within the group; the key in ratios. */
  readonly id: string
  /** As people read it in tables and charts. */
  readonly title: string
  /** Untimed, before each run: delete, create, flush. */
  readonly prepare?: () => Promise<void> | void
  readonly run: () => Promise<Measured | undefined> | Measured | undefined
  /** Untimed, after each run: check what was done, free. */
  readonly finish?: () => Promise<void> | void
}

/** A ratio to report: how many times faster `fast` is than `slow`, and what it ought to be. */
export interface RatioQuestion {
  readonly fast: string
  readonly slow: string
  /** The ratio aimed at. */
  readonly goal?: number
}

export interface Summary {
  readonly median: number
  readonly q1: number
  readonly q3: number
}

export interface VariantResult {
  readonly id: string
  readonly title: string
  readonly runs: readonly Run[]
  readonly seconds: Summary
  readonly cpuSeconds?: Summary
}

export interface RatioResult extends RatioQuestion, Summary {
  /** In the order of rounds. */
  readonly perRound: readonly number[]
}

/** Variants that did the same work, side by side. */
export interface GroupResult {
  readonly id: string
  readonly title: string
  readonly note?: string
  /** Bytes each run moved, for rates. */
  readonly bytes: number
  readonly clock: 'wall' | 'virtual'
  readonly variants: readonly VariantResult[]
  readonly ratios: readonly RatioResult[]
}

export interface GroupPlan {
  readonly id: string
  readonly title: string
  readonly note?: string
  readonly bytes: number
  readonly clock?: 'wall' | 'virtual'
  readonly variants: readonly Variant[]
  readonly ratios?: readonly RatioQuestion[]
}

export interface Rounds {
  readonly rounds: number
  /** Rounds before the first that counts. */
  readonly warmup: number
  /** Starts the shuffling, so that an order can be repeated. */
  readonly seed: number
  readonly onProgress?: (line: string) => void
}

/** Runs every variant once a round, in a new order each round. Virtual time needs one round only. */
export async function measure(plan: GroupPlan, options: Rounds): Promise<GroupResult> {
  const runs = await runRounds(plan, options)
  return summarizeGroup(plan, (id) => runs.get(id)!.map(({ run }) => run))
}

/** One moment of runs that have several. */
export interface MomentPlan extends Pick<GroupPlan, 'id' | 'title' | 'ratios'> {
  /** Its name in {@link Measured.moments}. */
  readonly moment: string
}

/** Measures once and gives a group for each moment: all moments of a variant in a round are those of one run. */
export async function measureMoments(
  plan: GroupPlan,
  moments: readonly MomentPlan[],
  options: Rounds,
): Promise<GroupResult[]> {
  const runs = await runRounds(plan, options)
  return moments.map(({ moment, ...own }) => {
    const at = (id: string): Run[] => {
      return runs.get(id)!.map(({ run, measured }) => ({ round: run.round, seconds: measured!.moments![moment]! }))
    }
    return summarizeGroup({ ...plan, ...own }, at)
  })
}

interface RunOfVariant {
  readonly run: Run
  readonly measured: Measured | undefined
}

async function runRounds(plan: GroupPlan, options: Rounds): Promise<Map<string, RunOfVariant[]>> {
  const rounds = plan.clock === 'virtual' ? 1 : options.rounds
  const warmup = plan.clock === 'virtual' ? 0 : options.warmup
  const random = mulberry32(options.seed)
  const runs = new Map<string, RunOfVariant[]>(plan.variants.map(({ id }) => [id, []]))
  for (let round = -warmup; round < rounds; round++) {
    options.onProgress?.(`${plan.title}: ${round < 0 ? 'warm-up' : `round ${round + 1} of ${rounds}`}`)
    for (const variant of shuffled(plan.variants, random)) {
      const run = await time(variant, round)
      if (round >= 0) runs.get(variant.id)!.push(run)
    }
  }
  return runs
}

function summarizeGroup(plan: GroupPlan, runsOf: (id: string) => readonly Run[]): GroupResult {
  const variants = plan.variants.map(({ id, title }) => summarizeVariant(id, title, runsOf(id)))
  return {
    id: plan.id,
    title: plan.title,
    ...(plan.note === undefined ? {} : { note: plan.note }),
    bytes: plan.bytes,
    clock: plan.clock ?? 'wall',
    variants,
    ratios: (plan.ratios ?? []).map((question) => ratio(question, variants)),
  }
}

async function time(variant: Variant, round: number): Promise<RunOfVariant> {
  await variant.prepare?.()
  const cpuBefore = process.cpuUsage()
  const before = performance.now()
  const measured = await variant.run()
  const wall = (performance.now() - before) / 1000
  const cpu = process.cpuUsage(cpuBefore)
  await variant.finish?.()
  const own = (cpu.user + cpu.system) / 1e6
  // a variant that timed another process has not measured this one's CPU
  const cpuSeconds = measured?.seconds === undefined ? (measured?.cpuSeconds ?? own) : measured.cpuSeconds
  return { run: { round, seconds: measured?.seconds ?? wall, ...(cpuSeconds === undefined ? {} : { cpuSeconds }) }, measured }
}

function summarizeVariant(id: string, title: string, runs: readonly Run[]): VariantResult {
  const cpu = runs.flatMap((run) => (run.cpuSeconds === undefined ? [] : [run.cpuSeconds]))
  return {
    id,
    title,
    runs,
    seconds: summarize(runs.map((run) => run.seconds)),
    ...(cpu.length === runs.length && cpu.length > 0 ? { cpuSeconds: summarize(cpu) } : {}),
  }
}

function ratio(question: RatioQuestion, variants: readonly VariantResult[]): RatioResult {
  const runsOf = (id: string): readonly Run[] => {
    const found = variants.find((variant) => variant.id === id)
    if (found === undefined) throw new Error(`no variant ${id} to compare`)
    return found.runs
  }
  const slow = runsOf(question.slow)
  const perRound = runsOf(question.fast).map((run, n) => slow[n]!.seconds / run.seconds)
  return { ...question, ...summarize(perRound), perRound }
}

/** Median and quartiles, interpolated between neighbours. */
export function summarize(values: readonly number[]): Summary {
  const sorted = [...values].sort((a, b) => a - b)
  const at = (fraction: number): number => {
    const position = (sorted.length - 1) * fraction
    const below = sorted[Math.floor(position)]!
    return below + (sorted[Math.ceil(position)]! - below) * (position % 1)
  }
  if (sorted.length === 0) throw new RangeError('nothing to summarize')
  return { median: at(0.5), q1: at(0.25), q3: at(0.75) }
}

function shuffled<T>(items: readonly T[], random: () => number): T[] {
  const result = [...items]
  for (let n = result.length - 1; n > 0; n--) {
    const other = Math.floor(random() * (n + 1))
    ;[result[n], result[other]] = [result[other]!, result[n]!]
  }
  return result
}

/** A small seeded generator of numbers in [0, 1). */
export function mulberry32(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

/** What the figures were measured on; stored with them. */
export interface Machine {
  readonly cpu: string
  readonly cores: number
  readonly memory: number
  readonly kernel: string
  /** Type of the file system that holds the bench's files. */
  readonly filesystem: string
  /** Program -> version; only what is installed. */
  readonly versions: Readonly<Record<string, string>>
}

export function describeMachine(folder: string): Machine {
  const versions: Record<string, string> = { node: process.versions.node, libuv: process.versions.uv }
  const programs: [string, string, readonly string[]][] = [
    ['fio', 'fio', ['--version']],
    ['QEMU (system)', 'qemu-system-x86_64', ['--version']],
    ['QEMU (beside)', `${process.env['QCOW2_QEMU10'] ?? '/opt/qemu-10.0'}/usr/bin/qemu-system-x86_64`, ['--version']],
    ['qcow2 (commit)', 'git', ['rev-parse', '--short', 'HEAD']],
  ]
  for (const [name, file, args] of programs) {
    const output = outputOf(file, args)
    if (output !== undefined) versions[name] = /version ([\d.]+)/.exec(output)?.[1] ?? output
  }
  return {
    cpu: os.cpus()[0]?.model ?? 'unknown',
    cores: os.cpus().length,
    memory: os.totalmem(),
    kernel: `${os.type()} ${os.release()}`,
    filesystem: filesystemOf(folder),
    versions,
  }
}

/** First line that a program prints, or `undefined` where it is not installed. */
export function outputOf(file: string, args: readonly string[]): string | undefined {
  try {
    return execFileSync(file, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'], timeout: 10_000 }).split('\n')[0]
  } catch {
    return undefined
  }
}

function filesystemOf(folder: string): string {
  try {
    const mounts = readFileSync('/proc/mounts', 'utf8').trim().split('\n').map((line) => line.split(' '))
    const holding = mounts.filter(([, point]) => point === '/' || folder === point || folder.startsWith(`${point}/`))
    const deepest = holding.sort((a, b) => b[1]!.length - a[1]!.length)[0]
    return deepest?.[2] ?? 'unknown'
  } catch {
    return 'unknown'
  }
}
