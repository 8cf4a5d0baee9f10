/** What scripts written for qemu-img ask for beyond ordinary images: damaged ones, parts, bitmaps over NBD. */
import { mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join, relative } from 'node:path'
import { describe, expect, test, vi } from 'vitest'
import { main } from '../../src/cli/main.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { listen } from '../../src/nbd/socket.ts'
import { NbdServer } from '../../src/nbd/server.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run, terminal } from './run.ts'

const KiB = 1024

/** An image of 256 KiB, each cluster of 64 KiB filled with its number from 1; the host offsets of the clusters. */
async function numbered(path: string, compressed: boolean): Promise<void> {
  await using image = await Qcow2Image.create(path, { size: 256 * KiB })
  for (let i = 0; i < 4; i++) {
    const bytes = new Uint8Array(64 * KiB).fill(i + 1)
    await (compressed ? image.writeCompressed(i * 64 * KiB, bytes) : image.write(i * 64 * KiB, bytes))
  }
}

describe('convert --salvage', () => {
  /** The image with a compressed cluster whose bytes are no deflate stream. */
  async function damaged(): Promise<{ folder: string; path: string }> {
    const folder = tempFolder()
    const path = join(folder, 'disk')
    await numbered(path, true)
    const bytes = readFileSync(path)
    const l2 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40))) & 0x00ff_ffff_ffff_fe00n)
    const second = Number(bytes.readBigUInt64BE(l2 + 8) & 0x3fff_ffff_ffffn)
    bytes.fill(0xff, second, second + 16)
    writeFileSync(path, bytes)
    return { folder, path }
  }

  test.each(['raw', 'qcow2'])('what cannot be read becomes zeroes in %s, and is told once', async (format) => {
    const { folder, path } = await damaged()
    const target = join(folder, 'saved')
    const plain = await run(['convert', '-O', format, path, target])
    expect(plain.code).toBe(1)
    const { code, stderr } = await run(['convert', '--salvage', '-O', format, path, target])
    expect(code).toBe(0)
    expect(stderr.match(/warning: error while reading offset 65536: /g)).toHaveLength(1)
    expect(stderr.trim().split('\n')).toHaveLength(1)
    // qemu-img tells each sector
    const each = await run(['convert', '--salvage', '-O', format, path, target], { program: 'qemu-img' })
    expect(each.stderr.match(/warning: error while reading offset \d+: /g)).toHaveLength(128)
    const raw = join(folder, 'raw')
    expect((await run(['convert', '-f', format, '-O', 'raw', target, raw])).code).toBe(0)
    const saved = readFileSync(raw)
    expect([0, 1, 2, 3].map((i) => new Set(saved.subarray(i * 64 * KiB, (i + 1) * 64 * KiB)))).toEqual([new Set([1]), new Set([0]), new Set([3]), new Set([4])])
  })

  test('a map that cannot be read is read around', async () => {
    const folder = tempFolder()
    const path = join(folder, 'disk')
    await numbered(path, false)
    const bytes = readFileSync(path)
    const l2 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40))) & 0x00ff_ffff_ffff_fe00n)
    bytes[l2 + 15] = 1 << 6 // a reserved bit: the offset of the second cluster breaks the format
    bytes[l2 + 14] = 2 | bytes[l2 + 14]!
    writeFileSync(path, bytes)
    const target = join(folder, 'saved')
    expect((await run(['convert', '-O', 'raw', path, target])).code).toBe(1)
    const { code, stderr } = await run(['convert', '--salvage', '-O', 'raw', path, target])
    expect(code).toBe(0)
    expect(stderr).toMatch(/error while reading (block status at )?offset 65536/)
    const saved = readFileSync(target)
    expect([0, 1, 2, 3].map((i) => saved[i * 64 * KiB])).toEqual([1, 0, 3, 4])
  })
})

