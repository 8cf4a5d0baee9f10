/** The same command lines through real qemu-img 10.0 and through ours, on the same images. */
import { cpSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import zlib from 'node:zlib'
import { describe, expect, test } from 'vitest'
import { tempFolder } from '../support/temp.ts'
import { scenarios as allScenarios, type Scenario } from './compat-scenarios.ts'
import { comparable, compareFiles, ours, qemu, real, words, type Outcome } from './peer.ts'

// this Node may be too old to write zstd
const runnable = (line: string): boolean => 'zstdCompressSync' in zlib || !line.includes('-c -o compression_type=zstd')
const scenarios = allScenarios.map((scenario) => ({ ...scenario, lines: scenario.lines.filter(runnable) }))

async function setUp(folder: string, line: string): Promise<void> {
  const [tool, ...args] = words(line)
  if (tool === 'damage') {
    damage(join(folder, args[0]!))
    return
  }
  const outcome = await real(folder, tool === 'io' ? 'qemu-io' : 'qemu-img', args)
  expect(outcome, line).toMatchObject({ code: 0 })
}

/** One counter too high at a data cluster, and one cluster counted that nobody uses: leaks. */
function damage(path: string): void {
  const bytes = readFileSync(path)
  const block = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(48))))
  bytes.writeUInt16BE(5, block + 2 * 6)
  bytes.writeUInt16BE(1, block + 2 * 40)
  writeFileSync(path, bytes)
}

/** What a script sees of a failure: the first line, without the program's name and advice for people. */
function complaint(stderr: string): string {
  return (stderr.split('\n')[0] ?? '').replace(/^\S*(qemu-img|qcow2): /, '')
}

async function compareLine(scenario: Scenario, line: string, folders: { theirs: string; ours: string }): Promise<object[]> {
  const args = words(line)
  const [theirs, mine] = [await real(folders.theirs, 'qemu-img', args), await ours(folders.ours, args)]
  const sameLayout = scenario.sameLayout ?? false
  const problems: object[] = []
  if (theirs.code !== mine.code) problems.push({ line, theirs, mine })
  else {
    const [expected, actual] = [comparable(theirs.stdout, sameLayout), comparable(mine.stdout, sameLayout)]
    try {
      expect(actual).toEqual(expected)
    } catch {
      problems.push({ line, expected: theirs.stdout, actual: mine.stdout })
    }
    if (mine.code !== 0 && mine.stderr.trim().includes('\n') && !line.startsWith('check')) problems.push({ line, stderr: mine.stderr })
    if (process.env['QCOW2_COMPLAINTS'] === '1' && mine.code !== 0) console.log(`${line}\n  ${complaint(theirs.stderr)}\n  ${complaint(mine.stderr)}`)
  }
  return problems
}

describe.skipIf(qemu === undefined)('as qemu-img 10.0', () => {
  test.each(scenarios.map((scenario) => [scenario.name, scenario] as const))('%s', async (_name, scenario) => {
    const folder = tempFolder()
    const folders = { theirs: join(folder, 'theirs'), ours: join(folder, 'ours') }
    mkdirSync(folders.theirs)
    for (const line of scenario.setup ?? []) await setUp(folders.theirs, line)
    cpSync(folders.theirs, folders.ours, { recursive: true })
    const problems: object[] = []
    for (const line of scenario.lines) problems.push(...(await compareLine(scenario, line, folders)))
    problems.push(...(await compareFiles(folders)))
    expect(problems).toEqual([])
  })

  test.each(['create -f qcow2', 'create -f raw', 'create -f qcow2 name', 'create -f raw name', 'convert -O qcow2', 'convert -O raw', 'amend -f qcow2'])('%s -o help: the same names and types', async (line) => {
    const folder = tempFolder()
    const args = [...words(line), '-o', 'help']
    const names = ({ stdout }: Outcome): string[] => stdout.split('\n').flatMap((row) => /^ {2}([a-z._-]+=<[^>]+>)/.exec(row)?.[1] ?? [])
    const [theirs, mine] = [await real(folder, 'qemu-img', args), await ours(folder, args)]
    expect(theirs.code).toBe(0)
    expect(mine.code).toBe(0)
    expect(names(mine)).toEqual(names(theirs))
  })

  test.each(['', 'info', 'map', 'check', 'compare', 'measure', 'create', 'convert', 'dd', 'resize', 'snapshot', 'bitmap', 'commit', 'rebase', 'amend'])('%s --help succeeds, and knows every option that qemu-img lists', async (command) => {
    const folder = tempFolder()
    const args = [...(command === '' ? [] : [command]), '--help']
    const [theirs, mine] = [await real(folder, 'qemu-img', args), await ours(folder, args)]
    expect([mine.code, mine.stderr]).toEqual([theirs.code, ''])
    // 10.0 has one page, with a line of usage for each command
    const usage = theirs.stdout.split('\n').filter((row) => command !== '' && row.startsWith(`  ${command} `)).join(' ')
    const options = [...usage.matchAll(/(?<=[\s[(|])--?[a-zA-Z][a-z-]*/g)].map(([option]) => option)
    if (command !== '' && usage === '') expect(theirs.stdout).toContain(command)
    expect(options.filter((option) => !new RegExp(`(^|[\\s,])${option}\\b`, 'm').test(mine.stdout))).toEqual([])
  })

  test('there are more than 150 lines', () => {
    expect(scenarios.flatMap(({ lines }) => lines).length).toBeGreaterThan(150)
  })
})
