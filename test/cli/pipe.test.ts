/** `convert` with `-` on either side: as a command, and as processes joined by real pipes. */
import { execFileSync } from 'node:child_process'
import { readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

const program = join(import.meta.dirname, '../../src/cli.ts')

/** A sparse raw disk with some text in it. */
function rawDisk(path: string): Buffer {
  const bytes = Buffer.alloc(8 << 20)
  for (const at of [0, 3 << 20, (6 << 20) + 4096]) bytes.write('text '.repeat(50_000), at)
  writeFileSync(path, bytes)
  return bytes
}

async function* chunksOf(bytes: Uint8Array): AsyncGenerator<Uint8Array, void, undefined> {
  for (let at = 0; at < bytes.length; at += 65536) yield await Promise.resolve(bytes.subarray(at, at + 65536))
}

test.each([[], ['-c'], ['-o', 'cluster_size=4k'], ['-o', 'extended_l2=on'], ['-o', 'compat=0.10'], ['-S', '0']])('an image to stdout with %j', async (...flags) => {
  const folder = tempFolder()
  const [raw, sent] = [join(folder, 'raw'), join(folder, 'sent')]
  rawDisk(raw)
  const { code, bytes, stderr } = await run(['convert', '-f', 'raw', '-O', 'qcow2', ...flags, raw, '-'])
  expect([code, stderr]).toEqual([0, ''])
  writeFileSync(sent, bytes)
  expect((await run(['check', '-q', sent])).code).toBe(0)
  expect((await run(['compare', raw, sent])).stdout).toBe('Images are identical.\n')
})

test.each([[[]], [['-c']], [['-o', 'cluster_size=4k']]])('a raw disk from stdin with %j', async (flags) => {
  const folder = tempFolder()
  const [raw, image] = [join(folder, 'raw'), join(folder, 'image')]
  const bytes = rawDisk(raw)
  const { code, stderr } = await run(['convert', '-f', 'raw', '-O', 'qcow2', ...flags, '-', image], { stdin: chunksOf(bytes) })
  expect([code, stderr]).toEqual([0, ''])
  expect((await run(['check', '-q', image])).code).toBe(0)
  expect((await run(['compare', raw, image])).stdout).toBe('Images are identical.\n')
})

test.each([[[], true], [['-S', '64k'], true], [['-S', '0'], false]])('raw from stdin into a file with %j: zeroes are holes: %s', async (flags, holes) => {
  const path = join(tempFolder(), 'copy')
  const bytes = Buffer.alloc((8 << 20) + 1000)
  for (const at of [0, (1 << 20) + 70_000, bytes.length - 1]) bytes[at] = 1
  async function* odd(): AsyncGenerator<Uint8Array, void, undefined> {
    for (let at = 0, length = 1; at < bytes.length; at += length, length = 1 + ((length * 7919) % 200_000)) yield await Promise.resolve(bytes.subarray(at, at + length))
  }
  expect(await run(['convert', '-f', 'raw', ...flags, '-', path], { stdin: odd() })).toMatchObject({ code: 0, stderr: '' })
  expect(readFileSync(path).equals(bytes)).toBe(true)
  expect(statSync(path).blocks * 512 < 1 << 20).toBe(holes)
})

test('raw from stdin to a file and to stdout', async () => {
  const folder = tempFolder()
  const bytes = rawDisk(join(folder, 'raw'))
  expect((await run(['convert', '-f', 'raw', '-', join(folder, 'copy')], { stdin: chunksOf(bytes) })).code).toBe(0)
  expect(readFileSync(join(folder, 'copy')).equals(bytes)).toBe(true)
  expect(Buffer.compare((await run(['convert', '-f', 'raw', '-', '-'], { stdin: chunksOf(bytes) })).bytes, bytes)).toBe(0)
})

test('what a pipe cannot do is said before anything is written', async () => {
  const folder = tempFolder()
  const [raw, image] = [join(folder, 'raw'), join(folder, 'image')]
  rawDisk(raw)
  const refused = async (line: string): Promise<string> => {
    const { code, stdout, stderr } = await run(line)
    expect([code, stdout]).toEqual([1, ''])
    return stderr
  }
  expect(await refused(`convert -O qcow2 - ${image}`)).toContain('a pipe can only be read as a raw disk')
  expect(await refused(`convert -f raw -O qcow2 - -`)).toContain('the source must be read twice')
  expect(await refused(`convert -f raw -O qcow2 - ${raw} ${image}`)).toContain('stdin cannot be one of several sources')
  expect(await refused(`convert -f raw -O qcow2 -o preallocation=metadata - ${image}`)).toContain('preallocation')
  expect(await refused(`convert -f raw -O qcow2 -o preallocation=metadata ${raw} -`)).toContain('preallocation')
})

test('progress of an image to stdout counts both passes and ends at 100 percent', async () => {
  const raw = join(tempFolder(), 'raw')
  rawDisk(raw)
  const { stderr } = await run(['convert', '--progress=json', '-f', 'raw', '-O', 'qcow2', raw, '-'])
  const lines = stderr.trim().split('\n').map((line) => JSON.parse(line) as { done: number; total: number })
  expect(lines.at(-1)).toMatchObject({ done: 16 << 20, total: 16 << 20 })
})

describeWithQemu('as processes', () => {
  const node = `"${process.execPath}" --import tsx "${program}"`

  test.each(['raw', 'qcow2'])('memory does not grow with the length of a raw disk that becomes %s', { timeout: 60_000 }, (format) => {
    const folder = tempFolder()
    const peak = (bytes: number): number => {
      const tell = `data:text/javascript,process.on('exit',()=>console.error(process.resourceUsage().maxRSS))`
      const script = `yes | head -c ${bytes} | "${process.execPath}" --import "${tell}" --import tsx "${program}" convert -f raw -O ${format} - "${folder}/stored" 2>&1`
      return Number(execFileSync('bash', ['-c', script], { cwd: join(import.meta.dirname, '../..') }).toString())
    }
    const short = peak(32 << 20)
    expect(short).toBeGreaterThan(0)
    expect(peak(600 << 20)).toBeLessThan(short + 65536)
  })

  test('through real pipes, with a slow reader, and from a file as stdin', { timeout: 60_000 }, () => {
    const folder = tempFolder()
    writeFileSync(join(folder, 'raw'), Buffer.alloc(64 << 20, 'abcdefgh'))
    truncateSync(join(folder, 'raw'), 512 << 20)
    const script = `set -o pipefail
      ${node} convert -f raw -O qcow2 "${folder}/raw" - | (sleep 1; cat) > "${folder}/sent"
      qemu-img check -q "${folder}/sent"
      qemu-img compare -q -f raw -F qcow2 "${folder}/raw" "${folder}/sent"
      head -c 200000000 "${folder}/raw" | ${node} convert -f raw -O qcow2 - "${folder}/stored"
      qemu-img check -q "${folder}/stored"
      ${node} convert -O qcow2 - "${folder}/again" < "${folder}/sent"
      qemu-img compare -q "${folder}/sent" "${folder}/again"`
    execFileSync('bash', ['-e', '-c', script], { stdio: ['ignore', 'pipe', 'inherit'], cwd: join(import.meta.dirname, '../..') })
  })
})