test('dd copies as many blocks as count says, from where skip says; zeroes take no space', async () => {
  const folder = tempFolder()
  const [path, part] = [join(folder, 'disk'), join(folder, 'part')]
  writeFileSync(path, Buffer.concat([1, 2, 0, 4, 5].map((value) => Buffer.alloc(64 * KiB, value))))
  expect(await run(['dd', '-f', 'raw', '-O', 'qcow2', 'bs=64k', 'skip=1', 'count=3', `if=${path}`, `of=${part}`])).toMatchObject({ code: 0, stdout: '', stderr: '' })
  await using image = await Qcow2Image.open(part, { readOnly: true })
  expect(image.size).toBe(192 * KiB)
  expect(await Promise.all([0, 1, 2].map(async (i) => (await image.read(i * 64 * KiB, 1))[0]))).toEqual([2, 0, 4])
  const extents = []
  for await (const { start, data } of image.map()) extents.push([start, data])
  expect(extents).toEqual([[0, true], [64 * KiB, false], [128 * KiB, true]])
  expect(await run(['dd', `if=${path}`, `of=${path}`])).toMatchObject({ code: 1 })
  expect(readFileSync(path)).toHaveLength(320 * KiB)
})

describe('by the name qemu-img, into a pipe', () => {
  /** Both streams of a run in one, as they come. */
  async function together(program: string, isTty: boolean, ...argv: string[]): Promise<string> {
    const parts: string[] = []
    const sink = {
      isTty,
      columns: undefined,
      write: (data: string | Uint8Array): Promise<void> => {
        parts.push(Buffer.from(data).toString())
        return Promise.resolve()
      },
    }
    await main(argv, { ...terminal({ program }), stdout: sink, stderr: sink })
    return parts.join('')
  }

  test('what goes to stdout comes behind what goes to stderr, as from a C program', async () => {
    const folder = tempFolder()
    const [raw, path] = [join(folder, 'raw'), join(folder, 'disk')]
    writeFileSync(raw, Buffer.alloc(128 << 10, 3))
    await run(['convert', '-c', '-f', 'raw', '-O', 'qcow2', raw, path])
    const line = 'Offset          Length          Mapped to       File\n'
    const failing = ['map', path]
    expect(await together('qemu-img', false, ...failing)).toMatch(new RegExp(`^qemu-img: .*\n${line}$`))
    expect(await together('qemu-img', true, ...failing)).toMatch(new RegExp(`^${line}qemu-img: .*\n$`))
    expect(await together('qcow2', false, ...failing)).toMatch(new RegExp(`^${line}qcow2: .*\n$`))
    writeFileSync(raw, Buffer.alloc(8192, 3))
    expect((await run(['convert', '-f', 'raw', raw, '-'], { program: 'qemu-img' })).bytes).toEqual(Buffer.alloc(8192, 3))
  })
})

describe('what qemu-img sends on at once', () => {
  test.each([['raw', []], ['qcow2', ['-o', 'cluster_size=64k']]])('the line of create -f %s, before the error', async (format, options) => {
    const path = join(tempFolder(), 'disk')
    mkdirSync(path)
    const { stdout, stderr, order } = await ordered(['create', '-f', format, ...options, path, '1M'])
    expect(stdout).toContain('Formatting')
    expect(stderr).toContain('Is a directory')
    expect(order).toEqual(['stdout', 'stderr'])
  })

  test('progress, while the work goes on', async () => {
    const folder = tempFolder()
    const raw = join(folder, 'raw')
    writeFileSync(raw, Buffer.alloc(4 << 20, 3))
    const { stdout, order } = await ordered(['convert', '-p', '-f', 'raw', '-O', 'qcow2', raw, join(folder, 'out')])
    expect(stdout).toMatch(/^ {4}\(0.00\/100%\)\r.*\(100.00\/100%\)\r\n$/s)
    expect(order.length).toBeGreaterThan(2)
  })

  /** A run into pipes, and which of them was written when. */
  async function ordered(argv: readonly string[]): Promise<{ stdout: string; stderr: string; order: string[] }> {
    const order: string[] = []
    const ours = terminal({ program: 'qemu-img' })
    for (const name of ['stdout', 'stderr'] as const) {
      const write = ours[name].write.bind(ours[name])
      ours[name].write = (data) => {
        order.push(name)
        return write(data)
      }
    }
    await main(argv, ours)
    return { stdout: ours.stdout.bytes.toString(), stderr: ours.stderr.bytes.toString(), order }
  }
})

