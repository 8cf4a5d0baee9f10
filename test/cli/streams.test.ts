/** What goes where: the bytes of an image and nothing else to its stream, and one line when a stream cannot be written. */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { afterAll, describe, expect, onTestFinished, test } from 'vitest'
import { loadCommands } from '../../src/cli/commands.ts'
import { WriteError } from '../../src/cli/errors.ts'
import { main } from '../../src/cli/main.ts'
import { withNested } from '../../src/cli/reference.ts'
import { tempFolder } from '../support/temp.ts'
import { run, terminal, type RunOptions } from './run.ts'

const program = join(import.meta.dirname, '../../src/cli.ts')
const savedVm = gunzipSync(readFileSync(join(import.meta.dirname, '../fixtures/captures/qemu100-savevm.vmstate.gz')))

const folder = mkdtempSync(join(tmpdir(), 'qcow2-test-'))
afterAll(() => rmSync(folder, { recursive: true }))
const [disk, stream] = [join(folder, 'disk.qcow2'), join(folder, 'vm.mig')]
writeFileSync(join(folder, 'raw'), Buffer.alloc(3 << 20, 'some text '))
writeFileSync(stream, savedVm)
expect(await run(['convert', '-f', 'raw', '-O', 'qcow2', join(folder, 'raw'), disk])).toMatchObject({ code: 0 })

/** Every command that can write an image to stdout; `TARGET` is its name. */
const senders: readonly (readonly [line: string, options?: RunOptions])[] = [
  ['convert -O raw DISK TARGET'],
  ['convert -O qcow2 DISK TARGET'],
  ['convert -f raw -O raw - TARGET', { stdin: chunks(Buffer.alloc(1 << 20, 7)) }],
  ['vmstate export STREAM TARGET'],
  ['vmstate export --form=plain STREAM TARGET'],
  ['vmstate extract STREAM pc.ram TARGET'],
  ['vmstate extract --device STREAM cpu TARGET'],
  ['capture STREAM TARGET --as=stream'],
  ['dd -O raw if=DISK of=TARGET'],
  ['dd -O qcow2 if=DISK of=TARGET'],
]

function makePipe(): string {
  const path = join(tempFolder(), 'pipe')
  execFileSync('mkfifo', [path])
  return path
}

async function* chunks(bytes: Uint8Array): AsyncGenerator<Uint8Array, void, undefined> {
  await Promise.resolve()
  yield bytes
}

function argvOf(line: string, target: string, ...more: string[]): string[] {
  return [...line.split(' ').map((word) => word.replace('DISK', disk).replace('STREAM', stream).replace('TARGET', target)), ...more]
}

test('each command whose output may be an image says which argument names it', async () => {
  const all = (await loadCommands()).flatMap((definition) => withNested(definition))
  const named = all.filter(({ definition }) => definition.payload !== undefined).map(({ path }) => path)
  expect(named.sort()).toEqual(['capture', 'convert', 'create', 'dd', 'save', 'vmstate export', 'vmstate extract'])
})

