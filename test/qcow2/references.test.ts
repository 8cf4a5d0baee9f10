/** Names in images: which are followed, which are refused, and that none is written that leads back to its image. */
import { execFileSync } from 'node:child_process'
import { existsSync, linkSync, mkdirSync, readFileSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { access } from 'node:fs/promises'
import { createServer } from 'node:net'
import { once } from 'node:events'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { MemoryDevice, openFile } from '../../src/block.ts'
import { decodeName, encodeName } from '../../src/bytes/file-name.ts'
import { isAbsolutePath, isPlainPath, outsideTree, resolveReference } from '../../src/block/file-path.ts'
import { amendImage, checkImage, Qcow2Error, Qcow2Image, readImageInfo, rebaseImage, setBackingFile, type CreateOptions, type OpenOptions } from '../../src/index.ts'
import { maxBackingChain } from '../../src/qcow2/limits.ts'
import { openDescriptors } from '../support/descriptors.ts'
import { namedImage } from '../support/named-image.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const KiB = 1024
const bytesOf = (fill: number): Uint8Array => new Uint8Array(64 * KiB).fill(fill)

/** The first byte of the disk, or the error's code. */
async function readFirst(path: string, options: OpenOptions = {}): Promise<number | string> {
  try {
    await using image = await Qcow2Image.open(path, { readOnly: true, ...options })
    return (await image.read(0, 1))[0]!
  } catch (error) {
    return Qcow2Error.is(error) ? error.code : String(error)
  }
}

describe('the tree', () => {
  const home = (): string => {
    const folder = join(tempFolder(), 'home')
    for (const name of ['images/base', 'images/.hidden', '.ssh', '..odd']) mkdirSync(join(folder, name), { recursive: true })
    writeFileSync(join(folder, 'images/base.raw'), bytesOf(1))
    writeFileSync(join(folder, 'images/base/deep.raw'), bytesOf(2))
    for (const secret of ['.ssh/id_rsa', '.bashrc', 'secret', 'images/.hidden/x', 'images/.env', '..odd/x']) writeFileSync(join(folder, secret), bytesOf(0x53))
    symlinkSync('../secret', join(folder, 'images/link'))
    symlinkSync('base.raw', join(folder, 'images/inner'))
    symlinkSync('.env', join(folder, 'images/innocent'))
    symlinkSync('..', join(folder, 'images/up'))
    symlinkSync('images', join(folder, 'way'))
    return folder
  }
  const inTree = { 'base.raw': 1, 'base/deep.raw': 2, './base.raw': 1, 'base/../base.raw': 1, inner: 1, '@/images/base.raw': 1 }
  const outside = ['../secret', '@/secret', 'link', 'up/secret', 'up/images/../secret', '.env', '.hidden/x', 'innocent', '@/.ssh/id_rsa', '/etc/passwd', '/dev/zero', '/proc/self/environ', 'base']
  const strange = ['json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}', 'nbd://localhost/x', 'nbd+unix:///x?socket=y', 'http://127.0.0.1:1/x', 'blkdebug::base.raw', 'file:base.raw', 'fat:.', 'ssh://h/x']

  for (const kind of ['backing', 'dataFile'] as const) {
    test(`${kind === 'backing' ? 'a backing' : 'a data'} file in the tree is read; others, hidden ones and protocols are refused`, async () => {
      const folder = home()
      const path = join(folder, 'images', 'i.qcow2')
      const first = async (name: string, options?: OpenOptions): Promise<number | string> => {
        const full = name.replace('@', folder)
        // a data file's name is relative to the working directory
        const stored = kind === 'dataFile' && !full.startsWith('/') && isPlainPath(full) ? join(folder, 'images', full) : full
        const bytes = namedImage({ [kind]: stored, ...(kind === 'backing' ? { format: 'raw' } : {}) })
        writeFileSync(path, bytes)
        if (kind === 'backing') return readFirst(path, options)
        try {
          await using image = await Qcow2Image.open(path, { readOnly: true, ...options })
          return image.size > 0 ? 'opened' : 'empty'
        } catch (error) {
          return (error as Qcow2Error).code
        }
      }
      for (const [name, fill] of Object.entries(inTree)) expect([name, await first(name)]).toEqual([name, kind === 'backing' ? fill : 'opened'])
      for (const name of [...outside, ...strange]) expect([name, await first(name)]).toEqual([name, expect.stringMatching(/^ERR_(UNSUPPORTED|NOT_FOUND)$/)])
      for (const name of strange) expect([name, await first(name, { references: 'any' })]).toEqual([name, expect.stringMatching(/^ERR_(UNSUPPORTED|NOT_FOUND)$/)])
      for (const name of Object.keys(inTree)) expect([name, await first(name, { references: 'none' })]).toEqual([name, 'ERR_UNSUPPORTED'])
      if (kind === 'backing') expect(await first('../secret', { references: 'any' })).toBe(0x53)
    })
  }

  test('the tree is that of the image that was opened first, by the way it was opened', async () => {
    const folder = home()
    writeFileSync(join(folder, 'images/base/middle.qcow2'), namedImage({ backing: '../base.raw', format: 'raw' }))
    writeFileSync(join(folder, 'images/top.qcow2'), namedImage({ backing: 'base/middle.qcow2', format: 'qcow2' }))
    expect(await readFirst(join(folder, 'images/top.qcow2'))).toBe(1)
    expect(await readFirst(join(folder, 'way/top.qcow2'))).toBe(1)
    expect(await readFirst(join(folder, 'images/base/middle.qcow2'))).toBe('ERR_UNSUPPORTED')
  })

  test('the root of the file system is no tree', () => {
    expect(outsideTree('/', '/etc/passwd')).toBe('root')
    expect(outsideTree('/', '/base.raw')).toBe('root')
    expect(outsideTree('C:\\', 'C:\\base.raw', true)).toBe('root')
  })

  test('a link that changes while it is judged leads nowhere', async () => {
    const folder = home()
    const images = join(folder, 'images')
    writeFileSync(join(images, 'e.qcow2'), namedImage({ backing: 'b.raw', format: 'raw' }))
    symlinkSync('base.raw', join(images, 'b.raw'))
    const swap = (target: string): void => {
      symlinkSync(target, join(images, 'new'))
      renameSync(join(images, 'new'), join(images, 'b.raw'))
    }
    let going = true
    let turns = 0
    const swapping = (async () => {
      for (; going; turns++) {
        swap(turns % 2 === 0 ? '../secret' : 'base.raw')
        await new Promise((resolve) => setImmediate(resolve))
      }
    })()
    const seen = new Set<number | string>()
    for (let tries = 0; tries < 300; tries++) seen.add(await readFirst(join(images, 'e.qcow2')))
    going = false
    await swapping
    expect(turns).toBeGreaterThan(10)
    expect([...seen].filter((one) => one !== 1 && one !== 'ERR_UNSUPPORTED' && one !== 'ERR_IO')).toEqual([])
    expect(openDescriptors().filter((name) => name.startsWith(folder))).toEqual([])
  })

  test('what was opened is judged, not its name: a link changed between the two leads nowhere', async () => {
    const folder = home()
    const images = join(folder, 'images')
    const path = join(images, 'e.qcow2')
    symlinkSync('base.raw', join(images, 'b.raw'))
    const { openInTree } = await import('../../src/block/file-tree.ts')
    const opened = await openInTree(path, join(images, 'b.raw'), async () => {
      rmSync(join(images, 'b.raw'))
      symlinkSync('../secret', join(images, 'b.raw'))
      const device = await openFile(join(images, 'b.raw'), { readOnly: true })
      rmSync(join(images, 'b.raw'))
      symlinkSync('base.raw', join(images, 'b.raw'))
      return device
    })
    expect(opened).toBe('outside')
    expect(openDescriptors().filter((name) => name.startsWith(folder))).toEqual([])
  })

  test('a pipe, a socket, a directory or a device is refused at once, and file input goes on', async () => {
    const folder = tempFolder()
    execFileSync('mkfifo', [join(folder, 'pipe')])
    const server = createServer().listen(join(folder, 'socket'))
    await once(server, 'listening')
    mkdirSync(join(folder, 'folder'))
    for (const name of ['pipe', 'socket', 'folder', '/dev/zero']) {
      for (const names of [{ backing: name, format: 'raw' }, { backing: name, format: 'qcow2' }, { backing: name }, { dataFile: name.startsWith('/') ? name : join(folder, name) }]) {
        const path = join(folder, 'image.qcow2')
        writeFileSync(path, namedImage(names))
        const tries = Array.from({ length: 6 }, () => readFirst(path, { references: 'any', probeBackingFormat: true, signal: AbortSignal.timeout(20_000) }))
        expect([name, names, ...new Set(await Promise.all(tries))]).toEqual([name, names, 'ERR_UNSUPPORTED'])
      }
    }
    await access(folder)
    server.close()
  })
})

describe('data files', () => {
  const withVictim = (): { folder: string; image: string; victim: string } => {
    const folder = tempFolder()
    const victim = join(folder, 'victim')
    writeFileSync(victim, bytesOf(0x56))
    const image = join(folder, 'image.qcow2')
    writeFileSync(image, namedImage({ dataFile: victim }))
    return { folder, image, victim }
  }

  test('an image is not opened for writing to a file that it names, unless the caller names it or trusts the image', async () => {
    const { image, victim } = withVictim()
    for (const references of [undefined, 'tree', 'none', () => false] as const) {
      await expect(Qcow2Image.open(image, { references })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
    }
    await expect(Qcow2Image.open(image)).rejects.toThrow(/would be written to; name it yourself with dataFile/)
    expect(readFileSync(victim).equals(Buffer.from(bytesOf(0x56)))).toBe(true)
    for (const options of [{ dataFile: victim }, { references: 'any' }, { references: ({ access }) => access === 'write' }, { dataFile: await openFile(victim) }] satisfies OpenOptions[]) {
      await using opened = await Qcow2Image.open(image, options)
      await opened.write(0, new Uint8Array(512).fill(7))
    }
    expect(readFileSync(victim)[0]).toBe(7)
  })

  test('never the image itself, a file below it, or one that another image writes to', async () => {
    const { folder, image, victim } = withVictim()
    const open = (dataFile: string): Promise<Qcow2Image> => Qcow2Image.open(image, { references: 'any', dataFile })
    const before = readFileSync(image)
    linkSync(image, join(folder, 'hard'))
    symlinkSync(image, join(folder, 'soft'))
    for (const name of [image, join(folder, 'hard'), join(folder, 'soft')]) {
      await expect(open(name)).rejects.toMatchObject({ code: expect.stringMatching(/ERR_(FORMAT|BUSY)/) as string })
      writeFileSync(image, namedImage({ dataFile: name }))
      for (const readOnly of [true, false]) await expect(Qcow2Image.open(image, { references: 'any', readOnly })).rejects.toMatchObject({ code: expect.stringMatching(/ERR_(FORMAT|BUSY)/) as string })
      writeFileSync(image, before)
    }
    expect(readFileSync(image).equals(before)).toBe(true)
    writeFileSync(image, namedImage({ dataFile: victim, backing: 'victim', format: 'raw' }))
    await expect(open(victim)).rejects.toMatchObject({ code: 'ERR_FORMAT' })
    writeFileSync(image, before)
    await (await Qcow2Image.create(join(folder, 'other.qcow2'), { size: 64 * KiB })).close()
    await using other = await Qcow2Image.open(join(folder, 'other.qcow2'))
    await expect(open(join(folder, 'other.qcow2'))).rejects.toMatchObject({ code: 'ERR_BUSY' })
    expect(other.size).toBe(64 * KiB)
    await using first = await open(victim)
    const second = join(folder, 'second.qcow2')
    writeFileSync(second, before)
    await expect(Qcow2Image.open(second, { dataFile: victim })).rejects.toMatchObject({ code: 'ERR_BUSY' })
    await first.write(0, new Uint8Array(512))
  })

  test('the file is free again once the image is closed, and after an open that failed', async () => {
    const { image, victim } = withVictim()
    for (let round = 0; round < 3; round++) {
      await using opened = await Qcow2Image.open(image, { dataFile: victim })
      expect(opened.size).toBe(64 * KiB)
    }
    expect(openDescriptors().filter((name) => name === victim)).toEqual([])
  })

  test('a new image writes to the data file it was made with, wherever that is', async () => {
    const [folder, elsewhere] = [tempFolder(), tempFolder()]
    const dataFile = join(elsewhere, '.data')
    await using image = await Qcow2Image.create(join(folder, 'disk.qcow2'), { size: 64 * KiB, dataFile })
    await image.write(0, bytesOf(9))
    await image.flush()
    expect(readFileSync(dataFile)[0]).toBe(9)
  })

  test('a new image does not take a file below it for its data file', async () => {
    const folder = tempFolder()
    const base = join(folder, 'base.raw')
    writeFileSync(base, bytesOf(1))
    const options = { size: 64 * KiB, backing: { file: 'base.raw', format: 'raw' } }
    symlinkSync(base, join(folder, 'link'))
    for (const dataFile of [base, join(folder, 'link'), join(folder, 'disk.qcow2')]) {
      await expect(Qcow2Image.create(join(folder, 'disk.qcow2'), { ...options, dataFile })).rejects.toMatchObject({ code: expect.stringMatching(/ERR_(FORMAT|BUSY)/) as string })
    }
    expect(readFileSync(base).equals(Buffer.from(bytesOf(1)))).toBe(true)
  })
})

describe('what the caller names', () => {
  test('a new overlay stands on a base anywhere; the names in that base are judged by its own tree', async () => {
    const [cache, work] = [tempFolder(), tempFolder()]
    writeFileSync(join(cache, '.base.raw'), bytesOf(4))
    writeFileSync(join(cache, 'base.raw'), bytesOf(5))
    const create = (file: string, format: string, options: Partial<CreateOptions> = {}): Promise<Qcow2Image> =>
      Qcow2Image.create(join(work, 'overlay.qcow2'), { backing: { file, format }, ...options })
    for (const name of ['.base.raw', 'base.raw']) {
      await using image = await create(join(cache, name), 'raw')
      expect((await image.read(0, 1))[0]).toBe(name === 'base.raw' ? 5 : 4)
    }
    await (await Qcow2Image.create(join(cache, 'middle.qcow2'), { backing: { file: 'base.raw', format: 'raw' } })).close()
    await using over = await create(join(cache, 'middle.qcow2'), 'qcow2')
    expect((await over.read(0, 1))[0]).toBe(5)
    writeFileSync(join(cache, 'evil.qcow2'), namedImage({ backing: '/etc/passwd', format: 'raw' }))
    await expect(create(join(cache, 'evil.qcow2'), 'qcow2')).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
  })

  test('a missing base leaves an existing file as it is', async () => {
    const path = join(tempFolder(), 'disk')
    writeFileSync(path, 'precious')
    await expect(Qcow2Image.create(path, { size: 64 * KiB, backing: { file: 'none', format: 'raw' } })).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    expect(readFileSync(path, 'utf8')).toBe('precious')
  })

  test('mistakes are told by what is expected', async () => {
    const path = join(tempFolder(), 'disk')
    const create = (options: unknown, target: unknown = path): Promise<unknown> => Qcow2Image.create(target as string, options as CreateOptions)
    await expect(create(undefined)).rejects.toThrow(/size is missing/)
    await expect(create({})).rejects.toThrow(/size is missing/)
    await expect(create({ size: 1024, backing: '/x' })).rejects.toThrow(/backing must be \{ file/)
    await expect(create({ size: 1024, backing: { path: '/x' } })).rejects.toThrow(/backing must be \{ file/)
    await expect(create({ size: 1024, backing: { file: '/x' } })).rejects.toThrow(/name the format/)
    await expect(create({ size: 1024, backing: { file: 'a\0b', format: 'raw' } })).rejects.toThrow(/NUL/)
    await expect(create({ size: 1024, dataFile: 5 })).rejects.toThrow(/dataFile must be a name/)
    for (const target of [null, undefined, 5, {}]) {
      await expect(Qcow2Image.create(target as string, { size: 1024 })).rejects.toThrow('a source is a path, a URL')
      await expect(Qcow2Image.open(target as string)).rejects.toThrow('a source is a path, a URL')
    }
    expect(existsSync(path)).toBe(false)
    writeFileSync(path, namedImage({}))
    await expect(Qcow2Image.open(path, { references: 'tre' as 'tree' })).rejects.toThrow(/references must be/)
    expect(openDescriptors()).not.toContain(path)
  })
})

describe('loops are refused when a name is written', () => {
  const chain = async (): Promise<{ folder: string; at: (name: string) => string; bytes: () => Buffer }> => {
    const folder = tempFolder()
    const at = (name: string): string => join(folder, name)
    await (await Qcow2Image.create(at('a'), { size: 64 * KiB })).close()
    await (await Qcow2Image.create(at('b'), { backing: { file: 'a', format: 'qcow2' } })).close()
    await (await Qcow2Image.create(at('c'), { backing: { file: 'b', format: 'qcow2' } })).close()
    symlinkSync('a', at('soft'))
    linkSync(at('a'), at('hard'))
    return { folder, at, bytes: () => readFileSync(at('a')) }
  }

  test('setBackingFile and rebaseImage, by any name, to the image itself or what stands on it; nothing changes', async () => {
    const { at, bytes } = await chain()
    const before = bytes()
    const nodes = { driver: 'qcow2', file: { driver: 'file', filename: at('c') } }
    const protocols = [`file:${at('b')}`, `json:${JSON.stringify(nodes)}`, `json:${JSON.stringify({ 'driver': 'qcow2', 'file.filename': at('hard') })}`]
    for (const name of ['a', 'b', 'c', 'soft', 'hard', at('b'), './a', ...protocols]) {
      const backing = { file: name, format: 'qcow2' }
      await expect(setBackingFile(at('a'), backing)).rejects.toMatchObject({ code: 'ERR_FORMAT' })
      await using image = await Qcow2Image.open(at('a'))
      await expect(setBackingFile(image, backing)).rejects.toThrow(/would loop/)
      const device = new MemoryDevice(64 * KiB)
      await expect(rebaseImage(image, { ...backing, device })).rejects.toThrow(/would loop/)
    }
    expect(bytes().equals(before)).toBe(true)
  })

  test('create, over a file that exists or one that is named before it is there', async () => {
    const { at, bytes } = await chain()
    const before = bytes()
    for (const name of ['a', 'b', 'c', 'soft', 'hard']) {
      for (const target of ['a', 'soft', 'hard']) {
        await expect(Qcow2Image.create(at(target), { size: 64 * KiB, backing: { file: name, format: 'qcow2' } })).rejects.toMatchObject({ code: expect.stringMatching(/ERR_(FORMAT|BUSY)/) as string })
      }
    }
    expect(bytes().equals(before)).toBe(true)
    expect(await readFirst(at('c'))).toBe(0)
  })

  test('a data file', async () => {
    const { folder, at } = await chain()
    await (await Qcow2Image.create(at('d'), { size: 64 * KiB, dataFile: at('data') })).close()
    symlinkSync('d', at('dlink'))
    for (const dataFile of [at('d'), at('dlink')]) await expect(amendImage(at('d'), { dataFile })).rejects.toMatchObject({ code: 'ERR_FORMAT' })
    // an image cannot stand on one whose data it would be
    await (await Qcow2Image.create(at('e'), { size: 64 * KiB })).close()
    await amendImage(at('d'), { dataFile: at('e') })
    await expect(setBackingFile(at('e'), { file: 'd', format: 'qcow2' })).rejects.toThrow(/is the data file of/)
    expect((await readImageInfo(join(folder, 'e'))).backingFile).toBeUndefined()
  })

  test('a name whose file is missing, or no image, may be written; by a path the old base need not exist', async () => {
    const { at } = await chain()
    writeFileSync(at('junk'), 'junk')
    for (const name of ['missing', 'junk', 'http://host/x', 'missing/deep']) {
      await setBackingFile(at('b'), { file: name, format: 'qcow2' })
      expect((await readImageInfo(at('b'))).backingFile).toBe(name)
    }
    await setBackingFile(at('b'), { file: 'a', format: 'qcow2' })
    expect(await readFirst(at('c'))).toBe(0)
    await setBackingFile(at('b'), undefined)
    expect(await checkImage(at('b'))).toMatchObject({ corruptions: 0, leaks: 0 })
  })
})

test('a chain is opened to a limit, and refused beyond it', async () => {
  const folder = tempFolder()
  writeFileSync(join(folder, '0'), namedImage({}))
  for (let depth = 1; depth < maxBackingChain + 1; depth++) writeFileSync(join(folder, `${depth}`), namedImage({ backing: `${depth - 1}`, format: 'qcow2' }))
  expect(await readFirst(join(folder, `${maxBackingChain - 1}`))).toBe(0)
  await expect(Qcow2Image.open(join(folder, `${maxBackingChain}`), { readOnly: true })).rejects.toThrow(/^the backing chain has more than 200 files/)
  expect(openDescriptors().filter((name) => name.startsWith(folder))).toEqual([])
})

describe('names are bytes', () => {
  test('every sequence of bytes without a NUL is a name, and comes back', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 60 }), (bytes) => {
        const name = bytes.map((byte) => (byte === 0 ? 1 : byte))
        expect(Buffer.from(encodeName(decodeName(name))).equals(Buffer.from(name))).toBe(true)
      }),
    )
    fc.assert(fc.property(fc.string({ unit: 'grapheme' }).filter((text) => !text.includes('\0')), (text) => {
      expect(decodeName(encodeName(text))).toBe(text)
    }))
    expect(decodeName(Buffer.from('\ufeffx'))).toBe('\ufeffx')
  })

  test('a file whose name is no UTF-8 is a backing file, a data file and an image', async () => {
    const folder = tempFolder()
    const name = decodeName(Buffer.from('b\xff\xe9.raw', 'latin1'))
    writeFileSync(Buffer.concat([Buffer.from(`${folder}/`), Buffer.from('b\xff\xe9.raw', 'latin1')]), bytesOf(6))
    await (await Qcow2Image.create(join(folder, 'i.qcow2'), { backing: { file: name, format: 'raw' } })).close()
    expect(await readFirst(join(folder, 'i.qcow2'))).toBe(6)
    expect((await readImageInfo(join(folder, 'i.qcow2'))).backingFile).toBe(name)
    await using device = await openFile(join(folder, name), { readOnly: true })
    expect(device.size).toBe(64 * KiB)
    writeFileSync(join(folder, 'd.qcow2'), namedImage({ dataFile: Buffer.concat([Buffer.from(`${folder}/`), Buffer.from('b\xff\xe9.raw', 'latin1')]) }))
    expect(await readFirst(join(folder, 'd.qcow2'))).toBe(0)
  })
})