describe('check', () => {
  /** A data cluster that no counter counts, as a crash with lazy refcounts leaves it. */
  async function uncounted(): Promise<string> {
    const path = join(tempFolder(), 'disk')
    await numbered(path, false)
    const bytes = readFileSync(path)
    const block = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(48))))
    bytes.writeUInt16BE(0, block + 2 * 5)
    writeFileSync(path, bytes)
    return path
  }

  test('tells lost counters and COPIED flags in the words of qemu-img, and what a repair set right', async () => {
    const path = await uncounted()
    const found = await run(['check', path])
    expect(found.code).toBe(2)
    expect(found.stderr).toBe('ERROR cluster 5 refcount=0 reference=1\nERROR OFLAG_COPIED data cluster: l2_entry=8000000000050000 refcount=0\n')
    const repaired = await run(['check', '-r', 'all', path])
    expect(repaired.code).toBe(0)
    expect(repaired.stderr).toBe('ERROR cluster 5 refcount=0 reference=1\nRebuilding refcount structure\nRepairing cluster 1 refcount=1 reference=0\nRepairing cluster 2 refcount=1 reference=0\n')
    // the flag was right all the time
    expect(repaired.stdout).toContain('    1 corruptions\n')
    expect(await run(['check', path])).toMatchObject({ code: 0, stderr: '' })
  })

  test('-r clears the autoclear bits of features that are not known here', async () => {
    const path = join(tempFolder(), 'disk')
    await numbered(path, false)
    const bytes = readFileSync(path)
    bytes[88] = 0x80
    writeFileSync(path, bytes)
    expect((await run(['check', '-q', path])).code).toBe(0)
    expect(readFileSync(path)[88]).toBe(0x80)
    expect((await run(['check', '-q', '-r', 'all', path])).code).toBe(0)
    expect(readFileSync(path)[88]).toBe(0)
  })
})

describe('names with options', () => {
  test('a part of a file, read and written', async () => {
    const folder = tempFolder()
    const file = join(folder, 'container')
    writeFileSync(file, Buffer.concat([Buffer.alloc(4096, 1), Buffer.alloc(4096, 2), Buffer.alloc(4096, 3)]))
    const part = `driver=raw,offset=4k,size=4k,file.filename=${file}`
    const copy = join(folder, 'copy')
    expect((await run(['convert', '--image-opts', part, copy])).code).toBe(0)
    expect(readFileSync(copy).equals(Buffer.alloc(4096, 2))).toBe(true)
    writeFileSync(copy, Buffer.alloc(4096, 9))
    expect((await run(['convert', '-n', '--target-image-opts', '-f', 'raw', copy, part])).code).toBe(0)
    expect(readFileSync(file).equals(Buffer.concat([Buffer.alloc(4096, 1), Buffer.alloc(4096, 9), Buffer.alloc(4096, 3)]))).toBe(true)
    const past = await run(['convert', '--image-opts', `driver=raw,offset=4k,size=64k,file.filename=${file}`, join(folder, 'bad')])
    expect(past).toMatchObject({ code: 1 })
    expect(past.stderr).toContain('reach past the 12288 bytes of the file')
  })

  test('an image inside a file of fixed size says when it is full, and stays sound', async () => {
    const folder = tempFolder()
    const container = join(folder, 'container')
    const image = join(folder, 'image')
    expect((await run(['create', '-q', '-f', 'qcow2', image, '4M'])).code).toBe(0)
    writeFileSync(container, Buffer.concat([readFileSync(image), Buffer.alloc(1 << 20)]))
    const full = join(folder, 'full')
    writeFileSync(full, Buffer.alloc(4 << 20, 7))
    const inside = `driver=qcow2,file.driver=raw,file.size=1M,file.file.filename=${container}`
    const { code, stderr } = await run(['convert', '-n', '--target-image-opts', '-f', 'raw', full, inside])
    expect(code).toBe(1)
    expect(stderr).toMatch(/No space left on device$/m)
    expect((await run(['check', '-q', '--image-opts', inside])).code % 3).toBe(0)
  })
})

