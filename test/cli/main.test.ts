/** The frame of the program: choosing a command, help, errors on one line, progress. */
import { execFileSync } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { loadCommands } from '../../src/cli/commands.ts'
import { duration, progressFor } from '../../src/cli/progress.ts'
import { reference, withNested } from '../../src/cli/reference.ts'
import { version } from '../../src/cli/version.ts'
import { tempFolder } from '../support/temp.ts'
import { run, terminal } from './run.ts'

const project = join(import.meta.dirname, '../..')
const commands = await loadCommands()
const all = commands.flatMap((definition) => withNested(definition))

test('docs/cli.md is what the definitions say now (npx tsx src/cli/write-reference.ts)', () => {
  expect(readFileSync(join(project, 'docs/cli.md'), 'utf8')).toBe(reference(commands))
})

test("--version is package.json's", async () => {
  const { version: packaged } = JSON.parse(readFileSync(join(project, 'package.json'), 'utf8')) as { version: string }
  expect(version).toBe(packaged)
  expect(await run('--version')).toMatchObject({ code: 0, stdout: `qcow2 version ${packaged}\n` })
})

describe('usage', () => {
  test.each([
    ['completio bash', "qcow2: Command not found: completio; did you mean 'completion'? (see 'qcow2 --help')\n"],
    ['completion', "qcow2: SHELL is missing (see 'qcow2 completion --help')\n"],
    ['completion fishy', "qcow2: no completions for 'fishy'; did you mean 'fish'? (see 'qcow2 completion --help')\n"],
    ['--bogus', "qcow2: unknown option '--bogus' before the command (see 'qcow2 --help')\n"],
  ])('qcow2 %s', async (line, stderr) => {
    expect(await run(line)).toMatchObject({ code: 1, stdout: '', stderr })
  })

  test('without a command it shows help, and fails', async () => {
    const { stdout } = await run('--help')
    expect(await run('')).toMatchObject({ code: 1, stdout: '', stderr: stdout })
    expect(await run('', { program: 'qemu-img' })).toMatchObject({ code: 1, stdout: '', stderr: "qemu-img: Not enough arguments\nTry 'qemu-img --help' for more info\n" })
  })

  test('started as qemu-img it calls itself so', async () => {
    expect((await run('nope', { program: 'qemu-img' })).stderr).toMatch(/^qemu-img: Command not found: nope/)
  })

  test('a stack only when asked', async () => {
    expect((await run('nope', { env: { QCOW2_DEBUG: '1' } })).stderr).toContain('    at ')
  })
})

describe('help', () => {
  test('of the program lists every command', async () => {
    const { code, stdout } = await run('--help')
    expect(code).toBe(0)
    for (const { name, summary } of commands) expect(stdout).toMatch(new RegExp(`^  ${name} +${summary.slice(0, 20)}`, 'm'))
  })

  test.each(all.map(({ path, definition }) => [path, definition] as const))('of %s: options, examples, width', async (path, definition) => {
    const { code, stdout } = await run([...path.split(' '), '--help'])
    expect(code).toBe(0)
    expect(stdout).toMatch(new RegExp(`^Usage: qcow2 ${path}`))
    for (const name of Object.keys(definition.options)) expect(stdout).toContain(`--${name}`)
    for (const { line } of definition.examples) expect(stdout).toContain(line)
    expect(await run(`help ${path}`)).toMatchObject({ stdout })
  })

  test('every command has an example, and summaries have no full stop', () => {
    for (const { path, definition } of all) {
      if (definition.commands === undefined) expect(definition.examples, path).not.toEqual([])
      expect(definition.summary, path).toMatch(/[^.]$/)
    }
  })
})

describe('completions', () => {
  test.each(['bash', 'zsh', 'fish'])('%s knows every command and option', async (shell) => {
    const { stdout } = await run(`completion ${shell}`)
    for (const { definition } of all) {
      expect(stdout).toContain(definition.name)
      for (const name of Object.keys(definition.options)) expect(stdout).toContain(shell === 'fish' ? `-l ${name}` : `--${name}`)
    }
  })

  test('bash accepts the script and completes', async () => {
    const { stdout } = await run('completion bash')
    const script = `${stdout}\nCOMP_WORDS=(qcow2 comp); COMP_CWORD=1; _qcow2; echo "\${COMPREPLY[*]}"`
    expect(execFileSync('bash', ['-c', script], { encoding: 'utf8' })).toContain('completion')
  })

  test('bash: a name with blanks or stars is one word', async () => {
    const folder = tempFolder()
    for (const name of ['with space.qcow2', 'with * star']) writeFileSync(join(folder, name), '')
    const { stdout } = await run('completion bash')
    const script = `${stdout}\nCOMP_WORDS=(qcow2 info with); COMP_CWORD=2; _qcow2; printf '%s\\n' "\${COMPREPLY[@]}" | sort`
    expect(execFileSync('bash', ['-c', script], { encoding: 'utf8', cwd: folder })).toBe('with * star\nwith space.qcow2\n')
  })
})

