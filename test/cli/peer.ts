/** Command lines through real qemu-img 10.0 and through ours, and what of the results must be the same. */
import { execFile } from 'node:child_process'
import { readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { expect } from 'vitest'
import { qemus, untilMeasured } from '../support/qemu.ts'
import { run } from './run.ts'

export const qemu = qemus.find(({ major }) => major >= 10)

export interface Outcome {
  code: number
  stdout: string
  stderr: string
}

export function words(line: string): string[] {
  return [...line.matchAll(/'([^']*)'|"([^"]*)"|(\S+)/g)].map(([, single, double, bare]) => single ?? double ?? bare!)
}

export function real(folder: string, tool: 'qemu-img' | 'qemu-io', args: readonly string[]): Promise<Outcome> {
  const options = { cwd: folder, timeout: 60_000, maxBuffer: 1 << 28, killSignal: 'SIGKILL' as const }
  const program = (): Promise<Outcome> =>
    new Promise((resolve) => {
      execFile(qemu!.path(tool), args, options, (error, stdout, stderr) => {
        resolve({ code: error === null ? 0 : typeof error.code === 'number' ? error.code : -1, stdout, stderr })
      })
    })
  return untilMeasured(program)
}

export async function ours(folder: string, args: readonly string[]): Promise<Outcome> {
  const before = process.cwd()
  process.chdir(folder)
  try {
    const [command = '', ...rest] = args
    // qemu-img follows any name in an image
    const { code, stdout, stderr } = await run(command.startsWith('-') ? args : [command, '--references=any', ...rest])
    return { code, stdout, stderr }
  } finally {
    process.chdir(before)
  }
}

/** Fields that say where and when, not what. */
const incidental = new Set(['actual-size', 'date-sec', 'date-nsec'])
const layoutFields = new Set(['offset', 'image-end-offset', 'fragmented-clusters', 'uuid'])

function comparableJson(value: unknown, sameLayout: boolean, child = false): unknown {
  if (Array.isArray(value)) return value.map((item) => comparableJson(item, sameLayout, child))
  if (typeof value !== 'object' || value === null) return value
  const kept = Object.entries(value).filter(([key]) => !incidental.has(key) && (sameLayout || !layoutFields.has(key)))
  return Object.fromEntries(
    kept
      .filter(([key]) => sameLayout || !child || key !== 'virtual-size')
      .map(([key, item]) => [key, comparableJson(item, sameLayout, child || key === 'children')])
      .sort(([a], [b]) => (String(a) < String(b) ? -1 : 1)),
  )
}

export function comparable(text: string, sameLayout: boolean): unknown {
  const trimmed = text.trim()
  if (/^[[{]\s*["{\]]/.test(trimmed)) return comparableJson(JSON.parse(trimmed), sameLayout)
  let plain = text
    .replace(/ {4}\(\d+\.\d+\/100%\)\r?/g, '')
    .replace(/disk size: .*/g, 'disk size: -')
    .replace(/\d{4}-\d\d-\d\d \d\d:\d\d:\d\d/g, 'DATE')
  if (!sameLayout) {
    plain = plain.replace(/file length: .*/g, 'file length: -').replace(/Image end offset: .*/g, '').replace(/[\d.]+% fragmented/g, 'fragmented')
  }
  return plain.trim()
}

/** Every file the lines left: the same names, the same guest content, images that check clean. `opaque` files need only be there. */
export async function compareFiles(folders: { theirs: string; ours: string }, opaque = /^$/): Promise<object[]> {
  // qemu-img leaves files behind where it fails; ours are all called so
  const files = (folder: string): string[] => readdirSync(folder).filter((file) => file !== 'bad').sort()
  const [theirs, mine] = [files(folders.theirs), files(folders.ours)]
  if (JSON.stringify(theirs) !== JSON.stringify(mine)) return [{ files: { onlyTheirs: theirs.filter((file) => !mine.includes(file)), onlyOurs: mine.filter((file) => !theirs.includes(file)) } }]
  const problems: object[] = []
  for (const file of mine.filter((name) => !opaque.test(name))) {
    const path = join(folders.ours, file)
    const isImage = readFileSync(path).subarray(0, 4).equals(Buffer.from('QFI\u00fb', 'latin1'))
    const format = isImage ? 'qcow2' : 'raw'
    const compared = await real(folders.ours, 'qemu-img', ['compare', '-f', format, '-F', format, file, join(folders.theirs, file)])
    const reference = compared.code === 0 ? compared : await real(folders.theirs, 'qemu-img', ['compare', '-f', format, '-F', format, file, file])
    if (compared.code !== 0 && reference.code === 0) problems.push({ file, compared })
    if (!isImage) {
      const [size, theirSize] = [statSync(path).size, statSync(join(folders.theirs, file)).size]
      if (size !== theirSize) problems.push({ file, size, theirSize })
      continue
    }
    const [check, theirCheck] = [await real(folders.ours, 'qemu-img', ['check', '-f', 'qcow2', file]), await real(folders.theirs, 'qemu-img', ['check', '-f', 'qcow2', file])]
    if (check.code !== theirCheck.code) problems.push({ file, check, theirCheck })
    const infos = await Promise.all([folders.theirs, folders.ours].map((folder) => real(folder, 'qemu-img', ['info', '--output=json', '-f', 'qcow2', file])))
    const [expected, actual] = infos.map(({ stdout }) => comparable(stdout, false))
    try {
      expect(actual).toEqual(expected)
    } catch {
      problems.push({ file, expected, actual })
    }
  }
  return problems
}
