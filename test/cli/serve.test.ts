/** Real qemu-io drives the engine through `serve`; real qemu-img judges what it leaves. */
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { copyFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { gunzipSync } from 'node:zlib'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { main } from '../../src/cli/main.ts'
import { Guest } from '../support/guest.ts'
import { qemus } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run, terminal } from './run.ts'

const qemu = qemus.at(-1)
const KiB = 1024
const MiB = 1024 * KiB

/** Serves in this process until the test ends or `stop` is called. */
async function serve(...args: string[]): Promise<{ uri: string; stop: () => Promise<number> }> {
  const socket = join(tempFolder(), 'nbd')
  const interrupt = new AbortController()
  const ended = run(['serve', '--socket', socket, ...args], { signal: interrupt.signal })
  const failed = ended.then(({ stderr }) => Promise.reject(new Error(stderr)))
  failed.catch(() => undefined)
  while (!existsSync(socket)) await Promise.race([failed, new Promise((resolve) => setTimeout(resolve, 2))])
  const stop = async (): Promise<number> => {
    interrupt.abort()
    const { code, stderr } = await ended
    expect(stderr).toBe('')
    return code
  }
  onTestFinished(() => interrupt.abort())
  return { uri: `nbd+unix:///?socket=${socket}`, stop }
}

interface Shape {
  readonly size: number
  readonly create: string
  readonly clusterSize: number
  readonly backing: boolean
  /** Discarded clusters read as zeroes. */
  readonly discards: boolean
}

const shapes: readonly Shape[] = [
  { size: 4 * MiB, create: 'cluster_size=64k', clusterSize: 64 * KiB, backing: false, discards: true },
  { size: 4 * MiB + 512, create: 'cluster_size=4k', clusterSize: 4 * KiB, backing: false, discards: true },
  { size: MiB, create: 'cluster_size=512', clusterSize: 512, backing: false, discards: true },
  { size: 6 * MiB, create: 'cluster_size=2M', clusterSize: 2 * MiB, backing: false, discards: true },
  { size: 4 * MiB, create: 'extended_l2=on,cluster_size=16k', clusterSize: 16 * KiB, backing: false, discards: true },
  { size: 4 * MiB, create: 'extended_l2=on', clusterSize: 64 * KiB, backing: true, discards: true },
  { size: 4 * MiB, create: 'compat=0.10', clusterSize: 64 * KiB, backing: false, discards: true },
  { size: 4 * MiB, create: 'compat=0.10', clusterSize: 64 * KiB, backing: true, discards: false },
  { size: 5 * MiB, create: 'cluster_size=32k', clusterSize: 32 * KiB, backing: true, discards: true },
  { size: 2 * MiB, create: 'refcount_bits=1', clusterSize: 64 * KiB, backing: false, discards: true },
  { size: 2 * MiB, create: 'refcount_bits=64,cluster_size=8k', clusterSize: 8 * KiB, backing: true, discards: true },
  { size: 4 * MiB, create: 'lazy_refcounts=on', clusterSize: 64 * KiB, backing: false, discards: true },
  { size: 2 * MiB, create: 'preallocation=metadata', clusterSize: 64 * KiB, backing: false, discards: true },
]

interface Step {
  readonly op: 'write' | 'aio' | 'fua' | 'zero' | 'unmap' | 'discard' | 'flush'
  readonly at: number
  readonly length: number
  readonly pattern: number
}

const step: fc.Arbitrary<Step> = fc.record({
  op: fc.constantFrom<Step['op']>('write', 'write', 'write', 'aio', 'fua', 'zero', 'unmap', 'discard', 'flush'),
  at: fc.double({ min: 0, max: 1, noNaN: true, maxExcluded: true }),
  length: fc.double({ min: 0, max: 1, noNaN: true }),
  pattern: fc.integer({ min: 1, max: 255 }),
})

