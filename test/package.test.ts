/**
 * The package as users get it: packed, installed from the tarball into an empty project without a network,
 * and used from ESM, CommonJS and TypeScript. `QCOW2_NODES` may name further Node binaries, separated
 * by colons.
 */
import { execFile, execFileSync } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { isBuiltin } from 'node:module'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { promisify } from 'node:util'
import { gunzipSync } from 'node:zlib'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'

const project = resolve(import.meta.dirname, '..')
const work = mkdtempSync(join(tmpdir(), 'qcow2-package-'))
const consumer = join(work, 'consumer')
const run = promisify(execFile)
const nodes = [process.execPath, ...(process.env['QCOW2_NODES']?.split(':') ?? [])]

interface Manifest {
  readonly version: string
  readonly bin: Record<string, string>
  readonly main: string
  readonly types: string
  readonly exports: Record<string, string | { readonly import: { types: string; default: string }; readonly require?: { types: string; default: string } }>
  readonly dependencies?: Record<string, string>
  readonly peerDependencies?: Record<string, string>
  readonly peerDependenciesMeta?: Record<string, { optional: boolean }>
}

interface Packed {
  readonly filename: string
  /** Bytes of the tarball. */
  readonly size: number
  readonly unpackedSize: number
  readonly files: readonly { readonly path: string; readonly size: number }[]
}

const manifest = JSON.parse(readFileSync(join(project, 'package.json'), 'utf8')) as Manifest
let packed: Packed

/** The newest modification time of the files under a folder. */
function newest(folder: string): number {
  return Math.max(0, ...readdirSync(folder, { recursive: true, encoding: 'utf8' }).map((file) => statSync(join(folder, file)).mtimeMs))
}

beforeAll(async () => {
  // `npm test` has built it; a test run by itself must not pack what was built before the last change
  const built = existsSync(join(project, 'dist/index.js')) && newest(join(project, 'dist')) > newest(join(project, 'src'))
  if (!built) execFileSync('npm', ['run', 'build', '--silent'], { cwd: project, stdio: 'ignore' })
  const { stdout } = await run('npm', ['pack', '--json', '--ignore-scripts', '--pack-destination', work], { cwd: project })
  packed = (JSON.parse(stdout) as Packed[])[0]!
  execFileSync('mkdir', [consumer])
  writeFileSync(join(consumer, 'package.json'), '{ "name": "consumer", "private": true, "type": "module" }')
  writeFileSync(join(consumer, 'vm.mig'), gunzipSync(readFileSync(join(project, 'test/fixtures/captures/qemu100-savevm.vmstate.gz'))))
  await run('npm', ['install', '--offline', '--no-audit', '--no-fund', '--ignore-scripts', join(work, packed.filename)], { cwd: consumer })
}, 300_000)

afterAll(() => rmSync(work, { recursive: true, force: true }))

