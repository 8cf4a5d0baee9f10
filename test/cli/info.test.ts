/** What is shown of an image: of one snapshot, of bitmaps that are lost, with names that somebody else chose. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { trace, type TracedRequest } from '../../src/block/trace.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run, terminal } from './run.ts'
import { main } from '../../src/cli/main.ts'

async function snapshotted(): Promise<string> {
  const path = join(tempFolder(), 'disk')
  await run(['create', '-q', '-f', 'qcow2', path, '1M'])
  await run(['snapshot', '-c', 'small', path])
  await run(['resize', '-q', path, '2M'])
  await run(['snapshot', '-c', 'large', path])
  return path
}

describe('IMAGE@SNAPSHOT', () => {
  test('is taken by every command that only reads', async () => {
    const path = await snapshotted()
    for (const argv of [['info'], ['check'], ['map'], ['measure', '-O', 'qcow2'], ['compare', `${path}@small`], ['vmstate', 'ls']]) {
      const { code, stderr } = await run([...argv, argv[0] === 'vmstate' ? path : `${path}@small`])
      expect([argv[0], code, stderr]).toEqual([argv[0], 0, ''])
    }
  })

  test('info: the snapshot alone, with the size of its disk; by name or id', async () => {
    const path = await snapshotted()
    for (const name of ['small', '1']) {
      const { stdout } = await run(['info', '--output=json', `${path}@${name}`])
      expect(JSON.parse(stdout)).toMatchObject({ filename: `${path}@${name}`, 'virtual-size': 1 << 20, snapshots: [{ name: 'small' }] })
    }
    expect(JSON.parse((await run(['info', '--output=json', path])).stdout)).toMatchObject({ 'virtual-size': 2 << 20, snapshots: [{ name: 'small' }, { name: 'large' }] })
  })

  test.each(['info', 'check'])('%s: a snapshot that is not there is named, with those that are', async (command) => {
    const path = await snapshotted()
    const { code, stderr } = await run([command, `${path}@nope`])
    expect(code).toBe(1)
    expect(stderr).toContain('the image has no snapshot "nope"; it has small, large')
  })

  test('check -r of a snapshot is refused', async () => {
    const path = await snapshotted()
    expect(await run(['check', '-r', 'all', `${path}@small`])).toMatchObject({ code: 1, stderr: expect.stringContaining('a snapshot can only be read') as string })
  })
})

describe('bitmaps that another program made invalid', () => {
  /** A program that does not know bitmaps clears all autoclear bits. */
  async function invalidated(): Promise<string> {
    const path = join(tempFolder(), 'disk')
    await run(['create', '-q', '-f', 'qcow2', path, '1M'])
    await run(['bitmap', '--add', path, 'daily'])
    const bytes = readFileSync(path)
    bytes.writeBigUInt64BE(0n, 88)
    writeFileSync(path, bytes)
    return path
  }

  test.each([['info'], ['check'], ['map'], ['compare'], ['convert']])('%s says so', async (command) => {
    const path = await invalidated()
    const more = command === 'compare' ? [path] : command === 'convert' ? [join(tempFolder(), 'out')] : []
    const { stderr } = await run([command, path, ...more])
    expect(stderr).toContain(`qcow2: warning: ${path}: a program that does not know bitmaps has changed this image`)
  })

  test('the library says so, and a sound image does not', async () => {
    const path = await invalidated()
    expect(await readImageInfo(path)).toMatchObject({ bitmaps: [], bitmapsInvalid: true })
    await using image = await Qcow2Image.open(path, { readOnly: true })
    expect(image.bitmaps.invalid).toBe(true)
    const good = join(tempFolder(), 'disk')
    await run(['create', '-q', '-f', 'qcow2', good, '1M'])
    expect(await readImageInfo(good)).toMatchObject({ bitmapsInvalid: false })
    await run(['bitmap', '--add', good, 'daily'])
    expect(await readImageInfo(good)).toMatchObject({ bitmapsInvalid: false, bitmaps: [{ name: 'daily' }] })
    expect((await run(['info', good])).stderr).toBe('')
  })
})

describeWithQemu('bitmaps that qemu-img calls inconsistent', (qemu) => {
  test('are warned of here too', async () => {
    const path = join(tempFolder(), 'disk')
    await qemu.imgOk('create', '-q', '-f', 'qcow2', path, '1M')
    await qemu.imgOk('bitmap', '--add', path, 'daily')
    const bytes = readFileSync(path)
    bytes.writeBigUInt64BE(0n, 88)
    writeFileSync(path, bytes)
    expect((await qemu.img('info', path)).stderr).toContain('warning')
    expect((await run(['info', path])).stderr).toContain('warning')
  })
})