/** A step as a qemu-io command, done to the model too. */
function command(shape: Shape, model: Uint8Array, { op, at, length: part, pattern }: Step): string {
  const unit = op === 'discard' ? shape.clusterSize : 512
  const offset = Math.floor((at * shape.size) / unit) * unit
  const most = Math.min(shape.size - offset, Math.max(unit, 8 * shape.clusterSize, 64 * KiB))
  const length = Math.max(Math.min(unit, most), Math.floor((part * most) / unit) * unit)
  switch (op) {
    case 'flush':
      return 'flush'
    case 'discard':
      if (!shape.discards) return 'flush'
      model.fill(0, offset, offset + length)
      return `discard ${offset} ${length}`
    case 'zero':
    case 'unmap':
      model.fill(0, offset, offset + length)
      return `write -z${op === 'unmap' ? ' -u' : ''} ${offset} ${length}`
    default:
      model.fill(pattern, offset, offset + length)
      return `${op === 'aio' ? 'aio_write' : 'write'}${op === 'fua' ? ' -f' : ''} -P ${pattern} ${offset} ${length}`
  }
}

/** Reads the whole disk back through the client, run by run of the model. */
function readsOf(model: Uint8Array): string[] {
  const reads: string[] = []
  for (let at = 0; at < model.length && reads.length < 40; ) {
    let end = at + 512
    while (end < model.length && model[end] === model[at]) end += 512
    reads.push(`read -P ${model[at]!} ${at} ${Math.min(end, model.length) - at}`)
    at = end
  }
  return reads
}

async function drive(shape: Shape, steps: readonly Step[]): Promise<void> {
  const folder = tempFolder()
  const [image, base, raw] = ['image', 'base', 'model'].map((name) => join(folder, name)) as [string, string, string]
  const model = new Uint8Array(shape.size)
  if (shape.backing) {
    await qemu!.imgOk('create', '-f', 'qcow2', base, String(Math.floor(shape.size / 2 / 512) * 512))
    expect(await qemu!.io('-c', `write -P 201 64k ${512 * KiB}`, base)).toMatchObject({ code: 0 })
    model.fill(201, 64 * KiB, 64 * KiB + 512 * KiB)
  }
  const backing = shape.backing ? ['-b', base, '-F', 'qcow2'] : []
  expect(await run(['create', '-q', '-f', 'qcow2', '-o', shape.create, ...backing, image, String(shape.size)])).toMatchObject({ code: 0, stderr: '' })
  const { uri, stop } = await serve(image)
  // overlapping requests in flight land in no particular order: each aio is waited for before the next step
  const commands = steps.flatMap((each) => [command(shape, model, each), ...(each.op === 'aio' ? ['aio_flush'] : [])])
  const result = await qemu!.io('-d', 'unmap', '-f', 'raw', uri, ...[...commands, ...readsOf(model)].flatMap((line) => ['-c', line]))
  expect(result.stdout).not.toMatch(/verification failed|failed:/)
  expect(result).toMatchObject({ code: 0 })
  expect(await stop()).toBe(0)
  writeFileSync(raw, model)
  expect(await qemu!.img('check', image), JSON.stringify(commands)).toMatchObject({ code: 0 })
  expect(await qemu!.img('compare', '-f', 'qcow2', '-F', 'raw', image, raw), JSON.stringify(commands)).toMatchObject({ code: 0 })
}

const handPicked: readonly (readonly [string, number, readonly Step[]])[] = [
  ['one sector in the middle of a cluster', 0, [{ op: 'write', at: 0.51, length: 0, pattern: 7 }]],
  ['the last, short cluster', 1, [{ op: 'write', at: 0.9999, length: 1, pattern: 8 }, { op: 'zero', at: 0.9999, length: 1, pattern: 1 }, { op: 'fua', at: 0.9999, length: 1, pattern: 9 }]],
  ['zeroes over data over zeroes', 0, [{ op: 'zero', at: 0.2, length: 1, pattern: 1 }, { op: 'write', at: 0.22, length: 0.3, pattern: 5 }, { op: 'unmap', at: 0.21, length: 0.5, pattern: 1 }]],
  ['discard, then part of it again', 0, [{ op: 'write', at: 0, length: 1, pattern: 3 }, { op: 'discard', at: 0, length: 1, pattern: 1 }, { op: 'write', at: 0.01, length: 0.01, pattern: 4 }]],
  ['a sector over a backing file', 8, [{ op: 'write', at: 0.03, length: 0, pattern: 6 }, { op: 'flush', at: 0, length: 0, pattern: 1 }]],
  ['zeroes over a backing file', 8, [{ op: 'zero', at: 0.01, length: 0.5, pattern: 1 }]],
  ['a discard hides the backing file', 8, [{ op: 'discard', at: 0.02, length: 0.9, pattern: 1 }]],
  ['subclusters of one cluster', 5, [0.1, 0.101, 0.103, 0.106].map((at) => ({ op: 'write' as const, at, length: 0, pattern: 11 }))],
  ['many refcount blocks', 2, Array.from({ length: 12 }, (_, n) => ({ op: 'write' as const, at: n / 12, length: 1, pattern: n + 1 }))],
  ['one-bit refcounts freed and taken again', 9, [{ op: 'write', at: 0, length: 1, pattern: 1 }, { op: 'discard', at: 0, length: 1, pattern: 1 }, { op: 'write', at: 0.5, length: 1, pattern: 2 }]],
]

