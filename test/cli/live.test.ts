/** `save`, `revert`, `capture` with a running guest, and `trace`. */
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join, relative } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { describe, expect, test } from 'vitest'
import { Guest } from '../support/guest.ts'
import { qemus } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

const qemu = qemus.at(-1)

describe.skipIf(qemu === undefined)('a running guest', () => {
  test('save, then revert into another QEMU: the guest goes on', async () => {
    const file = join(tempFolder(), 'warm.qcow2')
    const monitor = secondMonitor()
    const guest = await Guest.boot(qemu!, { args: monitor.args })
    const tick = await guest.run()
    const saved = await run(['save', '--output=json', '--fallback=stop', monitor.path, file])
    expect(saved).toMatchObject({ code: 0, stderr: '' })
    expect(JSON.parse(saved.stdout)).toMatchObject({ manifest: { running: true } })
    expect(existsSync(`${file}.json`)).toBe(true)
    await guest.run()
    await guest.kill()
    const other = secondMonitor()
    const next = await Guest.boot(qemu!, { incoming: 'defer', args: other.args })
    const reverted = await run(['revert', file, '--monitor', other.path, '--incoming', join(next.folder, 'incoming')])
    expect(reverted).toMatchObject({ code: 0, stderr: '' })
    expect(reverted.stdout).toMatch(/^the guest ran after \d+ ms/)
    await next.run()
    // how far the guest came until the instant of the save is not known, only between which rounds that was
    expect(next.ticks[0]).toBeGreaterThanOrEqual(tick)
    expect(next.ticks[0]).toBeLessThanOrEqual(guest.ticks.at(-1)! + 1)
    expect(next.errors).toEqual([])
  })
})

describe.skipIf(qemu === undefined)('save', () => {
  test('a VM with a disk: asked for, frozen by any name, or said to be left; paths are the caller\'s', async () => {
    const folder = tempFolder()
    const [disk, base, top] = ['disk.qcow2', 'base.qcow2', 'top.qcow2'].map((name) => join(folder, name)) as [string, string, string]
    await qemu!.imgOk('create', '-f', 'qcow2', disk, '1M')
    const monitor = secondMonitor()
    const guest = await Guest.boot(qemu!, { disks: [disk], args: monitor.args })
    await guest.run(1)
    const save = (...args: string[]): ReturnType<typeof run> => run(['save', '--fallback=stop', monitor.path, ...args])
    const refused = await save(base)
    expect(refused).toMatchObject({ code: 1, stderr: expect.stringMatching(/disk0 \(.*disk\.qcow2\).*--disks.*'all'.*'none'/) as string })
    expect(existsSync(base)).toBe(false)
    expect(await save(base, '--disks=all')).toMatchObject({ code: 0, stderr: '' })
    expect(existsSync(join(folder, 'disk-1.qcow2'))).toBe(true)
    const incremental = await save(top, '--disks=none', '--backing', relative(process.cwd(), base), '--receiver', folder, '--receiver-mode=660')
    expect(incremental).toMatchObject({ code: 0, stderr: expect.stringContaining('disk0') as string })
    expect(await qemu!.imgOk('info', '-U', top)).toMatch(/^backing file: base\.qcow2/m)
    expect(await save(top, '--disk', `d0=${disk}`)).toMatchObject({ code: 1, stderr: expect.stringContaining('disk.qcow2') as string })
    expect(await save(top, '--disks=none,d0')).toMatchObject({ code: 1, stderr: expect.stringContaining("'none' goes with no other name") as string })
    expect(await save(top, '--disks=none', '--receiver-mode=wide')).toMatchObject({ code: 1, stderr: expect.stringContaining('three octal digits') as string })
    await guest.run(1)
  })
})

/** A monitor that the test itself is not connected to: QEMU serves one client for each. */
function secondMonitor(): { path: string; args: string[] } {
  const path = join(tempFolder(), 'monitor')
  return { path, args: ['-chardev', `socket,id=second,path=${path},server=on,wait=off`, '-mon', 'chardev=second,mode=control'] }
}

