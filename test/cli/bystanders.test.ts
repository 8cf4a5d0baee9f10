/**
 * Random commands over a folder of images, links, hard links, data files, a loop device and a file that a QEMU holds: no file but the named output
 * ever changes, and a command that fails, or is killed, leaves every file as it was or a new one whole.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, linkSync, lstatSync, readFileSync, readdirSync, realpathSync, statSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs'
import { basename, join, resolve } from 'node:path'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { convertToQcow2 } from '../../src/qcow2/convert.ts'
import { copyDevice } from '../../src/qcow2/copy.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { loopOver, type LoopDevice } from '../support/loop-device.ts'
import { qemus } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

const KiB = 1024
const size = 256 * KiB
const program = resolve(import.meta.dirname, '../../dist/cli.cjs')

const savedVm = readFileSync(join(import.meta.dirname, '../fixtures/captures/qemu100-savevm.vmstate.gz'))

/** base <- top; split with split.raw as its data file; plain.raw; device.img; saved, a VM; held, for a QEMU; and other names of them. */
async function makeFolder(): Promise<string> {
  const folder = tempFolder()
  const at = (name: string): string => join(folder, name)
  const fill = async (image: Qcow2Image, byte: number): Promise<void> => {
    await image.write(4096, new Uint8Array(100_000).fill(byte))
    await image.close()
  }
  await fill(await Qcow2Image.create(at('base'), { size, clusterSize: 4096 }), 1)
  await fill(await Qcow2Image.create(at('top'), { backing: { file: 'base', format: 'qcow2' } }), 2)
  await fill(await Qcow2Image.create(at('split'), { size, dataFile: at('split.raw'), references: 'any' }), 3)
  await fill(await Qcow2Image.create(at('held'), { size }), 4)
  writeFileSync(at('plain.raw'), new Uint8Array(size).fill(5))
  writeFileSync(at('saved'), savedVm)
  await fill(await Qcow2Image.create(at('device.img'), { size }), 6)
  truncateSync(at('device.img'), 2 * size)
  for (const [name, target] of [['soft-base', 'base'], ['soft-data', 'split.raw'], ['soft-held', 'held'], ['soft-new', 'nothing-yet']] as const) symlinkSync(target, at(name))
  for (const [name, target] of [['hard-top', 'top'], ['hard-plain', 'plain.raw']] as const) linkSync(at(target), at(name))
  return folder
}

const names = ['base', 'top', 'split', 'split.raw', 'held', 'plain.raw', 'soft-base', 'soft-data', 'soft-held', 'soft-new', 'hard-top', 'hard-plain', 'new', 'saved', 'device.img', 'loop']
const images = ['base', 'top', 'split', 'held', 'soft-base', 'hard-top', 'soft-held', 'device.img', 'loop']

/** One command: what is called, what it may write anew, and what it may write into. */
interface Command {
  readonly call: string[] | ((at: (name: string) => string) => Promise<unknown>)
  /** Replaced: any file but these is as it was, and these too if the command fails. */
  readonly makes?: readonly string[]
  /** Changed in place; with `commit` the file below too. */
  readonly changes?: readonly string[]
}