describe.skipIf(qemu === undefined)('qemu-io through serve', () => {
  test.each(handPicked)('%s', (_name, shape, steps) => drive(shapes[shape]!, steps))

  const count = process.env['QCOW2_LONG'] === '1' ? 1000 : 96
  const cases = fc.sample(fc.tuple(fc.nat(shapes.length - 1), fc.array(step, { minLength: 3, maxLength: 14 })), { numRuns: count, seed: 20_260_101 })
  test.each(Array.from({ length: 8 }, (_, part) => part))(`generated scenarios, part %i of ${count / 8} each`, async (part) => {
    const mine = cases.slice((part * count) / 8, ((part + 1) * count) / 8)
    const three = [0, 1, 2].map((start) => mine.filter((_, at) => at % 3 === start))
    await Promise.all(three.map(async (some) => {
      for (const [shape, steps] of some) await drive(shapes[shape]!, steps)
    }))
  })

  test('several qemu-io at once on one image', async () => {
    const image = join(tempFolder(), 'image')
    await run(['create', '-q', '-f', 'qcow2', image, '8M'])
    const { uri, stop } = await serve(image)
    const client = (n: number): Promise<unknown> =>
      qemu!.io('-f', 'raw', uri, ...Array.from({ length: 8 }, (_, i) => ['-c', `write -P ${n * 8 + i + 1} ${(n * 8 + i) * 64}k 64k`]).flat(), '-c', 'flush')
    for (const result of await Promise.all([0, 1, 2, 3].map(client))) expect(result).toMatchObject({ code: 0 })
    expect(await stop()).toBe(0)
    const reads = Array.from({ length: 32 }, (_, n) => ['-c', `read -P ${n + 1} ${n * 64}k 64k`]).flat()
    const check = await qemu!.io('-f', 'qcow2', '-r', image, ...reads)
    expect(check.stdout).not.toContain('failed')
    await qemu!.imgOk('check', image)
  })

  test('a snapshot is served read-only, as it was', async () => {
    const image = join(tempFolder(), 'image')
    await qemu!.imgOk('create', '-q', '-f', 'qcow2', image, '4M')
    await qemu!.io('-c', 'write -P 1 0 1M', image)
    await run(['snapshot', '-c', 'before', image])
    await qemu!.io('-c', 'write -P 2 0 1M', image)
    const { uri, stop } = await serve(`${image}@before`)
    expect((await qemu!.io('-r', '-f', 'raw', uri, '-c', 'read -P 1 0 1M')).stdout).not.toContain('failed')
    expect((await qemu!.io('-f', 'raw', uri, '-c', 'write 0 512')).code).not.toBe(0)
    expect(await stop()).toBe(0)
  })

  test('a bitmap that QEMU filled is told to clients', async () => {
    const image = join(tempFolder(), 'image')
    await qemu!.imgOk('create', '-q', '-f', 'qcow2', image, '4M')
    await qemu!.imgOk('bitmap', '--add', image, 'b0')
    await qemu!.io('-c', 'write 1M 64k', '-c', 'write 3M 128k', image)
    const { uri, stop } = await serve('--bitmap', 'b0', '--read-only', image)
    const map = await new Promise<string>((resolve, reject) => {
      execFile('nbdinfo', ['--json', '--map=qemu:dirty-bitmap:b0', uri], (error, stdout) => {
        if (error === null) resolve(stdout)
        else reject(error)
      })
    })
    expect((JSON.parse(map) as { offset: number; length: number; type: number }[]).filter(({ type }) => type === 1)).toMatchObject([
      { offset: MiB, length: 64 * KiB },
      { offset: 3 * MiB, length: 128 * KiB },
    ])
    expect(await stop()).toBe(0)
  })

  test('the VM state and a RAM block of a snapshot are served', async () => {
    const folder = tempFolder()
    const image = join(folder, 'vm')
    const captures = join(import.meta.dirname, '../fixtures/captures')
    writeFileSync(image, gunzipSync(readFileSync(join(captures, 'qemu100-savevm.qcow2.gz'))))
    const state = gunzipSync(readFileSync(join(captures, 'qemu100-savevm.vmstate.gz')))
    const stateServer = await serve('--vmstate', `${image}@snap1`)
    const copy = join(folder, 'state')
    await qemu!.imgOk('convert', '-f', 'raw', '-O', 'raw', stateServer.uri, copy)
    expect(Buffer.compare(readFileSync(copy).subarray(0, state.length), state)).toBe(0)
    expect(await stateServer.stop()).toBe(0)
    const ramServer = await serve('--ram', 'pc.ram', `${image}@snap1`)
    expect(JSON.parse(await qemu!.imgOk('info', '--output=json', ramServer.uri))).toMatchObject({ 'virtual-size': 4 * MiB })
    expect(await ramServer.stop()).toBe(0)
  })

  test('a virtual machine has the served image as its drive and reads what is in it', async () => {
    const image = join(tempFolder(), 'image')
    await qemu!.imgOk('create', '-q', '-f', 'qcow2', image, '4M')
    await qemu!.io('-c', 'write -P 90 1M 64k', image)
    const { uri, stop } = await serve(image)
    const guest = await Guest.boot(qemu!, { args: ['-drive', `if=none,id=disk,format=raw,file=${uri}`, '-device', 'ide-hd,drive=disk'] })
    await guest.run()
    const blocks = (await guest.qmp.execute('query-block')) as unknown as { device: string; inserted?: { image: object } }[]
    expect(blocks.find(({ device }) => device === 'disk')?.inserted?.image).toMatchObject({ 'virtual-size': 4 * MiB })
    const onDisk = (line: string): Promise<unknown> => guest.qmp.execute('human-monitor-command', { 'command-line': `qemu-io disk "${line}"` })
    expect(await onDisk('read -P 90 1M 64k')).not.toContain('failed')
    expect(await onDisk('write -P 91 2M 64k')).not.toContain('failed')
    await guest.run()
    await guest.qmp.execute('quit')
    await guest.exited()
    expect(await stop()).toBe(0)
    expect((await qemu!.io('-r', image, '-c', 'read -P 91 2M 64k')).stdout).not.toContain('failed')
    await qemu!.imgOk('check', image)
  })
})

