/** The first SIGINT or SIGTERM ends every wait, whatever it is for. */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { createServer, type Server } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, onTestFinished, test } from 'vitest'
import { run } from './run.ts'

const program = join(import.meta.dirname, '../../src/cli.ts')
const folder = mkdtempSync(join(tmpdir(), 'qcow2-test-'))
afterAll(() => rmSync(folder, { recursive: true }))
const [disk, silent, pipe] = [join(folder, 'disk.qcow2'), join(folder, 'silent'), join(folder, 'pipe')]
writeFileSync(join(folder, 'raw'), Buffer.alloc(3 << 20, 'some text '))
await run(['convert', '-f', 'raw', '-O', 'qcow2', join(folder, 'raw'), disk])
const over = join(folder, 'over.qcow2')
await run(['create', '-q', '-f', 'qcow2', '-b', join(folder, 'raw'), '-F', 'raw', over])
execFileSync('mkfifo', [pipe])
const stream = join(import.meta.dirname, '../fixtures/captures/qemu100-precopy.mig.gz')

/** Accepts everybody and says nothing. */
function silentServer(): Server {
  const server = createServer(() => undefined)
  afterAll(() => void server.close())
  return server
}
const web = silentServer().listen(0, '127.0.0.1')
silentServer().listen(silent)
await once(web, 'listening')
const { port } = web.address() as { port: number }

/** Starts a command whose output nobody takes away, and sends it one signal when it waits. */
async function interrupted(argv: readonly string[], signal: 'SIGINT' | 'SIGTERM'): Promise<{ code: number | null; stderr: string; took: number }> {
  const child = spawn(process.execPath, ['--import', 'tsx', program, ...argv], { stdio: ['pipe', 'pipe', 'pipe'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  let stderr = ''
  child.stderr.on('data', (data: Buffer) => (stderr += data.toString()))
  await new Promise((resolve) => setTimeout(resolve, 2500))
  expect([child.exitCode, child.signalCode], stderr).toEqual([null, null])
  const began = Date.now()
  child.kill(signal)
  const [code] = (await once(child, 'exit')) as [number | null]
  return { code, stderr, took: Date.now() - began }
}

describe('a wait for', () => {
  test.each([
    ['an NBD server that says nothing', ['info', `nbd+unix:///?socket=${silent}`]],
    ['the same, below an overlay', ['map', '--image-opts', `driver=qcow2,file.filename=${over},backing.driver=raw,backing.file.driver=nbd,backing.file.server.type=unix,backing.file.server.path=${silent}`]],
    ['a web server that says nothing', ['convert', `http://127.0.0.1:${port}/disk.qcow2`, join(folder, 'copy')]],
    ['a monitor that says nothing', ['save', silent, join(folder, 'saved.qcow2')]],
    ['a monitor, for a revert', ['revert', stream, '--monitor', silent, '--incoming', join(folder, 'in')]],
    ['the bytes of stdin', ['capture', '-', join(folder, 'captured')]],
    ['a QEMU that connects', ['capture', 'listen', join(folder, 'captured')]],
    ['a reader of stdout', ['convert', disk, '-']],
    ['a reader of a named pipe', ['dd', '-O', 'raw', `if=${disk}`, `of=${pipe}`]],
    ['a writer to a named pipe', ['capture', pipe, join(folder, 'captured')]],
  ])('%s', { timeout: 30_000 }, async (_what, argv) => {
    // each makes a file for itself: two that make one refuse each other
    const making = (to: string): string[] => argv.map((word) => word.replace(/captured$/, `captured-${to}`))
    const [a, b] = await Promise.all([interrupted(making('a'), 'SIGINT'), interrupted(making('b'), 'SIGTERM')])
    expect([a.code, b.code]).toEqual([130, 143])
    expect(a.stderr).toMatch(/^qcow2: interrupted(;.*)?\n$/m)
    expect(Math.max(a.took, b.took)).toBeLessThan(5000)
    expect(readdirSync(folder).filter((name) => /^(copy|saved|captured)/.test(name))).toEqual([])
  })
})
