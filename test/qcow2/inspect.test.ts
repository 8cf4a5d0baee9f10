/** Looking at an untrusted image: what it names is told and never opened. */
import { execFileSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block.ts'
import { inspectImage, Qcow2Image } from '../../src/index.ts'
import { namedImage } from '../support/named-image.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from '../cli/run.ts'

const dangersOf = async (names: Parameters<typeof namedImage>[0], path = join(tempFolder(), 'image.qcow2')): Promise<string> => {
  writeFileSync(path, namedImage(names))
  const { names: found } = await inspectImage(path)
  return found.map(({ kind, name, dangers }) => `${kind} ${name}: ${dangers.join('; ')}`).join('\n')
}

test('each name is told with why it is dangerous', async () => {
  const folder = tempFolder()
  const path = join(folder, 'image.qcow2')
  expect(await dangersOf({}, path)).toBe('')
  expect(await dangersOf({ backing: '/etc/passwd', format: 'raw' }, path)).toMatch(/^backing file \/etc\/passwd: .*outside the directory of the image/)
  expect(await dangersOf({ backing: '../x', format: 'raw' }, path)).toMatch(/outside/)
  expect(await dangersOf({ backing: 'a/../../x', format: 'raw' }, path)).toMatch(/outside/)
  expect(await dangersOf({ backing: 'base', format: 'raw' }, path)).not.toMatch(/outside|hidden|not recorded/)
  expect(await dangersOf({ backing: 'base' }, path)).toMatch(/not recorded/)
  expect(await dangersOf({ backing: 'base', format: 'vmdk' }, path)).toMatch(/"vmdk", which is not read here/)
  expect(await dangersOf({ backing: '.ssh/id_rsa', format: 'raw' }, path)).toMatch(/hidden/)
  expect(await dangersOf({ backing: 'image.qcow2', format: 'qcow2' }, path)).toMatch(/the image itself/)
  for (const backing of ['nbd://h/x', 'http://169.254.169.254/', 'json:{}', 'blkdebug:a:b']) expect(await dangersOf({ backing, format: 'raw' }, path)).toMatch(/not a path/)
  expect(await dangersOf({ dataFile: join(folder, 'victim') }, path)).toMatch(/^data file .*written to it/)
  expect(await dangersOf({ dataFile: '/dev/sda' }, path)).toMatch(/device of the host/)
  expect(await dangersOf({ dataFile: '' }, path)).toMatch(/not told/)
  expect(await dangersOf({ backing: 'a\u001b[2Jb', format: 'raw' }, path)).toMatch(/control characters/)
})

test('nothing that is named is opened: a pipe waits for nobody', async () => {
  const folder = tempFolder()
  execFileSync('mkfifo', [join(folder, 'pipe')])
  mkdirSync(join(folder, 'in'))
  for (const names of [{ backing: join(folder, 'pipe'), format: 'raw' }, { dataFile: join(folder, 'pipe') }]) expect(await dangersOf(names)).toContain('pipe')
})

test('other formats, damage, and what the image is', async () => {
  const bytes = namedImage({})
  expect(await inspectImage(new MemoryDevice(bytes))).toMatchObject({ format: 'qcow2', fileSize: bytes.length, info: { virtualSize: 65536 }, names: [], notes: [], problem: undefined })
  bytes.writeUInt32BE(99, 20)
  expect(await inspectImage(new MemoryDevice(bytes))).toMatchObject({ format: 'qcow2', info: undefined, problem: expect.stringMatching(/cluster/) as string })
  expect(await inspectImage(new MemoryDevice(Buffer.from('KDMV'.padEnd(512, '\0'))))).toMatchObject({ format: 'vmdk', info: undefined })
  expect(await inspectImage(new MemoryDevice(Buffer.alloc(10)))).toMatchObject({ format: 'raw', fileSize: 10 })
  const device = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(device, { size: 1 << 20, encryption: { format: 'luks', passphrase: 'p', iterations: 1000 } })
  await image.flush()
  expect((await inspectImage(new MemoryDevice(device.bytes.slice()))).notes).toEqual([expect.stringMatching(/encrypted \(luks\)/)])
  await image.close()
})

test('the command', async () => {
  const folder = tempFolder()
  const path = join(folder, 'evil.qcow2')
  writeFileSync(path, namedImage({ backing: '/etc/passwd', format: 'raw' }))
  expect(await run(['inspect', path])).toMatchObject({ code: 2, stdout: expect.stringMatching(/backing file '\/etc\/passwd', format raw\n {4}- its content is read.*\n {4}- it is outside/) as string })
  const json = await run(['inspect', '--output=json', path])
  expect(JSON.parse(json.stdout)).toMatchObject({ format: 'qcow2', 'virtual-size': 65536, names: [{ kind: 'backing file', name: '/etc/passwd', format: 'raw' }] })
  writeFileSync(path, namedImage({}))
  expect(await run(['inspect', path])).toMatchObject({ code: 0, stdout: expect.stringContaining('other files: none') as string })
  expect(await run(['inspect', join(folder, 'none')])).toMatchObject({ code: 1, stderr: expect.stringContaining('No such file') as string })
})