test.each(['falloc', 'full'])('create with preallocation=%s takes the space of an external data file', async (preallocation) => {
  const folder = tempFolder()
  const data = join(folder, 'data')
  const options = `data_file=${data},preallocation=${preallocation}`
  expect(await run(['create', '-q', '-f', 'qcow2', '-o', options, join(folder, 'disk'), '1M'])).toMatchObject({ code: 0, stderr: '' })
  expect(statSync(data).blocks * 512).toBeGreaterThanOrEqual(1 << 20)
})

test('commit -b leaves the overlay as it is, also over its direct base', async () => {
  const folder = tempFolder()
  const [base, top] = [join(folder, 'base'), join(folder, 'top')]
  await numbered(base, false)
  expect(await run(['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', top])).toMatchObject({ code: 0 })
  {
    await using image = await Qcow2Image.open(top, { references: 'any' })
    await image.write(0, new Uint8Array(64 * KiB).fill(9))
  }
  const depths = async (): Promise<number[]> => (JSON.parse((await run(['map', '--output=json', top])).stdout) as { depth: number }[]).map(({ depth }) => depth)
  expect(await run(['commit', '-b', base, top])).toMatchObject({ code: 0 })
  expect(await depths()).toEqual([0, 1])
  expect(await run(['commit', top])).toMatchObject({ code: 0 })
  expect(await depths()).toEqual([1])
  await using image = await Qcow2Image.open(base, { readOnly: true })
  expect((await image.read(0, 1))[0]).toBe(9)
})

test('a disk is converted into an encrypted image with all its space, and back', async () => {
  const folder = tempFolder()
  const [plain, secret, back] = [join(folder, 'plain.raw'), join(folder, 'secret'), join(folder, 'back.raw')]
  const disk = Buffer.alloc(1 << 20)
  disk.fill('words', 70_000, 200_000)
  writeFileSync(plain, disk)
  const key = ['--object', 'secret,id=s,data=geheim']
  const layout = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,preallocation=metadata'
  expect(await run(['convert', ...key, '-f', 'raw', '-O', 'qcow2', '-o', layout, plain, secret])).toMatchObject({ code: 0, stderr: '' })
  expect(readFileSync(secret).length).toBeGreaterThan(disk.length)
  expect(readFileSync(secret).includes('wordswords')).toBe(false)
  expect(await run(['convert', ...key, '-O', 'raw', '--image-opts', `driver=qcow2,encrypt.key-secret=s,file.filename=${secret}`, back])).toMatchObject({ code: 0, stderr: '' })
  expect(readFileSync(back).equals(disk)).toBe(true)
})

test('amend sets postponed refcounts right first, and shows progress', async () => {
  const path = join(tempFolder(), 'disk')
  await numbered(path, false)
  const bytes = readFileSync(path)
  const block = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(48))))
  bytes.writeUInt16BE(0, block + 2 * 5)
  bytes[79] = 1 // the dirty bit
  bytes[87] = 1 // lazy refcounts
  writeFileSync(path, bytes)
  const { code, stdout } = await run(['amend', '-p', '-o', 'compat=0.10', path])
  expect([code, stdout]).toEqual([0, '    (0.00/100%)\r    (100.00/100%)\r    (100.00/100%)\r\n'])
  expect(await run(['check', path])).toMatchObject({ code: 0, stderr: '' })
  expect((await run(['info', path])).stdout).toContain('compat: 0.10')
})

test('commit -b finds a base by the name it has in the image above, or by its path', async () => {
  for (const base of ['base', './base', 'ABSOLUTE']) {
    const folder = tempFolder()
    const path = (name: string): string => join(folder, name)
    for (const line of [['create', '-q', '-f', 'qcow2', path('base'), '1M'], ['create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', path('mid')], ['create', '-q', '-f', 'qcow2', '-b', 'mid', '-F', 'qcow2', path('top')]]) {
      expect(await run(line)).toMatchObject({ code: 0 })
    }
    expect(await run(['commit', '-b', base === 'ABSOLUTE' ? path('base') : base, path('top')])).toMatchObject({ code: 0, stdout: 'Image committed.\n' })
    expect(await run(['commit', '-b', 'other', path('top')])).toMatchObject({ code: 1, stderr: `qcow2: Did not find 'other' in the backing chain of '${path('top')}'\n` })
  }
})