const source = fc.constantFrom(...images, 'plain.raw', 'hard-plain')
const target = fc.constantFrom(...names)
const format = fc.constantFrom('qcow2', 'raw')
const command: fc.Arbitrary<Command> = fc.oneof(
  fc.tuple(format, source, target).map(([to, from, name]) => ({ call: ['convert', '-O', to, `@${from}`, `@${name}`], makes: [name] })),
  fc.tuple(source, target).map(([from, name]) => ({ call: ['convert', '-O', 'qcow2', '-o', 'preallocation=metadata', `@${from}`, `@${name}`], makes: [name] })),
  fc.tuple(source, target, target).map(([from, data, name]) => ({ call: ['convert', '-O', 'qcow2', '-o', `data_file=@${data}`, `@${from}`, `@${name}`], makes: [name, data] })),
  fc.tuple(fc.constantFrom(...images), source, target).map(([below, from, name]) => ({ call: ['convert', '-O', 'qcow2', '-B', `@${below}`, '-F', 'qcow2', `@${from}`, `@${name}`], makes: [name] })),
  fc.tuple(format, source, target).map(([to, from, name]) => ({ call: ['convert', '-n', '-O', to, `@${from}`, `@${name}`], changes: [name] })),
  fc.tuple(format, source, target).map(([to, from, name]) => ({ call: ['dd', '-O', to, 'bs=4k', 'count=20', `if=@${from}`, `of=@${name}`], makes: [name] })),
  fc.tuple(format, target).map(([to, name]) => ({ call: ['create', '-q', '-f', to, `@${name}`, '128k'], makes: [name] })),
  fc.tuple(fc.boolean(), fc.constantFrom(...images), target).map(([unsafe, below, name]) => ({ call: ['create', '-q', '-f', 'qcow2', ...(unsafe ? ['-u'] : []), '-b', `@${below}`, '-F', 'qcow2', `@${name}`, '128k'], makes: [name] })),
  fc.tuple(target, target).map(([data, name]) => ({ call: ['create', '-q', '-f', 'qcow2', '-o', `data_file=@${data}`, `@${name}`, '128k'], makes: [name, data] })),
  fc.tuple(fc.constantFrom(...images), fc.constantFrom(...images)).map(([below, name]) => ({ call: ['rebase', '-u', '-b', `@${below}`, '-F', 'qcow2', `@${name}`], changes: [name] })),
  fc.tuple(fc.constantFrom(...images, ''), fc.constantFrom(...images)).map(([below, name]) => ({ call: ['rebase', '-b', below === '' ? '' : `@${below}`, ...(below === '' ? [] : ['-F', 'qcow2']), `@${name}`], changes: [name] })),
  fc.constantFrom(...images).map((name) => ({ call: ['commit', '-q', `@${name}`], changes: [name] })),
  fc.tuple(fc.constantFrom(['amend', '-o', 'lazy_refcounts=on'], ['amend', '-o', 'compat=0.10'], ['amend', '-o', 'data_file=@plain.raw'], ['compact', '-q'], ['check', '-q', '-r', 'all'], ['snapshot', '-c', 'a']), fc.constantFrom(...images)).map(([words, name]) => ({ call: [...words, `@${name}`], changes: [name] })),
  fc.tuple(fc.constantFrom('b', 'c'), fc.constantFrom(...images)).map(([bitmap, name]) => ({ call: ['bitmap', '--add', `@${name}`, bitmap], changes: [name] })),
  fc.tuple(fc.constantFrom('300k', '100k'), target).map(([bytes, name]) => ({ call: ['resize', '-q', '--shrink', '-f', 'raw', `@${name}`, bytes], changes: [name] })),
  fc.tuple(fc.constantFrom('stream', 'plain', 'elf', 'lime'), fc.constantFrom('saved', 'plain.raw'), target).map(([form, from, name]) => ({ call: ['vmstate', 'export', '-q', `--form=${form}`, `@${from}`, `@${name}`], makes: [name] })),
  fc.tuple(fc.constantFrom(['pc.ram', '--length=64k'], ['cpu', '--device']), target).map(([[part, ...how], name]) => ({ call: ['vmstate', 'extract', '-q', '@saved', part, `@${name}`, ...how], makes: [name] })),
  fc.tuple(fc.constantFrom('stream', 'ram', 'snapshot'), target).map(([as, name]) => ({ call: ['capture', '-q', `--as=${as}`, ...(as === 'stream' ? [] : ['--name=a']), '@saved', `@${name}`], ...(as === 'snapshot' ? { changes: [name] } : { makes: [name] }) })),
  fc.constantFrom(...images).map((name) => ({ call: ['resize', '-q', `@${name}`, '512k'], changes: [name] })),
  target.map((name) => ({ call: (at: (name: string) => string) => Qcow2Image.create(at(name), { size }).then((image) => image.close()), makes: [name] })),
  fc.tuple(fc.constantFrom(...images), target).map(([from, name]) => ({
    call: async (at: (name: string) => string) => {
      await using disk = await Qcow2Image.open(at(from), { readOnly: true })
      await convertToQcow2(disk, at(name))
    },
    makes: [name],
  })),
  fc.tuple(fc.constantFrom('base', 'top', 'split'), fc.constantFrom('base', 'soft-base', 'hard-top', 'soft-data')).map(([from, name]) => ({
    // into what it is read from: refused; into anything else: that is what was asked for
    call: async (at: (name: string) => string) => {
      await using disk = await Qcow2Image.open(at(from), { readOnly: true })
      await using file = await openFile(at(name))
      await copyDevice(disk, file)
    },
    changes: [name],
  })),
)

interface Found {
  readonly inode: number
  readonly content: string
}

/** All regular files and links by name, with their content. */
function look(folder: string): Map<string, Found> {
  return new Map(
    readdirSync(folder).map((name) => {
      const path = join(folder, name)
      const link = lstatSync(path).isSymbolicLink()
      return [name, { inode: link ? 0 : statSync(path).ino, content: link ? `link to ${realName(path)}` : readFileSync(path).toString('latin1') }]
    }),
  )
}

/** The name of the file that a path leads to, links followed. */
function realName(path: string): string {
  if (basename(path) === 'loop') return 'loop'
  return existsSync(path) ? basename(realpathSync(path)) : basename(path) === 'soft-new' ? 'nothing-yet' : basename(path)
}

/** The inode of an image's backing file, if it has one. */
async function below(path: string): Promise<number | undefined> {
  const { backingFile } = await readImageInfo(path, { forceShare: true }).catch(() => ({ backingFile: undefined }))
  if (backingFile === undefined) return undefined
  const file = resolve(path, '..', backingFile)
  return statSync(basename(file) === 'loop' ? resolve(file, '../device.img') : file, { throwIfNoEntry: false })?.ino
}

let noDevices = false