describe('with an image on stdout, words and progress go elsewhere', () => {
  test.each(senders.map(([line, options]) => ({ line, options })))('$line', async ({ line, options }) => {
    const bare = await run(argvOf(line, '-', ...(line.startsWith('capture') ? ['-q'] : [])), options)
    expect([bare.code, bare.stderr, bare.bytes.length > 0]).toEqual([0, '', true])
    if (options?.stdin !== undefined || line.startsWith('dd')) return
    for (const progress of ['-p', '--progress=json']) {
      for (const tty of [false, true]) {
        const shown = await run(argvOf(line, '-', progress), { tty })
        expect([shown.code, Buffer.from(shown.bytes).equals(bare.bytes)]).toEqual([0, true])
        expect(shown.stderr).not.toBe('')
      }
    }
  })

  test('by its name too, when the name leads to stdout', async () => {
    const isStdout = (name: string): boolean => name.endsWith('out')
    for (const line of ['convert -p -O qcow2 DISK TARGET', 'vmstate export -p STREAM TARGET', 'create -f qcow2 TARGET 1M']) {
      const target = join(tempFolder(), 'out')
      const ours = { ...terminal(), isStdout }
      expect(await main(argvOf(line, target), ours)).toBe(0)
      expect(ours.stdout.bytes).toHaveLength(0)
      expect(ours.stderr.bytes.length).toBeGreaterThan(0)
    }
  })

  test('under trace', async () => {
    const { bytes } = await run(argvOf('convert -O raw DISK TARGET', '-'))
    const traced = await run(argvOf('trace convert -p -O raw DISK TARGET', '-'))
    expect(Buffer.from(traced.bytes).equals(bytes)).toBe(true)
    expect(traced.stderr).toContain('100.00/100%')
  })

  test.each(['pipe', 'file'])('/dev/stdout, which is a %s', async (kind) => {
    const { bytes } = await run(argvOf('convert -O raw DISK TARGET', '-'))
    const path = join(tempFolder(), 'out')
    const fd = openSync(path, 'w')
    const child = spawn(process.execPath, ['--import', 'tsx', program, ...argvOf('convert -p -O raw DISK TARGET', '/dev/stdout')], { stdio: ['ignore', kind === 'pipe' ? 'pipe' : fd, 'pipe'] })
    closeSync(fd)
    const parts: Buffer[] = []
    child.stdout?.on('data', (data: Buffer) => parts.push(data))
    let stderr = ''
    child.stderr!.on('data', (data: Buffer) => (stderr += data.toString()))
    const [code] = (await once(child, 'close')) as [number]
    expect([code, stderr.includes('100.00/100%')]).toEqual([0, true])
    expect((kind === 'pipe' ? Buffer.concat(parts) : readFileSync(path)).equals(bytes)).toBe(true)
  })

  test('a named pipe takes a stream, and is no place for what is written here and there', async () => {
    const path = makePipe()
    const reading = new Promise<Buffer>((resolve) => {
      const reader = spawn('cat', [path], { stdio: ['ignore', 'pipe', 'ignore'] })
      const parts: Buffer[] = []
      reader.stdout.on('data', (data: Buffer) => parts.push(data))
      reader.on('close', () => resolve(Buffer.concat(parts)))
    })
    expect(await run(['vmstate', 'export', stream, path])).toMatchObject({ code: 0, stdout: '', stderr: '' })
    expect((await reading).equals(savedVm)).toBe(true)
    expect(await run(['capture', stream, path])).toMatchObject({ code: 1, stderr: expect.stringContaining(`${path} takes bytes in their order only: give --as=stream`) as string })
    expect(await run(['capture', stream, '-'])).toMatchObject({ code: 1, stdout: '', stderr: expect.stringContaining('stdout takes bytes in their order only') as string })
  })

  test('a named pipe gives a stream', async () => {
    const [path, kept] = [makePipe(), join(tempFolder(), 'kept')]
    const captured = run(['capture', path, kept, '--as=stream'])
    const writer = spawn('sh', ['-c', `sleep 0.3; cat '${stream}' > '${path}'`])
    await once(writer, 'close')
    expect(await captured).toMatchObject({ code: 0, stderr: '' })
    expect(readFileSync(kept).equals(savedVm)).toBe(true)
  })
})