test('commit -b takes a path from the folder of the image above, not from the current one', async () => {
  const folder = join(tempFolder(), process.cwd()) // deeper than this one: the same steps up lead elsewhere
  mkdirSync(folder, { recursive: true })
  const path = (name: string): string => relative(process.cwd(), join(folder, name))
  for (const line of [['create', '-q', '-f', 'qcow2', path('base'), '1M'], ['create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', path('top')]]) {
    expect(await run(line)).toMatchObject({ code: 0 })
  }
  expect(await run(['commit', '-b', path('base'), path('top')])).toMatchObject({ code: 1, stderr: `qcow2: Did not find '${path('base')}' in the backing chain of '${path('top')}'\n` })
})

test('started as qemu-img, a file that is missing is named twice, as qemu-img does', async () => {
  const path = join(tempFolder(), 'missing')
  expect((await run(['info', path], { program: 'qemu-img' })).stderr).toBe(`qemu-img: Could not open '${path}': Could not open '${path}': No such file or directory\n`)
  expect((await run(['info', path])).stderr).toBe(`qcow2: Could not open '${path}': No such file or directory\n`)
})

test('an image whose header tells a size of 2^53 or more is too big', async () => {
  const path = join(tempFolder(), 'disk')
  await numbered(path, false)
  const bytes = readFileSync(path)
  bytes[24] = 0x10
  writeFileSync(path, bytes)
  for (const command of ['info', 'check', 'map']) expect((await run([command, path])).stderr).toBe(`qcow2: Could not open '${path}': Image is too big\n`)
})

test('incompatible features are named as QEMU names them', async () => {
  const path = join(tempFolder(), 'disk')
  await numbered(path, false)
  const bytes = readFileSync(path)
  bytes[72] = 0xe0
  writeFileSync(path, bytes)
  expect((await run(['info', path])).stderr).toBe(`qcow2: Could not open '${path}': Unsupported qcow2 feature(s): Unknown incompatible feature: e000000000000000\n`)
})

test('the unsafe rebase leaves bitmaps valid', async () => {
  const folder = tempFolder()
  const path = join(folder, 'disk')
  await numbered(path, false)
  for (const line of [['bitmap', '--add', path, 'b'], ['rebase', '-u', '-F', 'raw', '-b', 'any', path]]) expect((await run(line)).code).toBe(0)
  expect((await run(['info', '--output=json', path])).stdout).not.toContain('in-use')
})

test('convert --bitmaps finds a broken one before the target exists', async () => {
  const folder = tempFolder()
  const [path, target] = [join(folder, 'disk'), join(folder, 'copy')]
  await numbered(path, false)
  await run(['bitmap', '--add', path, 'b'])
  {
    await using image = await Qcow2Image.open(path)
    await image.write(0, new Uint8Array(512))
  }
  const { code, stderr } = await run(['convert', '--bitmaps', '-O', 'qcow2', path, target], { program: 'qemu-img' })
  expect([code, stderr]).toEqual([1, "qemu-img: Cannot copy inconsistent bitmap 'b'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it\n"])
  expect((await run(['info', target])).stderr).toContain('No such file or directory')
  expect(await run(['convert', '--bitmaps', '--skip-broken-bitmaps', '-O', 'qcow2', path, target])).toMatchObject({ code: 0, stderr: "qcow2: warning: Skipping inconsistent bitmap 'b'\n" })
})

test('map of an NBD export has offsets', async () => {
  const socket = join(tempFolder(), 'nbd')
  await using _listener = await listen(new NbdServer([{ name: '', device: new MemoryDevice(new Uint8Array(65536)) }]), { path: socket })
  const { stdout } = await run(['map', '--output=json', `nbd+unix:///?socket=${socket}`])
  expect(JSON.parse(stdout)).toEqual([{ start: 0, length: 65536, depth: 0, present: true, zero: false, data: true, compressed: false, offset: 0 }])
})

