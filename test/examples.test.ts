/** Every example runs as its own program in an empty folder and prints what is expected here. */
import { execFile } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { afterAll, describe, expect, test } from 'vitest'
import { Qcow2Image } from '../src/qcow2/image.ts'
import { describeWithQemu } from './support/qemu.ts'

const project = resolve(import.meta.dirname, '..')
const folder = join(project, 'examples')
const stream = gunzipSync(readFileSync(join(project, 'test/fixtures/captures/qemu100-savevm.vmstate.gz')))

// the tests run side by side: one folder for all, removed at the end
const work = mkdtempSync(join(tmpdir(), 'qcow2-examples-'))
afterAll(() => rmSync(work, { recursive: true }))

interface Outcome {
  readonly output: string
  readonly folder: string
}

/** Runs an example from its source, as the package would run it. */
function runExample(name: string, args: readonly string[] = [], input?: Uint8Array, env = process.env): Promise<Outcome> {
  const cwd = mkdtempSync(join(work, 'run-'))
  writeFileSync(join(cwd, 'vm.mig'), stream)
  const tsx = join(project, 'node_modules/.bin/tsx')
  return new Promise((done, fail) => {
    const child = execFile(tsx, ['--tsconfig', join(folder, 'tsconfig.json'), join(folder, name), ...args], { cwd, env, timeout: 100_000 }, (error, stdout, stderr) => {
      if (error === null) done({ output: stdout, folder: cwd })
      else fail(new Error(`${name}: ${stderr}`))
    })
    child.stdin?.end(input)
  })
}

/** Example -> how it is run and what must come of it. */
const expectations: Record<string, () => Promise<void>> = {
  'create-and-read.ts': async () => {
    const { output } = await runExample('create-and-read.ts')
    expect(output.split('\n').slice(0, 4)).toEqual(['hello', '0 10485760 unallocated', '10485760 65536 data', '10551296 56557568 unallocated'])
  },
  'snapshots.ts': async () => {
    const { output } = await runExample('snapshots.ts')
    expect(output).toBe('disk: after!  snapshot: before\napplied: before\n1 clean true\n')
  },
  'save-vm-state.ts': async () => {
    const outcome = await runExample('save-vm-state.ts', ['vm.mig'])
    expect(outcome.output).toBe('snapshot 1 "running": 3165338 bytes of VM state\n')
    expect(Buffer.compare(readFileSync(join(outcome.folder, 'copy.mig')), stream)).toBe(0)
  },
  'load-vm-state.ts': async () => {
    const { output } = await runExample('load-vm-state.ts', ['vm.mig'])
    expect(output).toContain('pc.ram 4194304 loaded\n')
    expect(output).toContain('pc.rom 131072 all zeroes\n')
    expect(output.split('\n')).toHaveLength(7)
  },
  'convert.ts': async () => {
    const { output, folder } = await runExample('convert.ts', ['vm.mig', 'out.qcow2'])
    expect(output).toMatch(/^3165338 bytes became \d{5,6}\n$/)
    await using image = await Qcow2Image.open(join(folder, 'out.qcow2'), { readOnly: true })
    expect(Buffer.compare(await image.read(0, stream.length), stream)).toBe(0)
  },
  'inspect-vm-state.ts': async () => {
    const { output } = await runExample('inspect-vm-state.ts', ['vm.mig'])
    expect(output).toContain('machine pc-i440fx-10.0\nRAM block pc.ram 4194304\n')
    expect(output).toContain('devices 31\n')
    // the guest's variables: a random number and its round, 69
    expect(output).toMatch(/first bytes at 1 MiB: [0-9a-f]{8}45000000/)
  },
  'walk-a-stream.ts': async () => {
    const { output } = await runExample('walk-a-stream.ts', [], stream)
    expect(output).toBe('machine pc-i440fx-10.0\n743 pages with data, 363 others\n')
  },
  'write-queue.ts': async () => {
    const outcome = await runExample('write-queue.ts')
    expect(outcome.output).toBe(`${2000 * 4104}\n`)
    const written = readFileSync(join(outcome.folder, 'stream.bin'))
    expect(written.length).toBe(2000 * 4104)
    expect(written.every((byte) => byte === 7)).toBe(true)
  },
  'simulated-disk.ts': async () => {
    const { output } = await runExample('simulated-disk.ts')
    expect(output).toBe('64 KiB, one at a time: 14.8 MB/s\n64 KiB, two in flight: 149.7 MB/s\n')
  },
  'trace-requests.ts': async () => {
    const { output } = await runExample('trace-requests.ts')
    expect(output).toMatch(/^write +\d+ \d+$/m)
    expect(output).toMatch(/^flush +0 0$/m)
  },
  'own-device.ts': async () => {
    const { output } = await runExample('own-device.ts')
    expect(output).toMatch(/^far away in \d+ pieces\n$/)
  },
  'handle-errors.ts': async () => {
    const { output } = await runExample('handle-errors.ts')
    expect(output.split('\n').map((line) => line.split(':')[0])).toEqual(['ERR_FORMAT', 'ERR_NOT_FOUND', 'caller', 'ERR_NOT_FOUND', 'ERR_IO', ''])
  },
  'check-and-repair.ts': async () => {
    const { output } = await runExample('check-and-repair.ts')
    expect(output).toBe('0 corruptions, 0 leaks, 16 clusters\n0 leaks fixed\n')
  },
  'serve-over-nbd.ts': async () => {
    const { output } = await runExample('serve-over-nbd.ts')
    expect(output).toBe('nbd+unix:///disk?socket=disk.sock\nover the wire\n')
  },
  'read-from-a-web-server.ts': async () => {
    const { output } = await runExample('read-from-a-web-server.ts')
    expect(output).toBe('from afar\n')
  },
}

const examples = readdirSync(folder).filter((file) => file.endsWith('.ts'))

test('every example is run here', () => {
  expect(Object.keys(expectations).sort()).toEqual([...examples].sort())
})

describe('examples', { concurrent: true, timeout: 60_000 }, () => {
  for (const [name, check] of Object.entries(expectations)) test(name, check)
})

describeWithQemu('save and revert', (qemu) => {
  test('the guest counts on, twice, from the memory saved while it ran', { timeout: 120_000 }, async () => {
    const { output } = await runExample('save-and-revert/run.ts', [], undefined, { ...process.env, QEMU: qemu.path('qemu-system-x86_64') })
    expect(output).toMatch(/saved between rounds \d+ and \d+/)
    expect(output.match(/revert: goes on at round \d+/g)).toHaveLength(2)
  })
})