describe('a stream that cannot be written', () => {
  /** A run whose stdout or stderr is opened as `redirect` says. */
  async function redirected(argv: readonly string[], redirect: string, name: 'qcow2' | 'qemu-img' = 'qcow2'): Promise<{ code: number; stderr: string }> {
    const script = name === 'qcow2' ? program : join(folder, name)
    const words = [process.execPath, '--import', 'tsx', script, ...argv].map((word) => `'${word}'`).join(' ')
    const child = spawn('bash', ['-c', `${words} ${redirect}`], { stdio: ['ignore', 'ignore', 'pipe'] })
    let stderr = ''
    child.stderr.on('data', (data: Buffer) => (stderr += data.toString()))
    const [code] = (await once(child, 'close')) as [number]
    return { code, stderr }
  }

  const full = 'qcow2: write error: No space left on device\n'

  test.each([[['info', disk]], [['info', '--output=json', disk]], [['map', '--output=json', disk]], [['check', disk]], [['--help']], [['convert', '--help']], [['--version']], [['completion', 'bash']], [['snapshot', '-l', join(folder, 'snapshots')]], [['convert', disk, '-']], [['convert', '-O', 'qcow2', disk, '-']], [['vmstate', 'export', stream, '-']], [['compare', disk, disk]]])(
    'a full disk: %j is one line and a failure',
    async (argv) => {
      if (argv[0] === 'snapshot') {
        await run(['create', '-q', '-f', 'qcow2', argv[2]!, '1M'])
        await run(['snapshot', '-c', 'one', argv[2]!])
      }
      const { code, stderr } = await redirected(argv, '> /dev/full')
      expect(stderr).toBe(full)
      // 1 would say that the disks differ
      expect(code).toBe(argv[0] === 'compare' ? 4 : 1)
    },
  )

  test('progress that nobody can read does not end the work, but is told', async () => {
    const target = join(tempFolder(), 'target')
    expect(await redirected(['convert', '-p', disk, target], '> /dev/full')).toEqual({ code: 1, stderr: full })
    expect(await run(['compare', disk, target])).toMatchObject({ code: 0 })
  })

  test('a descriptor that is not for writing', async () => {
    expect(await redirected(['info', disk], `1< ${disk}`)).toEqual({ code: 1, stderr: 'qcow2: write error: Bad file descriptor\n' })
  })

  test('stderr: the exit code tells', async () => {
    expect(await redirected(['info', '/nonexistent'], '2> /dev/full')).toEqual({ code: 1, stderr: '' })
    expect(await redirected(['convert', '-p', '--progress=json', disk, join(tempFolder(), 'target')], '2> /dev/full')).toEqual({ code: 0, stderr: '' })
  })

  test('called qemu-img, words that are lost are no failure, as there', async () => {
    symlinkSync(program, join(folder, 'qemu-img'))
    expect(await redirected(['info', disk], '> /dev/full', 'qemu-img')).toEqual({ code: 0, stderr: '' })
    expect(await redirected(['convert', disk, '-'], '> /dev/full', 'qemu-img')).toEqual({ code: 1, stderr: 'qemu-img: write error: No space left on device\n' })
  })

  test('the system says why in the words of the C library', () => {
    const said = (code: string, message: string): string => new WriteError(Object.assign(new Error(message), { code })).message
    expect(said('EIO', 'EIO: i/o error, write')).toBe('write error: Input/output error')
    expect(said('EIO', 'write EIO')).toBe('write error: Input/output error')
    expect(said('ENOSPC', 'ENOSPC: no space left on device, write')).toBe('write error: No space left on device')
  })
})

describe('SIGUSR1', () => {
  /** Sends the signal to a command that goes on, and gives what it said. */
  async function asked(argv: readonly string[], input?: Uint8Array): Promise<string> {
    const child = spawn(process.execPath, ['--import', 'tsx', program, ...argv], { stdio: ['pipe', 'pipe', 'pipe'] })
    onTestFinished(() => void child.kill('SIGKILL'))
    let stderr = ''
    child.stderr.on('data', (data: Buffer) => (stderr += data.toString()))
    if (input === undefined) await once(child.stdout, 'data')
    else await new Promise((resolve) => child.stdin.write(input, resolve))
    for (const end = Date.now() + (input === undefined ? 1000 : 10_000); stderr === '' && Date.now() < end; ) {
      child.kill('SIGUSR1')
      await new Promise((resolve) => setTimeout(resolve, input === undefined ? 1000 : 100))
    }
    expect([child.exitCode, child.signalCode]).toEqual([null, null])
    child.kill('SIGTERM')
    await once(child, 'close')
    return stderr
  }

  test('shows how far a copy is', async () => {
    const stderr = await asked(['convert', '-f', 'raw', '-O', 'qcow2', '-', join(tempFolder(), 'target')], Buffer.alloc(8 << 20, 3))
    expect(stderr).toMatch(/^ {4}\((0.00\/100%|\d+ bytes)\)\n/)
    expect(stderr).not.toContain('Debugger')
  })

  test('is taken before anything is loaded, in the program as it is built', () => {
    const built = join(import.meta.dirname, '../../dist/cli.cjs')
    const script = `require(${JSON.stringify(built)}); process.stdout.write(String(process.listenerCount('SIGUSR1'))); process.exit()`
    expect(execFileSync(process.execPath, ['-e', script], { encoding: 'utf8' })).toBe('1')
  })

  test('does nothing where there is nothing to show', async () => {
    expect(await asked(['serve', '--socket', join(tempFolder(), 'nbd'), disk])).toBe('')
  })
})