describeWithQemu('bitmaps over NBD', (qemu) => {
  test('x-dirty-bitmap shows a bitmap as qemu-img shows it', async () => {
    const folder = tempFolder()
    const [path, socket] = [join(folder, 'disk'), join(folder, 'nbd')]
    await qemu.imgOk('create', '-q', '-f', 'qcow2', path, '1M')
    await qemu.imgOk('bitmap', '--add', path, 'b')
    expect(await qemu.io('-c', 'write 128k 64k', '-c', 'write 512k 1', path)).toMatchObject({ code: 0 })
    await using image = await Qcow2Image.open(path, { readOnly: true })
    const ranges = []
    for await (const { offset, length } of image.bitmaps.read('b')) ranges.push({ offset, length })
    expect(ranges).not.toEqual([])
    const stop = new AbortController()
    const ended = run(['serve', '--read-only', '-B', 'b', '--socket', socket, path], { signal: stop.signal })
    const opts = (context: string): string => `driver=nbd,server.type=unix,server.path=${socket},x-dirty-bitmap=${context}`
    try {
      let theirs = await qemu.img('map', '--output=json', '--image-opts', opts('qemu:dirty-bitmap:b'))
      for (let i = 0; i < 200 && theirs.code !== 0; i++) {
        await new Promise((resolve) => setTimeout(resolve, 10))
        theirs = await qemu.img('map', '--output=json', '--image-opts', opts('qemu:dirty-bitmap:b'))
      }
      const ours = await run(['map', '--output=json', '--image-opts', opts('qemu:dirty-bitmap:b')])
      // versions before 8.2 do not say what is compressed
      const expected = (JSON.parse(theirs.stdout) as object[]).map((entry) => ({ compressed: false, ...entry }))
      expect(JSON.parse(ours.stdout)).toEqual(expected)
      const none = await run(['map', '--image-opts', opts('qemu:dirty-bitmap:none')])
      expect(none).toMatchObject({ code: 1 })
    } finally {
      stop.abort()
      await ended
    }
  })
})