describe('Windows', () => {
  test.each([
    ['C:\\x', true], ['C:/x', true], ['c:x', true], ['\\\\server\\share\\x', true], ['dir\\a:b', true], ['x', true],
    ['nbd://h/x', false], ['json:{}', false], ['http://h', false], ['file:x', false], ['blkdebug::x', false],
  ])('%s is a path: %s', (name, isPath) => {
    expect(isPlainPath(name, true)).toBe(isPath)
  })

  test('elsewhere a drive letter is a protocol, as in QEMU', () => {
    expect(isPlainPath('C:\\x', false)).toBe(false)
    expect(isPlainPath('./C:x', false)).toBe(true)
    expect(isAbsolutePath('\\x', false)).toBe(false)
  })

  test('folders end at either separator', () => {
    expect(resolveReference('C:\\images\\top.qcow2', 'base.raw', true)).toBe('C:\\images\\base.raw')
    expect(resolveReference('C:/images/top.qcow2', 'base.raw', true)).toBe('C:/images/base.raw')
    expect(resolveReference('C:top.qcow2', 'base.raw', true)).toBe('C:base.raw')
    expect(resolveReference('C:\\images/deep\\top', 'D:\\base', true)).toBe('D:\\base')
    expect(resolveReference('C:\\images\\top', '\\base', true)).toBe('\\base')
    expect(resolveReference('top', 'base', true)).toBe('base')
    expect(resolveReference('a\\b/top', 'base', false)).toBe('a\\b/base')
  })

  test('the tree knows drives, shares and hidden files', () => {
    expect(outsideTree('C:\\i', 'C:\\i\\base', true)).toBeUndefined()
    expect(outsideTree('C:\\i', 'c:\\I\\deep\\base', true)).toBeUndefined()
    expect(outsideTree('C:\\i', 'D:\\i\\base', true)).toBe('outside')
    expect(outsideTree('C:\\i', '\\\\server\\share\\base', true)).toBe('outside')
    expect(outsideTree('C:\\i', 'C:\\i\\.ssh\\key', true)).toBe('hidden')
    expect(outsideTree('C:\\i', 'C:\\ibase', true)).toBe('outside')
  })
})