test('the facts of an image with snapshots are JSON', async () => {
  const device = new MemoryDevice(0, { growable: true })
  await using image = await Qcow2Image.create(device, { size: 1 << 20 })
  const made = await image.snapshots.create({ name: 'one', vmClock: 2n ** 60n + 1n, icount: 7n })
  await image.flush()
  const parsed = JSON.parse(JSON.stringify(await readImageInfo(device))) as { snapshots: object[] }
  expect(parsed.snapshots).toMatchObject([{ name: 'one', vmClock: '1152921504606846977', icount: '7', diskSize: 1 << 20 }])
  expect(JSON.parse(JSON.stringify([...image.snapshots]))).toEqual(parsed.snapshots)
  expect(Object.keys(made)).not.toContain('toJSON')
})

describe('names that somebody else chose', () => {
  const escape = '\u001b]0;title\u0007\u001b[2K\u009bm\u202e'
  const hostile = `evil\nfile format: raw\r${escape}`

  async function withHostileNames(): Promise<string> {
    const path = join(tempFolder(), 'disk')
    await run(['create', '-q', '-u', '-f', 'qcow2', '-b', `base${escape}`, '-F', 'raw', path, '1M'])
    await using image = await Qcow2Image.open(path, { backing: new MemoryDevice(0) })
    await image.snapshots.create({ name: hostile })
    return path
  }

  const control = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/

  test.each([['info'], ['snapshot', '-l'], ['vmstate', 'show'], ['check']])('%s %s: on a terminal they stay on their line and do nothing', async (...command) => {
    const path = await withHostileNames()
    for (const name of [path, `${path}@${hostile}x`]) {
      const ours = terminal({ tty: true, env: { NO_COLOR: '1' } })
      await main([...command, name], ours)
      const text = ours.stdout.bytes.toString() + ours.stderr.bytes.toString()
      expect(text).not.toMatch(control)
      if (name === path) expect(text.split('\n').filter((line) => line === 'file format: raw')).toEqual([])
    }
  })

  test('a program gets them as they are', async () => {
    const path = await withHostileNames()
    expect((await run(['snapshot', '-l', path])).stdout).toContain(hostile)
    const { stdout } = await run(['info', '--output=json', path], { tty: true })
    expect(JSON.parse(stdout)).toMatchObject({ snapshots: [{ name: hostile }] })
  })
})

test('a snapshot record with a damaged length costs a look at the file, not 128 MiB', async () => {
  const device = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(device, { size: 1 << 20 })
  await image.snapshots.create({ name: 's' })
  await image.close()
  const bytes = device.bytes.slice()
  const view = new DataView(bytes.buffer)
  view.setUint32(Number(view.getBigUint64(64)) + 36, 0xffff_ffff)
  const log: TracedRequest[] = []
  await expect(checkImage(trace(new MemoryDevice(bytes), log))).rejects.toMatchObject({ code: 'ERR_FORMAT' })
  expect(log.length).toBeLessThan(8)
})

describe('a name that says qcow2 for an image that will be raw', () => {
  test('is warned of, unless raw was asked for or qemu-img was called', async () => {
    const folder = tempFolder()
    const [path, copy] = [join(folder, 'disk.qcow2'), join(folder, 'copy.qcow2')]
    expect((await run(['create', path, '1M'])).stderr).toContain(`${path} becomes a raw image`)
    expect((await run(['convert', '-f', 'raw', path, copy])).stderr).toContain(`${copy} becomes a raw image`)
    expect((await run(['dd', '-f', 'raw', `if=${path}`, `of=${copy}`])).stderr).toContain(`${copy} becomes a raw image`)
    expect((await run(['create', '-f', 'raw', path, '1M'])).stderr).toBe('')
    expect((await run(['create', join(folder, 'disk.img'), '1M'])).stderr).toBe('')
    expect((await run(['create', path, '1M'], { program: 'qemu-img' })).stderr).toBe('')
  })
})

test('an unknown word after vmstate points at its help', async () => {
  expect((await run('vmstate shwo x')).stderr).toBe("qcow2: Command not found: vmstate shwo; did you mean 'show'? (see 'qcow2 vmstate --help')\n")
})

test('a value that is not one of the choices: with a comma, or as qemu-img writes it', async () => {
  expect((await run('info --output=yaml x')).stderr).toContain("--output expects 'human' or 'json', not 'yaml'")
  expect((await run('info --output=yaml x', { program: 'qemu-img' })).stderr).toBe("qemu-img: --output expects 'human' or 'json' not 'yaml'\n")
})
