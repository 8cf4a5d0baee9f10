/**
 * Random commands over a folder of images, links, hard links, data files and a file that a QEMU holds: no file but the named output
 * ever changes, and a command that fails, or is killed, leaves every file as it was or a new one whole.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, linkSync, lstatSync, readFileSync, readdirSync, realpathSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { basename, join, resolve } from 'node:path'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { convertToQcow2 } from '../../src/qcow2/convert.ts'
import { copyDevice } from '../../src/qcow2/copy.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { qemus } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

const KiB = 1024
const size = 256 * KiB
const program = resolve(import.meta.dirname, '../../dist/cli.cjs')

/** base <- top; split with split.raw as its data file; plain.raw; held, for a QEMU; and other names of them. */
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
  for (const [name, target] of [['soft-base', 'base'], ['soft-data', 'split.raw'], ['soft-held', 'held'], ['soft-new', 'nothing-yet']] as const) symlinkSync(target, at(name))
  for (const [name, target] of [['hard-top', 'top'], ['hard-plain', 'plain.raw']] as const) linkSync(at(target), at(name))
  return folder
}

const names = ['base', 'top', 'split', 'split.raw', 'held', 'plain.raw', 'soft-base', 'soft-data', 'soft-held', 'soft-new', 'hard-top', 'hard-plain', 'new']
const images = ['base', 'top', 'split', 'held', 'soft-base', 'hard-top', 'soft-held']

/** One command: what is called, what it may write anew, and what it may write into. */
interface Command {
  readonly call: string[] | ((at: (name: string) => string) => Promise<unknown>)
  /** Replaced: any file but these is as it was, and these too if the command fails. */
  readonly makes?: readonly string[]
  /** Changed in place. */
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
  return existsSync(path) ? basename(realpathSync(path)) : basename(path) === 'soft-new' ? 'nothing-yet' : basename(path)
}

test('no file that is not the output changes, and a failure changes none', { timeout: 300_000 }, async () => {
  const holderOf = qemus.at(-1)
  await fc.assert(
    fc.asyncProperty(fc.array(command, { minLength: 1, maxLength: 4 }), async (commands) => {
      const folder = await makeFolder()
      const at = (name: string): string => join(folder, name)
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
          // writing into an image is writing into its data file
          if (changes.some((name) => realName(at(name)) === 'split')) inodes.add(before.get('split.raw')?.inode)
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