describeWithQemu('beside the real program', (qemu) => {
  /** What both print and exit with, each called as `qemu-img`. */
  async function both(...line: string[]): Promise<void> {
    const { code, stdout, stderr } = await run(line, { program: 'qemu-img' })
    expect({ code, stdout, stderr }).toEqual(await qemu.img(...line))
  }

  test('progress counts the data that is copied', async () => {
    const folder = tempFolder()
    const [disk, copy] = [join(folder, 'disk'), join(folder, 'copy')]
    await qemu.imgOk('create', '-q', '-f', 'qcow2', disk, '128M')
    for (const at of ['0', '2M', '4M', '32M']) await qemu.io('-c', `write ${at} 1M`, disk)
    await both('convert', '-p', '-O', 'qcow2', disk, copy)
    await both('convert', '-p', '-O', 'raw', disk, copy)
    await both('rebase', '-p', '-u', '-b', '', disk)
  })

  test('a name with a colon stays one that opens the file', async () => {
    const folder = tempFolder()
    const before = process.cwd()
    process.chdir(folder)
    try {
      await qemu.imgOk('create', '-q', '-f', 'qcow2', 'base', '1M')
      await qemu.imgOk('create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', 'file:a:top')
      const lines = async (info: Promise<{ stdout: string }>): Promise<string[]> => (await info).stdout.split('\n').filter((line) => /^image|^backing|^ {4}"/.test(line) && !line.includes('actual-size'))
      for (const output of qemu.major >= 10 ? ['human', 'json'] : ['human']) {
        const info = ['info', `--output=${output}`, 'file:a:top']
        expect(await lines(run(info))).toEqual(await lines(qemu.img(...info)))
      }
      await both('check', 'file:a:top')
      await both('map', 'file:a:top')
    } finally {
      process.chdir(before)
    }
  })

  test('without the name of its data file an image asks for it', async () => {
    const folder = tempFolder()
    const [disk, data] = [join(folder, 'disk'), join(folder, 'data')]
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', `data_file=${data}`, disk, '1M')
    expect(await run(['amend', '-o', 'data_file=', disk])).toMatchObject({ code: 0, stderr: '' })
    await both('map', disk)
    await both('map', '--image-opts', `driver=qcow2,file.filename=${disk},data-file.driver=file,data-file.filename=${data}`)
    expect(await run(['amend', '-o', `data_file=${data}`, disk])).toMatchObject({ code: 0 })
    await both('map', disk)
    const plain = join(folder, 'plain')
    await numbered(plain, false)
    const surplus = ['map', '--image-opts', `driver=qcow2,file.filename=${plain},data-file.driver=file,data-file.filename=${data}`]
    const refusal = "'data-file' can only be set for images with an external data file\n"
    expect(await qemu.img(...surplus)).toMatchObject({ code: 1, stderr: expect.stringContaining(refusal) as string })
    expect(await run(surplus)).toMatchObject({ code: 1, stderr: expect.stringContaining(refusal) as string })
  })

  test.each([[], ['-B', 'base', '-F', 'qcow2']])('convert into an encrypted image %s', async (...backing) => {
    const folder = tempFolder()
    const before = process.cwd()
    process.chdir(folder)
    try {
      await numbered('base', false)
      await qemu.imgOk('create', '-q', '-f', 'qcow2', '-b', 'base', '-F', 'qcow2', 'top')
      await using top = await Qcow2Image.open('top')
      await top.write(70_000, new Uint8Array(100_000).fill(7))
      await top.writeZeroes(0, 65_536)
      await top.close()
      const secret = ['--object', 'secret,id=s,data=abc']
      const options = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10'
      expect(await run(['convert', ...secret, '-O', 'qcow2', ...backing, '-o', options, 'top', 'copy'])).toMatchObject({ code: 0, stderr: '' })
      const compare = ['compare', ...secret, '--image-opts', 'driver=qcow2,file.filename=top', 'driver=qcow2,encrypt.key-secret=s,file.filename=copy']
      expect(await qemu.img(...compare)).toMatchObject({ code: 0, stdout: 'Images are identical.\n' })
    } finally {
      process.chdir(before)
    }
  })

  test('compressed clusters and an external data file exclude each other', async () => {
    const folder = tempFolder()
    const [disk, copy] = [join(folder, 'disk'), join(folder, 'copy')]
    await numbered(disk, false)
    const line = ['convert', '-c', '-O', 'qcow2', '-o', `data_file=${join(folder, 'data')}`, disk, copy]
    expect((await qemu.img(...line)).code).toBe(1)
    expect(await run(line)).toMatchObject({ code: 1, stderr: 'qcow2: An external data file cannot hold compressed clusters; leave out -c\n' })
  })

  test('resize --preallocation takes whole clusters', async () => {
    const folder = tempFolder()
    for (const [before, after] of [['31k', '96k'], ['33k', '96k'], ['33k', '128k'], ['31k', '40k'], ['1000k', '2M']] as const) {
      const lengths: number[] = []
      for (const resize of [(...line: string[]) => run(line), (...line: string[]) => qemu.img(...line)]) {
        const path = join(folder, `disk${lengths.length}`)
        await qemu.imgOk('create', '-q', '-f', 'qcow2', path, before)
        expect(await resize('resize', '-q', '--preallocation=full', path, after)).toMatchObject({ code: 0 })
        expect(await qemu.img('check', '-q', path)).toMatchObject({ code: 0 })
        lengths.push(statSync(path).size)
      }
      expect({ before, after, length: lengths[0] }).toEqual({ before, after, length: lengths[1] })
    }
  })

  test('check -r tells wrong counters before it repairs them', async () => {
    const folder = tempFolder()
    const [ours, theirs] = [join(folder, 'ours'), join(folder, 'theirs')]
    for (const [cluster, count, repair] of [[6, 5, 'leaks'], [6, 5, 'all'], [40, 1, 'leaks']] as const) {
      await numbered(ours, false)
      const bytes = readFileSync(ours)
      const block = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(48))))
      bytes.writeUInt16BE(count, block + 2 * cluster)
      // as long as the counters reach
      for (const path of [ours, theirs]) writeFileSync(path, Buffer.concat([bytes, Buffer.alloc(41 * 64 * KiB - bytes.length)]))
      const { code, stderr } = await run(['check', '-r', repair, ours])
      const real = await qemu.img('check', '-r', repair, theirs)
      expect({ cluster, repair, code, stderr }).toEqual({ cluster, repair, code: real.code, stderr: real.stderr })
    }
  })

  test('bench sends the requests it announces, and refuses what cannot be sent', async () => {
    const path = join(tempFolder(), 'disk')
    await qemu.imgOk('create', '-q', '-f', 'qcow2', path, '4M')
    const timeless = ({ code, stdout, stderr }: { code: number; stdout: string; stderr: string }): object => ({ code, stdout: stdout.replace(/\d+\.\d{3} seconds/, 'TIME'), stderr })
    const lines = ['-c 100', '-c 100 -w --flush-interval 10 -d 4', '-c 9 -w --flush-interval 4 -d 2 --no-drain', '-c 3 -s 4M', '-c 5 -S 1M -s 64k', '-w --flush-interval 10 -d 40', '-c 10 --flush-interval 64', '-U -w']
    // 7.2 takes these, and with no request at a time never ends
    if (qemu.major >= 10) lines.push('-w --pattern 300', '-c 0', '-s 0', '-d 0')
    for (const line of lines) {
      const argv = ['bench', ...line.split(' '), path]
      expect({ line, ...timeless(await run(argv, { program: 'qemu-img' })) }).toEqual({ line, ...timeless(await qemu.img(...argv)) })
    }
    expect(await run(['bench', '-q', '-w', '--pattern', '7', '-c', '3', '-s', '64k', '-S', '128k', '-o', '64k', path])).toMatchObject({ code: 0, stdout: '' })
    const { stdout } = await qemu.io('-c', 'read -P 0 0 64k', '-c', 'read -P 7 64k 64k', '-c', 'read -P 0 128k 64k', '-c', 'read -P 7 320k 64k', '-c', 'read -P 0 384k 64k', path)
    expect(stdout).not.toContain('failed')
    expect(await run(['bench', '-c', '5', '-o', '5M', path])).toMatchObject({ code: 1 })
  })

  test('what a running QEMU holds is told in words scripts look for', async () => {
    const path = join(tempFolder(), 'disk')
    await qemu.imgOk('create', '-q', '-f', 'qcow2', path, '1M')
    const vm = qemu.system('-nodefaults', '-display', 'none', '-S', '-monitor', 'stdio', '-drive', `if=none,file=${path}`)
    const ended = new Promise((resolve) => vm.once('close', resolve))
    try {
      await new Promise((resolve) => vm.stdout.once('data', resolve))
      await vi.waitFor(async () => expect((await qemu.img('info', path)).code).toBe(1))
      for (const line of ['info', 'check', 'map', 'snapshot -l', 'bench -c 1', 'amend -o size=1M', 'bench -w -c 1', 'create -q -f qcow2']) {
        const argv = [...line.split(' '), path, ...(line.startsWith('create') ? ['1M'] : [])]
        const { code, stderr } = await run(argv, { program: 'qemu-img' })
        expect({ line, code, stderr }).toEqual({ line, code: 1, stderr: (await qemu.img(...argv)).stderr })
      }
      expect(await run(['info', path])).toMatchObject({ code: 1, stderr: expect.stringContaining('--force-share') as string })
    } finally {
      vm.kill('SIGKILL')
      await ended
    }
  })

  test('what is too large to make is too large to measure', async () => {
    await both('measure', '-O', 'qcow2', '-o', 'cluster_size=512', '--size', '1T')
    await both('measure', '-O', 'qcow2', '-o', 'extended_l2=on', '--size', '1025T')
    await both('measure', '-O', 'qcow2', '-o', 'extended_l2=on', '--size', '1024T')
  })
})

test('an NBD export has one name, however it was given', async () => {
  const device = new MemoryDevice(new Uint8Array(65536))
  await using listener = await listen(new NbdServer([{ name: 'disk', device }]), { host: '127.0.0.1', port: 0 })
  const { port } = listener.address as { port: number }
  for (const name of [`nbd:127.0.0.1:${port}:exportname=disk`, `nbd://127.0.0.1:${port}/disk`, `json:{"driver":"nbd","host":"127.0.0.1","port":"${port}","export":"disk"}`]) {
    expect((await run(['info', name])).stdout).toContain(`image: nbd://127.0.0.1:${port}/disk\n`)
  }
})