describe('serve', () => {
  test.each([
    ['serve x', 'one of --socket and --port is needed'],
    ['serve x --socket a --port 1', 'one of --socket and --port is needed'],
    ['serve x --port 99999', '--port expects a number'],
    ['serve x --port 0 --max-connections 0', '--max-connections expects'],
    ['serve x --port 0 --idle-timeout -5', '--idle-timeout'],
    ['serve x --port 0 --idle-timeout x', '--idle-timeout expects seconds'],
    ['serve /nonexistent --port 0', "Could not open '/nonexistent': No such file or directory"],
  ])('%s is refused', async (line, message) => {
    const { code, stderr } = await run(line)
    expect(code).toBe(1)
    expect(stderr).toContain(message)
  })

  test('--once ends with the last client', async () => {
    const image = join(tempFolder(), 'image')
    await run(['create', '-q', '-f', 'qcow2', image, '1M'])
    const socket = join(tempFolder(), 'nbd')
    const ended = run(['serve', '--once', '--name', 'disk', '--socket', socket, image])
    while (!existsSync(socket)) await new Promise((resolve) => setTimeout(resolve, 2))
    await new Promise((resolve) => execFile('nbdinfo', ['--size', `nbd+unix:///disk?socket=${socket}`], resolve))
    expect(await ended).toMatchObject({ code: 0, stdout: `nbd+unix:///disk?socket=${socket}\n` })
  })

  test('our own commands read an export', async () => {
    const folder = tempFolder()
    const image = join(folder, 'image')
    await run(['create', '-q', '-f', 'qcow2', image, '1M'])
    copyFileSync(image, join(folder, 'copy'))
    const { uri, stop } = await serve(image)
    const { stdout, code } = await run(['map', '--output=json', '-f', 'raw', uri])
    expect(code).toBe(0)
    expect(JSON.parse(stdout)).toMatchObject([{ start: 0, length: MiB, data: false, zero: true }])
    expect(await stop()).toBe(0)
  })

  test('what --bind ::1 prints can be opened, and a name with an @ can be written', async () => {
    const image = join(tempFolder(), 'disk@home.qcow2')
    await run(['create', '-q', '-f', 'qcow2', image, '1M'])
    const sink = terminal()
    const interrupt = new AbortController()
    const ended = main(['serve', '--port', '0', '--bind', '::1', '--name', 'x@y', image], { ...sink, signal: interrupt.signal })
    await expect.poll(() => sink.stdout.bytes.toString(), { timeout: 10_000 }).toMatch(/^nbd:\/\/\[::1\]:\d+\/x%40y\n$/)
    const uri = sink.stdout.bytes.toString().trim()
    expect(await run(['info', uri])).toMatchObject({ code: 0 })
    const source = join(tempFolder(), 'source')
    writeFileSync(source, new Uint8Array(MiB).fill(7))
    expect(await run(['convert', '-n', '-f', 'raw', '-O', 'raw', source, uri])).toMatchObject({ code: 0, stderr: '' })
    interrupt.abort()
    expect(await ended).toBe(0)
    expect(await run(['compare', '-f', 'raw', source, image])).toMatchObject({ code: 0 })
  })

  test('a dead socket is replaced; a live one and a missing folder are told', async () => {
    const folder = tempFolder()
    const image = join(folder, 'image')
    await run(['create', '-q', '-f', 'qcow2', image, '1M'])
    const { uri } = await serve(image)
    const path = uri.slice(uri.indexOf('=') + 1)
    const again = await run(['serve', '--read-only', '--force-share', '--socket', path, image])
    expect(again).toMatchObject({ code: 1 })
    expect(again.stderr).toContain('another server listens')
    expect((await run(['serve', '--read-only', '--socket', join(folder, 'no/nbd'), image])).stderr).toContain('there is no folder')
    expect((await run(['serve', '--read-only', '--socket', join(folder, 'x'.repeat(120)), image])).stderr).toContain('at most 107 bytes')
  })

  const program = ['--import', 'tsx', join(import.meta.dirname, '../../src/cli.ts')]

  test.skipIf(!existsSync('/usr/bin/nbdcopy'))('a socket that is handed over is served (LISTEN_FDS)', async () => {
    const folder = tempFolder()
    const [image, source, copy] = ['image', 'source', 'copy'].map((name) => join(folder, name)) as [string, string, string]
    writeFileSync(source, new Uint8Array(MiB).fill(9))
    await run(['convert', '-f', 'raw', '-O', 'qcow2', source, image])
    const failure = await new Promise((resolve) => {
      execFile('nbdcopy', ['--', '[', process.execPath, ...program, 'serve', image, ']', copy], { timeout: 60_000 }, (error, stdout, stderr) => resolve(error === null ? stdout : stderr))
    })
    expect(failure).toBe('')
    expect(Buffer.compare(readFileSync(copy), readFileSync(source))).toBe(0)
  })

  test('several sockets, and an address besides, are refused', async () => {
    const handed = (count: string): Record<string, string> => ({ LISTEN_PID: String(process.pid), LISTEN_FDS: count })
    expect((await run('serve x', { env: handed('2') })).stderr).toContain('LISTEN_FDS=2')
    expect((await run('serve x --port 0', { env: handed('1') })).stderr).toContain('handed over')
    expect((await run('serve x', { env: { ...handed('1'), LISTEN_PID: '1' } })).stderr).toContain('one of --socket and --port')
  })

  test('SIGHUP ends it as SIGTERM does: flushed, and its socket removed', async () => {
    const folder = tempFolder()
    const [image, socket] = [join(folder, 'image'), join(folder, 'nbd')]
    await run(['create', '-q', '-f', 'qcow2', image, '1M'])
    const child = spawn(process.execPath, [...program, 'serve', '--socket', socket, image], { stdio: ['ignore', 'pipe', 'inherit'] })
    onTestFinished(() => void child.kill('SIGKILL'))
    await once(child.stdout, 'data')
    child.kill('SIGHUP')
    const [code] = (await once(child, 'exit')) as [number]
    expect(code).toBe(0)
    expect(existsSync(socket)).toBe(false)
  })
})
