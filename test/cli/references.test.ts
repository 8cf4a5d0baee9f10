/** The files that an image names, and every command that opens images: what is followed, by which name the program is called. */
import { existsSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { namedImage } from '../support/named-image.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run, type RunResult } from './run.ts'

const secret = Buffer.alloc(65536, 'SECRET ')
let requests = 0
let server: Server
let port = 0
beforeAll(async () => {
  server = createServer((_, response) => {
    requests++
    response.writeHead(206, { 'content-range': 'bytes 0-0/65536' }).end('x')
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  port = (server.address() as AddressInfo).port
})
afterAll(() => server.close())

/** An image in a folder of its own, a secret beside that folder. */
function place(names: (folder: string) => Parameters<typeof namedImage>[0]): { folder: string; image: string } {
  const folder = tempFolder()
  mkdirSync(join(folder, 'in'))
  writeFileSync(join(folder, 'secret'), secret)
  writeFileSync(join(folder, 'in', '.secret'), secret)
  writeFileSync(join(folder, 'in', 'base.raw'), Buffer.alloc(65536, 1))
  writeFileSync(join(folder, 'in', 'conf'), 'top secret line\n')
  symlinkSync('../secret', join(folder, 'in', 'link'))
  const image = join(folder, 'in', 'image.qcow2')
  writeFileSync(image, namedImage(names(folder)))
  return { folder, image }
}

const named = (names: (name: string) => Parameters<typeof namedImage>[0]): Record<string, (folder: string) => Parameters<typeof namedImage>[0]> =>
  Object.fromEntries(
    ['@/secret', '../secret', '.secret', 'link', 'http://127.0.0.1:PORT/x', 'nbd://127.0.0.1:PORT/x', 'nbd+unix:///?socket=@/none', 'blkdebug:@/in/conf:@/in/base.raw', 'json:{"driver":"raw","file":{"driver":"file","filename":"@/secret"}}', '/etc/passwd'].map((name) => [
      name,
      (folder: string) => names(name.replaceAll('@', folder).replace('PORT', String(port))),
    ]),
  )

const backings: Record<string, (folder: string) => Parameters<typeof namedImage>[0]> = { ...named((backing) => ({ backing, format: 'raw' })), 'no format': () => ({ backing: 'base.raw' }) }
const dataFiles = named((dataFile) => ({ dataFile }))
const commands: Record<string, (image: string, folder: string) => string[]> = {
  map: (image) => ['map', image],
  check: (image) => ['bench', '-c', '1', '-s', '512', image],
  convert: (image, folder) => ['convert', '-O', 'raw', image, join(folder, 'out')],
  dd: (image, folder) => ['dd', `if=${image}`, `of=${join(folder, 'out')}`],
  compare: (image) => ['compare', image, image],
  measure: (image) => ['measure', '-O', 'qcow2', image],
  'create over it': (image, folder) => ['create', '-f', 'qcow2', '-b', image, '-F', 'qcow2', join(folder, 'overlay')],
  'convert onto it': (image, folder) => ['convert', '-n', '-O', 'qcow2', join(folder, 'in', 'base.raw'), image],
  'write to it': (image) => ['bench', '-w', '-c', '1', '-s', '512', image],
  resize: (image) => ['resize', image, '+1M'],
  commit: (image) => ['commit', image],
  rebase: (image) => ['rebase', '-b', '', image],
  serve: (image, folder) => ['serve', image, '--socket', join(folder, 'socket')],
  'info of the chain': (image) => ['info', '--backing-chain', image],
  'image options': (image, folder) => ['convert', '--image-opts', '-O', 'raw', `driver=qcow2,file.filename=${image}`, join(folder, 'out')],
}

const shown = ({ stdout, stderr }: RunResult): string => stdout + stderr

describe.each<[string, typeof backings]>([['backing file', backings], ['data file', dataFiles]])('a %s out of the tree, hidden, or behind a protocol', (kind, names) => {
  test.each(Object.entries(commands))('%s', async (command, line) => {
    for (const [name, image] of Object.entries(names)) {
      // neither reads what a data file would hold
      if (kind === 'data file' && command === 'info of the chain') continue
      for (const rule of [[], ['--references=tree'], ['--references=none']]) {
        const at = place(image)
        requests = 0
        const [word, ...rest] = line(at.image, at.folder)
        const before = readFileSync(at.image)
        const result = await run([word!, ...rule, ...rest])
        expect({ name, command, code: result.code, stderr: result.stderr }).toMatchObject({ code: command === 'compare' ? 2 : 1, stderr: expect.stringMatching(kind === 'backing file' ? /--references=any/ : /--references=any|No such file/) as string })
        expect(shown(result)).not.toMatch(/SECRET|top secret|root:/)
        expect([requests, existsSync(join(at.folder, 'out')) ? readFileSync(join(at.folder, 'out')).includes('SECRET') : false]).toEqual([0, false])
        expect(readFileSync(join(at.folder, 'secret')).equals(secret)).toBe(true)
        expect(readFileSync(at.image).equals(before)).toBe(true)
      }
    }
  })
})

test('called qemu-img, or with --references=any, backing files are followed as QEMU does; serve is not', async () => {
  for (const [args, program] of [[['--references=any'], 'qcow2'], [[], 'qemu-img']] as const) {
    const at = place(() => ({ backing: '../secret' }))
    expect(await run(['convert', ...args, '-O', 'raw', at.image, join(at.folder, 'out')], { program })).toMatchObject({ code: 0 })
    expect(readFileSync(join(at.folder, 'out')).equals(secret)).toBe(true)
    expect(await run(['info', ...args, '--backing-chain', at.image], { program })).toMatchObject({ code: 0 })
  }
  const at = place(() => ({ backing: '../secret', format: 'raw' }))
  expect(await run(['serve', at.image, '--socket', join(at.folder, 'socket')], { program: 'qemu-img' })).toMatchObject({ code: 1, stderr: expect.stringContaining('--references=any') as string })
})

test('in the tree: backing files are read, data files too; written to only with --references=any', async () => {
  const back = place(() => ({ backing: 'base.raw', format: 'raw' }))
  expect(await run(['convert', '-O', 'raw', back.image, join(back.folder, 'out')])).toMatchObject({ code: 0 })
  expect(readFileSync(join(back.folder, 'out'))[0]).toBe(1)
  const data = place((folder) => ({ dataFile: join(folder, 'in/base.raw') }))
  expect(await run(['map', data.image])).toMatchObject({ code: 0 })
  const write = ['-w', '-c', '1', '-s', '512', '--pattern', '65', data.image]
  expect(await run(['bench', ...write])).toMatchObject({ code: 1, stderr: expect.stringMatching(/would be written to; --references=any allows it/) as string })
  expect(readFileSync(join(data.folder, 'in/base.raw'))[0]).toBe(1)
  expect(await run(['bench', '--references=any', ...write])).toMatchObject({ code: 0 })
  expect(readFileSync(join(data.folder, 'in/base.raw'))[0]).toBe(65)
})

test('a data file is a plain path, even where anything may be named', async () => {
  for (const dataFile of [`http://127.0.0.1:${port}/x`, `nbd://127.0.0.1:${port}/x`, 'json:{"driver":"file","filename":"/etc/passwd"}', 'blkdebug:/etc/passwd:/etc/hostname', 'file:/etc/passwd']) {
    requests = 0
    const { image } = place(() => ({ dataFile }))
    const result = await run(['map', '--references=any', image])
    expect([dataFile, result.code, requests]).toEqual([dataFile, 1, 0])
    expect(shown(result)).toContain(`Could not open '${dataFile}': No such file or directory`)
  }
})

test('a configuration file of blkdebug is never quoted', async () => {
  const at = place((folder) => ({ backing: `blkdebug:${folder}/in/conf:${folder}/in/base.raw`, format: 'raw' }))
  for (const text of ['top secret line', '[inject-error]\nevent = "top secret"', '[inject-error]\nsecret = "x"\nevent="none"']) {
    writeFileSync(join(at.folder, 'in/conf'), text)
    const result = await run(['map', '--references=any', at.image])
    expect(result).toMatchObject({ code: 1, stderr: expect.stringMatching(/line 1 of the configuration file/) as string })
    expect(result.stderr).not.toContain('secret')
  }
})

test('what the user names himself is no reference', async () => {
  const at = place(() => ({}))
  expect(await run(['create', '-f', 'qcow2', '-b', '../secret', '-F', 'raw', join(at.folder, 'in/overlay.qcow2')])).toMatchObject({ code: 0 })
  const options = `driver=qcow2,file.filename=${join(at.folder, 'in/overlay.qcow2')},backing.driver=raw,backing.file.filename=${join(at.folder, 'secret')}`
  expect(await run(['convert', '--image-opts', '-O', 'raw', options, join(at.folder, 'out')])).toMatchObject({ code: 0 })
  expect(readFileSync(join(at.folder, 'out')).equals(secret)).toBe(true)
})

test('names that lead back to the image are refused before anything changes', async () => {
  const folder = tempFolder()
  const at = (name: string): string => join(folder, name)
  writeFileSync(at('a'), namedImage({}))
  writeFileSync(at('b'), namedImage({ backing: 'a', format: 'qcow2' }))
  symlinkSync('a', at('link'))
  const before = readFileSync(at('a'))
  writeFileSync(at('other.raw'), Buffer.alloc(65536, 3))
  for (const name of ['a', 'b', 'link', at('a')]) {
    const lines = [
      ['rebase', '-u', '-b', name, '-F', 'qcow2', at('a')],
      ['rebase', '-b', name, '-F', 'qcow2', at('a')],
      ['create', '-f', 'qcow2', '-b', name, '-F', 'qcow2', at('a')],
      ['create', '-u', '-f', 'qcow2', '-b', name, '-F', 'qcow2', at('a'), '1M'],
      ['create', '-f', 'qcow2', '-o', `backing_file=${name},backing_fmt=qcow2`, at('link')],
      ['convert', '-O', 'qcow2', '-B', name, '-F', 'qcow2', at('other.raw'), at('a')],
    ]
    for (const line of lines) {
      for (const program of ['qcow2', 'qemu-img']) {
        expect([line, (await run(line, { program })).code]).toEqual([line, 1])
        expect(readFileSync(at('a')).equals(before), line.join(' ')).toBe(true)
      }
    }
  }
  expect(await run(['rebase', '-u', '-b', 'missing', '-F', 'qcow2', at('b')])).toMatchObject({ code: 0 })
})

describeWithQemu('formats that are not read', (qemu) => {
  test.each(['vmdk', 'vdi', 'vhdx', 'vpc', 'qed', 'parallels', 'fixed vpc', 'flat vmdk', 'vmdk stream', 'dmg', 'bochs', 'cloop'])('%s is refused by its name wherever a format is guessed', async (kind) => {
    const folder = tempFolder()
    const disk = join(folder, 'disk')
    const made: Record<string, string[]> = {
      'fixed vpc': ['-f', 'vpc', '-o', 'subformat=fixed'],
      'flat vmdk': ['-f', 'vmdk', '-o', 'subformat=monolithicFlat'],
      'vmdk stream': ['-f', 'vmdk', '-o', 'subformat=streamOptimized'],
    }
    if (kind === 'dmg') {
      const bytes = Buffer.alloc(65536)
      bytes.write('koly', 65536 - 512)
      bytes.writeUInt32BE(4, 65536 - 508)
      bytes.writeUInt32BE(512, 65536 - 504)
      writeFileSync(disk, bytes)
    } else if (kind === 'bochs' || kind === 'cloop') writeFileSync(disk, Buffer.concat([Buffer.from(kind === 'bochs' ? 'Bochs Virtual HD Image\0' : '#!/bin/sh\n#V2.0 Format\n'), Buffer.alloc(65536)]))
    else await qemu.imgOk('create', '-q', ...(made[kind] ?? ['-f', kind]), disk, '4M')
    const title = { vmdk: 'VMDK', vdi: 'VDI', vhdx: 'VHDX', vpc: 'VHD', qed: 'QED', parallels: 'Parallels', dmg: 'DMG', bochs: 'Bochs', cloop: 'cloop' }[kind.split(' ').find((word) => word !== 'fixed' && word !== 'flat' && word !== 'stream')!]!
    const overlay = join(folder, 'overlay.qcow2')
    writeFileSync(overlay, namedImage({ backing: 'disk' }))
    const lines = [
      ['info', disk], ['map', disk], ['check', disk], ['measure', disk], ['compare', disk, disk], ['resize', disk, '8M'],
      ['convert', '-O', 'qcow2', disk, join(folder, 'out')], ['dd', `if=${disk}`, `of=${join(folder, 'out')}`], ['bench', '-c', '1', disk],
      ['serve', disk, '--socket', join(folder, 'socket')], ['create', '-f', 'qcow2', '-b', disk, join(folder, 'out')],
      ['map', '--references=any', overlay], ['convert', '--references=any', '-O', 'raw', overlay, join(folder, 'out')],
    ]
    for (const line of lines) {
      const result = await run(line)
      expect([line, result.code === 0, result.stderr]).toEqual([line, false, expect.stringContaining(`${title} format, which is not supported: convert it first (qemu-img convert -f `) as string])
      expect(existsSync(join(folder, 'out'))).toBe(false)
    }
    expect(await run(['convert', '-f', 'raw', '-O', 'raw', disk, join(folder, 'out')])).toMatchObject({ code: 0 })
    expect(readFileSync(join(folder, 'out')).subarray(0, 512).equals(Buffer.concat([readFileSync(disk), Buffer.alloc(512)]).subarray(0, 512))).toBe(true)
  })
})