/** A loop device over a file, where there are any; `loop` is a link where there are none. */
function deviceOver(file: string): LoopDevice | undefined {
  if (noDevices) return undefined
  try {
    return loopOver(file, [], (why) => { throw new Error(why) })
  } catch {
    noDevices = true
    return undefined
  }
}

test('no file that is not the output changes, and a failure changes none', { timeout: 300_000 }, async () => {
  const holderOf = qemus.at(-1)
  await fc.assert(
    fc.asyncProperty(fc.array(command, { minLength: 1, maxLength: 4 }), async (commands) => {
      const folder = await makeFolder()
      const at = (name: string): string => join(folder, name)
      const loop = deviceOver(at('device.img'))
      symlinkSync(loop?.path ?? 'device.img', at('loop'))
      const holder = holderOf && spawn(holderOf.path('qemu-io'), ['-f', 'qcow2', at('held')], { stdio: ['pipe', 'pipe', 'ignore'] })
      if (holder !== undefined) {
        holder.stdin.write('length\n')
        await once(holder.stdout, 'data')
      }
      try {
        for (const { call, makes = [], changes = [] } of commands) {
          const before = look(folder)
          const outputs = new Set(makes.map((name) => realName(at(name))))
          const inodes = new Set(changes.map((name) => realName(at(name))).map((name) => before.get(name)?.inode))
          const words = typeof call === 'function' ? [] : call.flatMap((word) => /@([\w.-]+)/.exec(word)?.[1] ?? [])
          if (typeof call !== 'function' && call[0] === 'commit') inodes.add(await below(at(words[0]!)))
          if ([...makes, ...changes].includes('loop')) {
            // what is on a device is written in place; one that is read by its other name is not to change
            const reads = words.filter((name) => ![...makes, ...changes].includes(name))
            if (!reads.some((name) => ['device.img', 'loop'].includes(name))) inodes.add(before.get('device.img')!.inode)
          }
          // writing into an image is writing into its data file
          if (inodes.has(before.get('split')?.inode)) inodes.add(before.get('split.raw')?.inode)
          const failed = typeof call === 'function'
            ? await call(at).then(() => false, () => true)
            : (await run(call.map((word) => word.replace(/@([\w.-]+)/, (_, name: string) => at(name))))).code !== 0
          const after = look(folder)
          const shown = typeof call === 'function' ? String(call) : call.join(' ')
          for (const [name, { inode, content }] of before) {
            if ((outputs.has(name) && !failed) || inodes.has(inode)) continue
            expect(after.get(name)?.content === content, `${shown} (${failed ? 'failed' : 'done'}): ${name} is as it was`).toBe(true)
          }
          const made = [...after.keys()].filter((name) => !before.has(name))
          expect(failed ? made : made.filter((name) => !outputs.has(name)), shown).toEqual([])
          expect(outputs.has('held') && !failed && holder !== undefined, `${shown}: a QEMU holds it`).toBe(false)
          for (const name of failed ? [] : outputs) {
            if (after.get(name)!.content.startsWith('QFI\xfb')) expect(await checkImage(at(name), { forceShare: true } as object).catch((error: unknown) => error), `${shown}: ${name} is whole`).toMatchObject({ corruptions: 0 })
          }
        }
      } finally {
        if (holder !== undefined) {
          holder.stdin.end('quit\n')
          if (holder.exitCode === null) await once(holder, 'exit')
        }
        loop?.detach()
      }
    }),
    { numRuns: process.env['QCOW2_LONG'] === '1' ? 2000 : 60, endOnFailure: true },
  )
})

test.skipIf(!existsSync(program))('a command that is killed leaves the old file or the new one', { timeout: 120_000 }, async () => {
  const folder = tempFolder()
  const [from, to] = [join(folder, 'from'), join(folder, 'to')]
  const disk = await Qcow2Image.create(from, { size: 64 << 20 })
  for (let i = 0; i < 64; i++) await disk.write(i << 20, new Uint8Array(1 << 20).fill(i + 1))
  await disk.close()
  writeFileSync(to, 'what was there')
  const commands = [['convert', '-O', 'raw', from, to], ['convert', '-O', 'qcow2', from, to], ['convert', '-O', 'qcow2', '-o', 'preallocation=full', from, to], ['dd', '-O', 'raw', 'bs=1M', `if=${from}`, `of=${to}`]]
  for (const [round, argv] of [...commands, ...commands].entries()) {
    const child = spawn(process.execPath, [program, ...argv], { stdio: 'ignore' })
    const ended = once(child, 'exit')
    setTimeout(() => child.kill('SIGKILL'), 80 + ((round * 137) % 700))
    await ended
    const content = readFileSync(to)
    if (content.equals(Buffer.from('what was there'))) continue
    await using made = content.subarray(0, 3).toString() === 'QFI' ? await Qcow2Image.open(to, { readOnly: true }) : await openFile(to, { readOnly: true })
    expect(made.size, argv.join(' ')).toBe(64 << 20)
    for (let i = 0; i < 64; i++) expect((await made.read((i << 20) + 5, 1))[0], argv.join(' ')).toBe(i + 1)
    writeFileSync(to, 'what was there')
  }
})