describe('contents', () => {
  test('what is needed and nothing else', () => {
    const paths = packed.files.map(({ path }) => path)
    for (const path of ['package.json', 'README.md', 'LICENSE', 'CHANGELOG.md', 'THIRD_PARTY_NOTICES.md']) expect(paths).toContain(path)
    expect(paths.filter((path) => path.includes('/') && !path.startsWith('dist/'))).toEqual([])
    expect(paths.filter((path) => path.startsWith('dist/') && !/\.(js|cjs|d\.ts|d\.cts)$/.test(path))).toEqual([])
  })

  test('every file that package.json names is there', () => {
    const paths = new Set(packed.files.map(({ path }) => `./${path}`))
    const named = [manifest.main, manifest.types, ...Object.values(manifest.bin)]
    for (const entry of Object.values(manifest.exports)) {
      if (typeof entry === 'string') named.push(entry)
      else named.push(...Object.values(entry.import), ...Object.values(entry.require ?? {}))
    }
    expect(named.filter((path) => !paths.has(path))).toEqual([])
  })

  test('within the size budget', () => {
    const code = packed.files.filter(({ path }) => /\.c?js$/.test(path)).reduce((sum, { size }) => sum + size, 0)
    expect(packed.size).toBeLessThan(0.95e6)
    expect(packed.unpackedSize).toBeLessThan(3.6e6)
    expect(code, 'both builds, without types').toBeLessThan(2.85e6)
  })

  test('no dependencies: the only import besides node: is the optional peer of the testing door', () => {
    expect(manifest.dependencies ?? {}).toEqual({})
    for (const name of Object.keys(manifest.peerDependencies ?? {})) expect(manifest.peerDependenciesMeta?.[name]?.optional).toBe(true)
    const imports = packed.files
      .filter(({ path }) => /^dist\/.*\.c?js$/.test(path))
      .flatMap(({ path }) => {
        const code = readFileSync(join(project, path), 'utf8')
        return [...code.matchAll(/^(?:import|export)\b[^'"`\n]*?from ?["']([^"'./][^"']*)["']|\brequire\(["']([^"'./][^"']*)["']\)/gm)].map((match) => match[1] ?? match[2]!)
      })
    expect(imports.length).toBeGreaterThan(10)
    expect(imports.filter((name) => !isBuiltin(name) && name !== 'fast-check')).toEqual([])
  })
})

const doors = Object.keys(manifest.exports).filter((door) => door !== './package.json')
/** Doors that work without the optional peer. */
const plain = doors.filter((door) => door !== './testing').map((door) => `qcow2${door.slice(1)}`)

function write(name: string, code: string): string {
  const file = join(consumer, name)
  writeFileSync(file, code)
  return file
}

/** Writes a byte, takes a snapshot, reads it back, and recognises an error of the other build. */
const body = `
  const image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 1 << 20 })
  await image.write(70000, Uint8Array.of(42))
  await image.snapshots.create({ name: 'first' })
  const snapshot = await image.snapshots.open('first')
  const [byte] = await snapshot.read(70000, 1)
  await snapshot.close()
  await image.close()
  const error = await image.read(0, 1).catch((error) => error)
  console.log(byte, Qcow2Error.is(error, 'ERR_CLOSED'), OtherError.is(error, 'ERR_CLOSED'))
`

describe.each(nodes)('used by %s', (node) => {
  test('from ESM', async () => {
    const file = write('use.mjs', `
import { createRequire } from 'node:module'
import { Qcow2Error, Qcow2Image } from 'qcow2'
import { MemoryDevice } from 'qcow2/block'
const { Qcow2Error: OtherError } = createRequire(import.meta.url)('qcow2')
${body}
for (const door of ${JSON.stringify(plain)}) if (Object.keys(await import(door)).length === 0) throw new Error(door)
`)
    const { stdout } = await run(node, [file], { cwd: consumer })
    expect(stdout).toBe('42 true true\n')
  })

  test('from CommonJS', async () => {
    const file = write('use.cjs', `
const { Qcow2Error, Qcow2Image } = require('qcow2')
const { MemoryDevice } = require('qcow2/block')
async function main() {
  const { Qcow2Error: OtherError } = await import('qcow2')
  ${body}
}
for (const door of ${JSON.stringify(plain.filter((door) => door !== 'qcow2/browser'))}) if (Object.keys(require(door)).length === 0) throw new Error(door)
main()
`)
    const { stdout } = await run(node, [file], { cwd: consumer })
    expect(stdout).toBe('42 true true\n')
  })

  test.each([manifest.bin['qcow2']!, 'dist/cli.js'])('on the command line as %s', async (file) => {
    const bin = join(consumer, 'node_modules/qcow2', file)
    expect((await run(node, [bin, '--version'], { cwd: consumer })).stdout).toContain(manifest.version)
  })
})

test('types resolve for ESM and CommonJS, with no package but Node’s types', async () => {
  const code = `
import { Qcow2Image, type SnapshotInfo } from 'qcow2'
import { AlignedWriteQueue, openFile, type BlockDevice } from 'qcow2/block'
import { readMigration, VmState } from 'qcow2/migration'
import { saveVmState } from 'qcow2/snapshot'
import { NbdServer } from 'qcow2/nbd'
export async function use(device: BlockDevice): Promise<SnapshotInfo> {
  const queue = new AlignedWriteQueue(device)
  await queue.close()
  const image: Qcow2Image = await Qcow2Image.open(await openFile('a'))
  new NbdServer([{ name: 'a', device: image }])
  for await (const record of readMigration([new Uint8Array(1)])) console.log(record.kind)
  const vm = await VmState.index(device)
  console.log(vm.ram.blocks.length)
  return saveVmState(image, [new Uint8Array(1)], { name: 'a' })
}
// @ts-expect-error a size is a number
void Qcow2Image.create('a', { size: 'large' })
`
  const files = [write('use-esm.mts', code), write('use-cjs.cts', code)]
  if (!existsSync(join(consumer, 'node_modules/@types'))) symlinkSync(join(project, 'node_modules/@types'), join(consumer, 'node_modules/@types'))
  const options = { compilerOptions: { strict: true, module: 'nodenext', target: 'es2022', types: ['node'], noEmit: true, skipLibCheck: false }, files }
  write('tsconfig.json', JSON.stringify(options))
  // undici-types lies beside @types/node in the project
  if (!existsSync(join(consumer, 'node_modules/undici-types'))) symlinkSync(join(project, 'node_modules/undici-types'), join(consumer, 'node_modules/undici-types'))
  const { stdout } = await run(process.execPath, [join(project, 'node_modules/typescript/bin/tsc'), '-p', consumer]).catch((error: unknown) => error as { stdout: string })
  expect(stdout).toBe('')
})

/** The programs and commands of a page, one after another; commands that need a VM, or QEMU, left out. */
function stepsOf(page: string): string[][] {
  const bin = join(consumer, 'node_modules/qcow2', manifest.bin['qcow2']!)
  const steps = [...readFileSync(join(project, page), 'utf8').matchAll(/^```ts\n(import .*?)^```$|^npx qcow2 (?!save|revert|doctor)([^\n]*)$/gms)]
  return steps.map(([, code, command], n) => (code === undefined ? [bin, ...command!.split(' ')] : [write(`program-${n}.mjs`, code)]))
}

test.each([
  ['README.md', 6],
  ['docs/quick-start.md', 7],
])('the quick start of %s, followed to the letter', { timeout: 120_000 }, async (page, count) => {
  const steps = stepsOf(page)
  expect(steps).toHaveLength(count)
  for (const step of steps) await run(process.execPath, step, { cwd: consumer })
})
