/** Files made anew: what has a name keeps its content until the new file is whole, and nobody's file is replaced under them. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, existsSync, linkSync, lstatSync, mkdirSync, openSync, closeSync, readdirSync, readFileSync, statSync, symlinkSync, unlinkSync, writeFileSync } from 'node:fs'
import { join, relative } from 'node:path'
import { expect, test } from 'vitest'
import { claim } from '../../src/block/file-claim.ts'
import { assertVacant } from '../../src/block/file-gate.ts'
import { mountPoints, parseMountDevice } from '../../src/block/file-mount.ts'
import { newFile } from '../../src/block/file-new.ts'
import { openFile } from '../../src/block/file.ts'
import { Qcow2Error } from '../../src/core/errors.ts'
import { openPaths } from '../support/descriptors.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)
const codeOf = (task: Promise<unknown>): Promise<string> =>
  task.then(() => 'no error', (error: unknown) => (Qcow2Error.is(error) ? error.code : String(error)))

async function replace(path: string, text: string, options: Parameters<typeof newFile>[1] = {}): Promise<void> {
  const file = await newFile(path, options)
  try {
    await file.device.write(0, bytes(text))
    await file.keep()
  } finally {
    await file.discard()
  }
}

test('the old file stays until the new one is kept, and for good when it is not', async () => {
  const folder = tempFolder()
  const path = join(folder, 'a')
  writeFileSync(path, 'old')
  const file = await newFile(path)
  await file.device.write(0, bytes('new content'))
  expect(readFileSync(path, 'utf8')).toBe('old')
  await file.discard()
  expect(readFileSync(path, 'utf8')).toBe('old')
  await replace(path, 'new')
  expect(readFileSync(path, 'utf8')).toBe('new')
  expect(readdirSync(folder)).toEqual(['a'])
})

test('an absent file appears whole, and the device stays open under its name', async () => {
  const path = join(tempFolder(), 'a')
  const file = await newFile(path)
  expect(existsSync(path)).toBe(false)
  await file.keep({ folder: 'with next flush' })
  expect(file.device.path).toBe(path)
  await file.device.write(0, bytes('x'))
  await file.device.flush()
  await file.device.close()
  expect(readFileSync(path, 'utf8')).toBe('x')
})

test('a link stays a link, also one that leads nowhere yet; other names of the old file keep its content', async () => {
  const folder = tempFolder()
  mkdirSync(join(folder, 'below'))
  writeFileSync(join(folder, 'below/real'), 'old')
  linkSync(join(folder, 'below/real'), join(folder, 'hard'))
  symlinkSync('below/real', join(folder, 'link'))
  symlinkSync('link', join(folder, 'second'))
  await replace(join(folder, 'second'), 'new')
  expect(readFileSync(join(folder, 'below/real'), 'utf8')).toBe('new')
  expect(readFileSync(join(folder, 'hard'), 'utf8')).toBe('old')
  expect(lstatSync(join(folder, 'second')).isSymbolicLink()).toBe(true)
  symlinkSync('below/made', join(folder, 'dangling'))
  await replace(relative(process.cwd(), join(folder, 'dangling')), 'made')
  expect(readFileSync(join(folder, 'below/made'), 'utf8')).toBe('made')
  symlinkSync('circle', join(folder, 'circle'))
  expect(await codeOf(newFile(join(folder, 'circle')))).not.toBe('no error')
  expect(readdirSync(folder).sort()).toEqual(['below', 'circle', 'dangling', 'hard', 'link', 'second'])
})

test('permissions: of the file that is replaced, or as asked', async () => {
  const path = join(tempFolder(), 'a')
  writeFileSync(path, 'old')
  chmodSync(path, 0o640)
  await replace(path, 'new')
  expect(statSync(path).mode & 0o777).toBe(0o640)
  await replace(path, 'secret', { mode: 0o600 })
  expect(statSync(path).mode & 0o777).toBe(0o600)
  const fresh = `${path}2`
  const file = await newFile(fresh, { mode: 0o600 })
  for (const name of readdirSync(join(fresh, '..'))) expect(statSync(join(fresh, '..', name)).mode & 0o077, name).toBe(0)
  await file.discard()
})

test('exclusive refuses what is there, links too, and what is made meanwhile', async () => {
  const folder = tempFolder()
  const path = join(folder, 'a')
  symlinkSync('nowhere', path)
  expect(await codeOf(newFile(path, { exclusive: true }))).toBe('ERR_EXISTS')
  unlinkSync(path)
  const file = await newFile(path, { exclusive: true })
  writeFileSync(path, 'another program')
  expect(await codeOf(file.keep())).toBe('ERR_EXISTS')
  await file.discard()
  expect(readFileSync(path, 'utf8')).toBe('another program')
  expect(readdirSync(folder)).toEqual(['a'])
})

test('a file that another program puts in the place of the old one meanwhile is not replaced', async () => {
  const path = join(tempFolder(), 'a')
  writeFileSync(path, 'old')
  const file = await newFile(path)
  writeFileSync(`${path}-2`, 'another program')
  unlinkSync(path)
  linkSync(`${path}-2`, path)
  expect(await codeOf(file.keep())).toBe('ERR_EXISTS')
  await file.discard()
  expect(readFileSync(path, 'utf8')).toBe('another program')
})

test('what this process has open is neither replaced nor emptied, by no name', async () => {
  const folder = tempFolder()
  const path = join(folder, 'a')
  writeFileSync(path, 'input')
  linkSync(path, join(folder, 'hard'))
  symlinkSync('hard', join(folder, 'soft'))
  const input = await openFile(path, { readOnly: true })
  const fd = openSync(path, 'r')
  try {
    for (const name of [path, join(folder, 'hard'), join(folder, 'soft'), `/proc/self/fd/${fd}`, relative(process.cwd(), path), join(folder, '.', 'a')]) {
      expect(await codeOf(newFile(name)), name).toBe('ERR_BUSY')
      expect(await codeOf(openFile(name, { create: 'w' })), name).toBe('ERR_BUSY')
      expect(await codeOf(assertVacant(name)), name).toBe('ERR_EXISTS')
    }
    expect(readFileSync(path, 'utf8')).toBe('input')
    await (await openFile(path, { create: 'w', locking: false })).close()
    expect(readFileSync(path, 'utf8')).toBe('')
  } finally {
    closeSync(fd)
    await input.close()
  }
  await replace(path, 'free again')
})

test('one new file of a name at a time', async () => {
  const path = join(tempFolder(), 'a')
  const first = await newFile(path)
  expect(await codeOf(newFile(path))).toBe('ERR_BUSY')
  await first.discard()
  await (await newFile(path)).discard()
})

test('failures leave no file, no descriptor and no claim', async () => {
  const folder = tempFolder()
  const before = openPaths()
  expect(await codeOf(newFile(join(folder, 'none/a')))).toBe('ERR_NOT_FOUND')
  expect(await codeOf(newFile(folder))).toBe('ERR_UNSUPPORTED')
  await expect(newFile(join(folder, 'a'), { signal: AbortSignal.abort(new Error('enough')) })).rejects.toThrow('enough')
  expect(readdirSync(folder)).toEqual([])
  expect(openPaths()).toEqual(before)
  const long = join(folder, 'x'.repeat(255))
  await replace(long, 'long')
  expect(readFileSync(long, 'utf8')).toBe('long')
})

test('a name for another program: nothing, or an empty file nobody uses', async () => {
  const folder = tempFolder()
  const path = join(folder, 'a')
  await assertVacant(path)
  writeFileSync(path, '')
  await assertVacant(path)
  writeFileSync(path, 'x')
  symlinkSync('a', join(folder, 'link'))
  for (const name of [path, join(folder, 'link'), folder]) expect(await codeOf(assertVacant(name)), name).toBe('ERR_EXISTS')
})

test.skipIf(process.platform !== 'linux')('a claim holds for this process and against others, and ends with its process, however that ends', async () => {
  const script = `
    import { claim } from ${JSON.stringify(join(import.meta.dirname, '../../src/block/file-claim.ts'))}
    try { await claim(process.argv[1], 'NAME'); console.log('claimed') } catch (error) { console.log(error.code + ' ' + error.message) }
    if (process.argv[2] === 'stay') setInterval(() => undefined, 1000)`
  const start = (key: string, stay: 'stay' | 'end'): ReturnType<typeof spawn> =>
    spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script, key, stay], { stdio: ['ignore', 'pipe', 'inherit'] })
  const answer = async (child: ReturnType<typeof spawn>): Promise<string> => String((await once(child.stdout!, 'data'))[0])

  const key = `test:${process.pid}`
  const [first, second] = [await claim(key, 'a'), await claim(key, 'a')]
  first()
  expect(await answer(start(key, 'end'))).toMatch(/^ERR_BUSY NAME: another process of this library .*locking: false/)
  second()
  const child = start(key, 'stay')
  expect(await answer(child)).toBe('claimed\n')
  expect(await codeOf(claim(key, 'a'))).toBe('ERR_BUSY')
  child.kill('SIGKILL')
  await once(child, 'exit')
  ;(await claim(key, 'a'))()
  // one that is about to end is waited for
  const leaving = start(key, 'stay')
  expect(await answer(leaving)).toBe('claimed\n')
  const waiting = claim(key, 'a')
  leaving.kill('SIGKILL')
  ;(await waiting)()
  // a claim alone keeps no process alive
  const ending = start(key, 'end')
  await once(ending, 'exit')
  expect(ending.exitCode).toBe(0)
})

test('the device number of a mounted file system, and mount points', () => {
  const mounts = ['22 1 254:0 / / rw,relatime - ext4 /dev/vda rw', '29 22 0:39 /sub /mnt/a\\040b rw - btrfs /dev/sdb rw', '290 22 8:4660 / /x rw - xfs /dev/sdc rw'].join('\n')
  expect(parseMountDevice('pos:\t0\nflags:\t02\nmnt_id:\t29\nino:\t5\n', mounts)).toBe(39n)
  expect(parseMountDevice('mnt_id:\t290\n', mounts)).toBe((8n << 8n) | 0x34n | (0x1200n << 12n))
  expect(parseMountDevice('mnt_id:\t5\n', mounts)).toBe(undefined)
  expect(parseMountDevice('', '')).toBe(undefined)
  expect(mountPoints(mounts)).toEqual(['/', '/mnt/a b', '/x'])
})

describeWithQemu('a file that a QEMU holds', (qemu) => {
  test.each(['for writing', 'for reading'])('%s is neither replaced nor emptied, and not one it opens meanwhile', async (how) => {
    const path = join(tempFolder(), 'a')
    const link = `${path}-link`
    await qemu.imgOk('create', '-f', 'raw', path, '1M')
    symlinkSync(path, link)
    const meanwhile = await newFile(path)
    const holder = spawn(qemu.path('qemu-io'), [...(how === 'for reading' ? ['-r'] : []), '-f', 'raw', path], { stdio: ['pipe', 'pipe', 'inherit'] })
    try {
      holder.stdin.write('length\n')
      await once(holder.stdout, 'data')
      expect(await codeOf(meanwhile.keep())).toBe('ERR_BUSY')
      await meanwhile.discard()
      for (const task of [() => newFile(link), () => openFile(link, { create: 'w' })]) expect(await codeOf(task())).toBe('ERR_BUSY')
      expect(await codeOf(assertVacant(link))).toBe('ERR_EXISTS')
      expect(statSync(path).size).toBe(1 << 20)
    } finally {
      holder.stdin.end('quit\n')
      if (holder.exitCode === null) await once(holder, 'exit')
    }
    await replace(link, 'new')
  })
})