const pointer = (count: number, reserved: number, size: bigint, offset: bigint): Buffer => {
  const data = Buffer.alloc(24)
  data.writeUInt32BE(count)
  data.writeUInt32BE(reserved, 4)
  data.writeBigUInt64BE(size, 8)
  data.writeBigUInt64BE(offset, 16)
  return data
}

describeWithQemu('names and headers, as QEMU takes them', (qemu) => {
  const place = (): string => {
    const folder = tempFolder()
    writeFileSync(join(folder, 'base.raw'), bytesOf(0x42))
    writeFileSync(Buffer.from(`${folder}/b\xff.raw`, 'latin1'), bytesOf(0x42))
    return folder
  }
  const bitmaps = (data: Uint8Array, autoclear = 1n): Parameters<typeof namedImage>[0] => ({ autoclear, extensions: [[0x23852875, data]] })
  const cases: Record<string, Parameters<typeof namedImage>[0]> = {
    'a name that ends in NUL': { backing: 'base.raw\0', format: 'raw' },
    'a name with a NUL inside': { backing: 'base.raw\0junk', format: 'raw' },
    'a name of NULs': { backing: '\0\0', format: 'raw' },
    'a format that ends in NUL': { backing: 'base.raw', format: 'raw\0' },
    'a format with a NUL inside': { backing: 'base.raw', format: 'raw\0xx' },
    'an empty format': { backing: 'base.raw', format: '' },
    'a format of NULs': { backing: 'base.raw', format: '\0\0' },
    'no format': { backing: 'base.raw' },
    'a name that is no UTF-8': { backing: Buffer.from('b\xff.raw', 'latin1'), format: 'raw' },
    'a format that is no UTF-8': { backing: 'base.raw', format: Buffer.from('r\xff', 'latin1') },
    'a data file whose name ends in NUL': { dataFile: '@/base.raw\0' },
    'a data file with a prefix': { dataFile: 'file:base.raw' },
    'a data file of JSON': { dataFile: `json:{"driver":"file","filename":"@/base.raw"}` },
    'a data file without a name': { dataFile: '' },
    'two formats': { backing: 'base.raw', extensions: [[0xe2792aca, Buffer.from('qcow2')], [0xe2792aca, Buffer.from('raw')]] },
    'the raw bit without a data file': { autoclear: 2n },
    'bitmaps with the reserved field set': bitmaps(pointer(1, 1, 32n, 0x40000n)),
    'the same, stale': bitmaps(pointer(1, 1, 32n, 0x40000n), 0n),
    'bitmaps of another length': bitmaps(Buffer.alloc(23), 0n),
    'no bitmaps': bitmaps(pointer(0, 0, 32n, 0x40000n)),
    'too many bitmaps': bitmaps(pointer(65536, 0, 32n, 0x40000n)),
    'an empty bitmap directory': bitmaps(pointer(1, 0, 0n, 0x40000n)),
    'a bitmap directory too large': bitmaps(pointer(1, 0, 1n << 40n, 0x40000n)),
    'a bitmap directory within a cluster': bitmaps(pointer(1, 0, 32n, 0x40008n)),
    'a key without encryption': { extensions: [[0x0537be77, Buffer.alloc(16)]] },
  }
  test.each(Object.entries(cases))('%s', async (_, names) => {
    const folder = place()
    const path = join(folder, 'i.qcow2')
    const { dataFile } = names
    writeFileSync(path, namedImage({ ...names, ...(typeof dataFile === 'string' ? { dataFile: dataFile.replace('@', folder) } : {}) }))
    const raw = `${path}.raw`
    const converted = await qemu.img('convert', '-f', 'qcow2', '-O', 'raw', path, raw)
    const theirs = converted.code === 0 ? readFileSync(raw)[0] : 'refused'
    const ours = await readFirst(path, { references: 'any', probeBackingFormat: true })
    expect(typeof ours === 'string' ? 'refused' : ours).toBe(theirs)
    const checked = await qemu.img('check', '-f', 'qcow2', path)
    // what only a missing or unknown other file hinders, our check does not look at
    const judged = await checkImage(path).then(() => 'opened', () => 'refused')
    if (names.dataFile === undefined && !converted.stderr.includes('backing file')) expect(judged).toBe(checked.code === 1 ? 'refused' : 'opened')
  })

  test('a bitmap whose table is empty', async () => {
    const path = join(tempFolder(), 'bitmap.qcow2')
    const image = await Qcow2Image.create(path, { size: 64 * KiB })
    await image.bitmaps.add({ name: 'b' })
    await image.close()
    const bytes = readFileSync(path)
    const directory = Number(bytes.readBigUInt64BE(bytes.indexOf(Buffer.from('23852875', 'hex')) + 8 + 16))
    bytes.writeUInt32BE(0, directory + 8)
    writeFileSync(path, bytes)
    expect((await qemu.img('check', path)).code).toBe(1)
    expect(await checkImage(path).then(({ corruptions, checkErrors }) => corruptions + checkErrors, () => 1)).toBeGreaterThan(0)
    const empty = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 0 })
    await expect(empty.bitmaps.add({ name: 'b' })).rejects.toThrow(RangeError)
    await empty.close()
  })

  test('a data file that a running QEMU holds is neither read nor written', async () => {
    const folder = tempFolder()
    const held = join(folder, 'held.raw')
    writeFileSync(held, bytesOf(1))
    const image = join(folder, 'holder.qcow2')
    writeFileSync(image, namedImage({ dataFile: held }))
    const machine = qemu.system('-display', 'none', '-S', '-monitor', 'stdio', '-drive', `file=${held},format=raw,if=virtio`)
    try {
      await new Promise((resolve) => machine.stdout.once('data', resolve))
      const { readImageLocks } = await import('../../src/block.ts')
      for (let tries = 0; tries < 100 && !(await readImageLocks(held)).held.has('write'); tries++) await new Promise((resolve) => setTimeout(resolve, 50))
      expect(await readFirst(image)).toBe('ERR_BUSY')
      expect(await readFirst(image, { forceShare: true })).toBe(0)
      await expect(Qcow2Image.open(image, { dataFile: held })).rejects.toMatchObject({ code: 'ERR_BUSY' })
      writeFileSync(join(folder, 'over.qcow2'), namedImage({ backing: 'held.raw', format: 'raw' }))
      expect(await readFirst(join(folder, 'over.qcow2'))).toBe('ERR_BUSY')
    } finally {
      machine.kill('SIGKILL')
    }
  })
})