describe('capture', () => {
  const stream = gunzipSync(readFileSync(join(import.meta.dirname, '../fixtures/captures/qemu100-precopy.mig.gz')))

  async function* pieces(bytes: Uint8Array): AsyncGenerator<Uint8Array, void, undefined> {
    for (let at = 0; at < bytes.length; at += 10_000) {
      yield bytes.subarray(at, at + 10_000)
      await Promise.resolve()
    }
  }

  test.each([
    ['a RAM image', [], (file: string): string => file],
    ['a stream', ['--as=stream'], (file: string): string => file],
  ])('stdin into %s', async (_name, options, saved) => {
    const folder = tempFolder()
    const file = join(folder, 'captured')
    const source = join(folder, 'source')
    writeFileSync(source, stream)
    const result = await run(['capture', '--output=json', ...options, '-', file], { stdin: pieces(stream) })
    expect(result).toMatchObject({ code: 0, stderr: '' })
    expect(JSON.parse(result.stdout)).toMatchObject({ bytes: stream.length })
    expect(existsSync(saved(file))).toBe(true)
  })

  test('a file into a snapshot, which vmstate then shows', async () => {
    const folder = tempFolder()
    const [source, image] = [join(folder, 'source'), join(folder, 'image')]
    writeFileSync(source, stream)
    await run(['create', '-q', '-f', 'qcow2', image, '4M'])
    expect(await run(['capture', '--as=snapshot', '--name=running', source, image])).toMatchObject({ code: 0, stderr: '' })
    expect(await run(['vmstate', 'diff', source, `${image}@running`])).toMatchObject({ code: 0, stdout: 'The VMs are equal.\n' })
  })

  test('a stream that was cut is refused, and nothing is kept', async () => {
    const folder = tempFolder()
    const image = join(folder, 'image')
    await run(['create', '-q', '-f', 'qcow2', image, '4M'])
    const result = await run(['capture', '--as=snapshot', '--name=running', '-', image], { stdin: pieces(stream.subarray(0, 100_000)) })
    expect(result.code).toBe(1)
    expect(result.stderr).toMatch(/^qcow2: .*\n$/)
    expect((await run(['snapshot', image])).stdout).toBe('')
  })

  test.each([
    ['capture - x --as=snapshot', '--as=snapshot needs --name'],
    ['capture - x --name=a', '--name goes with --as=snapshot'],
    ['revert x', '--incoming is needed'],
    ['save tcp:x y', "'tcp:x' is no address"],
    ['save /nonexistent x', 'qcow2: '],
  ])('%s is refused', async (line, message) => {
    const { code, stderr } = await run(line)
    expect(code).toBe(1)
    expect(stderr).toContain(message)
  })
})

describe('trace', () => {
  test('runs the command and draws its requests on stderr', async () => {
    const folder = tempFolder()
    const [raw, image] = [join(folder, 'raw'), join(folder, 'image')]
    writeFileSync(raw, Buffer.alloc(3 << 20, 5))
    const result = await run(['trace', 'convert', '-f', 'raw', '-O', 'qcow2', raw, image])
    expect(result).toMatchObject({ code: 0, stdout: '' })
    expect(result.stderr).toMatch(/raw: \d+ × read, 3 MiB\n/)
    expect(result.stderr).toMatch(/image: \d+ × write/)
    expect(result.stderr).toMatch(/│.*w/)
    const json = await run(['trace', '--output=json', 'check', '--output=json', image])
    expect(JSON.parse(json.stdout)).toMatchObject({ 'check-errors': 0 })
    const requests = json.stderr.trimEnd().split('\n').map((line) => JSON.parse(line) as { file: string; operation: string })
    expect(requests.every(({ file, operation }) => file === image && operation === 'read')).toBe(true)
  })

  test('sees what dd reads and writes', async () => {
    const folder = tempFolder()
    const [raw, part] = [join(folder, 'raw'), join(folder, 'part')]
    writeFileSync(raw, Buffer.alloc(1 << 20, 5))
    const { code, stderr } = await run(['trace', '--output=json', 'dd', '-f', 'raw', `if=${raw}`, `of=${part}`])
    expect(code).toBe(0)
    const requests = stderr.trimEnd().split('\n').map((line) => JSON.parse(line) as { file: string; operation: string })
    expect(new Set(requests.filter(({ operation }) => operation === 'write').map(({ file }) => file))).toEqual(new Set([part]))
    expect(new Set(requests.filter(({ operation }) => operation === 'read').map(({ file }) => file))).toEqual(new Set([raw]))
  })

  test('of nothing known is refused', async () => {
    expect((await run('trace chekc x')).stderr).toContain("did you mean 'check'?")
    expect((await run('trace')).stderr).toContain('COMMAND is missing')
  })
})
