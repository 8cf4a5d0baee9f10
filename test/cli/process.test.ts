/** The program as a process of its own: signals, broken pipes, its other name, memory. */
import { execFile, spawn } from 'node:child_process'
import { existsSync, readdirSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

const program = join(import.meta.dirname, '../../src/cli.ts')
const start = (script: string, ...args: string[]): string[] => ['--import', 'tsx', script, ...args]

function execute(script: string, ...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  return new Promise((resolve) => {
    execFile(process.execPath, start(script, ...args), { timeout: 50_000 }, (error, stdout, stderr) => {
      resolve({ code: error === null ? 0 : typeof error.code === 'number' ? error.code : -1, stdout, stderr })
    })
  })
}

test('exit codes, stdout and stderr are those of the command', async () => {
  const image = join(tempFolder(), 'image')
  expect(await execute(program, 'create', '-f', 'qcow2', image, '1M')).toMatchObject({ code: 0, stdout: expect.stringContaining('Formatting') as string })
  expect(await execute(program, 'nonsense')).toMatchObject({ code: 1, stdout: '', stderr: "qcow2: Command not found: nonsense (see 'qcow2 --help')\n" })
})

test('started as qemu-img it says so in its messages', async () => {
  const link = join(tempFolder(), 'qemu-img')
  symlinkSync(program, link)
  const { code, stderr } = await execute(link, 'info', '/nonexistent')
  expect(code).toBe(1)
  expect(stderr).toBe("qemu-img: Could not open '/nonexistent': Could not open '/nonexistent': No such file or directory\n")
})

test('a reader that leaves is no error', async () => {
  const image = join(tempFolder(), 'image')
  await run(['create', '-q', '-f', 'qcow2', '-o', 'cluster_size=512,preallocation=metadata', image, '4M'])
  const child = spawn(process.execPath, start(program, 'convert', image, '-'), { stdio: ['ignore', 'pipe', 'pipe'] })
  let stderr = ''
  child.stderr.on('data', (data: Buffer) => (stderr += data.toString()))
  child.stdout.once('data', () => child.stdout.destroy())
  const code = await new Promise((resolve) => child.once('exit', resolve))
  expect(stderr).toBe('')
  expect(code).toBe(141)
})

test('SIGINT stops serving cleanly and the socket goes away', async () => {
  const folder = tempFolder()
  const [image, socket] = [join(folder, 'image'), join(folder, 'nbd')]
  await run(['create', '-q', '-f', 'qcow2', image, '1M'])
  const child = spawn(process.execPath, start(program, 'serve', '--socket', socket, image), { stdio: ['ignore', 'pipe', 'inherit'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  await new Promise((resolve) => child.stdout.once('data', resolve))
  child.kill('SIGINT')
  expect(await new Promise((resolve) => child.once('exit', resolve))).toBe(0)
  expect(existsSync(socket)).toBe(false)
})

test('SIGINT in the middle of a copy says what is left, exit code 130', async () => {
  const folder = tempFolder()
  const [source, target] = [join(folder, 'source'), join(folder, 'target')]
  writeFileSync(source, '')
  truncateSync(source, 64 * 2 ** 30)
  const child = spawn(process.execPath, start(program, 'convert', '-p', '-f', 'raw', '-O', 'qcow2', source, target), { stdio: ['ignore', 'pipe', 'pipe'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  let stderr = ''
  child.stderr.on('data', (data: Buffer) => (stderr += data.toString()))
  child.stdout.resume()
  await expect.poll(() => readdirSync(folder).length, { timeout: 30_000 }).toBe(2)
  // as `timeout` sends it: to the process and to its group
  child.kill('SIGINT')
  child.kill('SIGINT')
  expect(await new Promise((resolve) => child.once('exit', resolve))).toBe(130)
  expect(stderr).toBe(`qcow2: interrupted; ${target} is as it was\n`)
  expect(readdirSync(folder)).toEqual(['source'])
})