describeWithQemu('encrypted images that QEMU makes', (qemu) => {
  test('version 2 with LUKS, and LUKS or AES over a data file', async () => {
    const folder = tempFolder()
    const dataFile = join(folder, 'data')
    const cases: CreateOptions[] = [
      { size: 1 << 20, version: 2, encryption: { format: 'luks', passphrase: 'abc', iterations: 1000 } },
      { size: 1 << 20, dataFile, encryption: { format: 'luks', passphrase: 'abc', iterations: 1000 } },
      { size: 1 << 20, dataFile, preallocation: 'metadata', encryption: { format: 'luks', passphrase: 'abc', iterations: 1000 } },
      { size: 1 << 20, dataFile, encryption: { format: 'aes', passphrase: 'abc' } },
    ]
    for (const [index, options] of cases.entries()) {
      const path = join(folder, `${index}.qcow2`)
      const image = await Qcow2Image.create(path, options)
      await image.write(128 * KiB, bytesOf(7))
      await image.close()
      const raw = join(folder, `${index}.raw`)
      const { format } = options.encryption!
      const named = `driver=qcow2,file.filename=${path},encrypt.format=${format},encrypt.key-secret=s`
      await qemu.imgOk('convert', '--object', 'secret,id=s,data=abc', '--image-opts', '-O', 'raw', named, raw)
      const expected = Buffer.alloc(1 << 20)
      expected.fill(7, 128 * KiB, 192 * KiB)
      expect(readFileSync(raw).equals(expected)).toBe(true)
      if (options.dataFile !== undefined) expect(readFileSync(dataFile).includes(Buffer.alloc(64, 7))).toBe(false)
      expect((await qemu.img('check', '--object', 'secret,id=s,data=abc', '--image-opts', named)).code).toBe(0)
    }
    await expect(Qcow2Image.create(join(folder, 'no'), { size: 1 << 20, dataFile, dataFileRaw: true, encryption: cases[1]!.encryption })).rejects.toThrow(TypeError)
  })
})