describe('progress', () => {
  test('for scripts is what qemu-img prints, on stdout', () => {
    const ours = terminal()
    const progress = progressFor(ours, 'human')
    for (let done = 0; done <= 1000; done++) progress.update(done, 1000)
    progress.finish()
    const lines = ours.stdout.bytes.toString().split('\r')
    expect(lines[0]).toBe('    (0.00/100%)')
    expect(lines.at(-2)).toBe('    (100.00/100%)')
    expect(lines.at(-1)).toBe('\n')
    expect(lines).toHaveLength(103)
    expect(ours.stderr.bytes).toHaveLength(0)
  })

  test('on a terminal is a bar with rate and time left, on stderr', () => {
    const ours = terminal({ tty: true, env: { NO_COLOR: '1' } })
    let now = 0
    const progress = progressFor(ours, 'human', { now: () => now })
    progress.update(0, 100 << 20)
    now = 1000
    progress.update(25 << 20, 100 << 20)
    expect(ours.stderr.bytes.toString()).toMatch(/\[#+-+\] {2}25% {2}25 MiB\/s {2}0:03 left/)
    now = 4000
    progress.finish()
    expect(ours.stderr.bytes.toString()).toMatch(/\[#+\] 100% {2}25 MiB\/s {2}0:04 in all.*\n$/)
    expect(ours.stdout.bytes).toHaveLength(0)
  })

  test('NO_COLOR takes the colours off', () => {
    const draw = (env: Record<string, string>): string => {
      const ours = terminal({ tty: true, env })
      const progress = progressFor(ours, 'human')
      progress.update(1, 1)
      progress.finish()
      return ours.stderr.bytes.toString()
    }
    expect(draw({})).toContain('\u001b[32m')
    expect(draw({ NO_COLOR: '1' })).not.toContain('\u001b[32m')
    expect(draw({ NO_COLOR: '' })).toContain('\u001b[32m')
  })

  test('for programs is JSON lines on stderr', () => {
    const ours = terminal()
    let now = 0
    const progress = progressFor(ours, 'json', { now: () => now })
    progress.update(0, 10)
    now = 50
    progress.update(1, 10)
    now = 500
    progress.update(5, 10)
    progress.finish()
    const lines = ours.stderr.bytes.toString().trimEnd().split('\n').map((line) => JSON.parse(line) as unknown)
    expect(lines).toEqual([
      { event: 'progress', done: 0, total: 10, seconds: 0, finished: false },
      { event: 'progress', done: 5, total: 10, seconds: 0.5, finished: false },
      { event: 'progress', done: 10, total: 10, seconds: 0.5, finished: true },
    ])
  })

  test('without a total no program is told one, and the bar is a count', () => {
    const lines = terminal()
    let now = 0
    const json = progressFor(lines, 'json', { now: () => now })
    json.update(7)
    json.finish()
    expect(lines.stderr.bytes.toString().trimEnd().split('\n').map((line) => JSON.parse(line) as unknown)).toEqual([
      { event: 'progress', done: 7, seconds: 0, finished: false },
      { event: 'progress', done: 7, seconds: 0, finished: true },
    ])
    const watched = terminal({ tty: true })
    const bar = progressFor(watched, 'human', { now: () => now })
    now = 1000
    bar.update(25 << 20)
    expect(watched.stderr.bytes.toString()).toBe('\r25 MiB  25 MiB/s  0:01\u001b[K')
    bar.finish()
    expect(watched.stderr.bytes.toString()).toMatch(/25 MiB {2}25 MiB\/s {2}0:01 in all\u001b\[K\n$/)
    const script = terminal()
    const percentages = progressFor(script, 'human')
    percentages.update(7)
    expect(script.stdout.bytes.toString()).toBe('    (0.00/100%)\r')
  })

  test('without -p a line is told to whoever asks', () => {
    let ask = (): void => undefined
    const ours = { ...terminal(), onQuery: (listener: () => void) => void (ask = listener) }
    const progress = progressFor(ours, 'none')
    ask()
    progress.update(25, 200)
    ask()
    progress.update(30)
    ask()
    progress.finish()
    expect(ours.stderr.bytes.toString()).toBe('    (0.00/100%)\n    (12.50/100%)\n    (30 bytes)\n')
    const told = ours.stderr.bytes.length
    progressFor(ours, 'human')
    ask()
    expect(ours.stderr.bytes).toHaveLength(told)
  })

  test.each([[0, '0:00'], [7.4, '0:07'], [754, '12:34'], [3723, '1:02:03']])('%d seconds are %s', (seconds, text) => {
    expect(duration(seconds)).toBe(text)
  })
})
