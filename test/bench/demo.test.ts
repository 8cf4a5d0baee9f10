/** `npm run demo` runs to its end and says what it must. With QEMU a real one judges both images. */
import { execFile } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'
import { tempFolder } from '../support/temp.ts'
import { qemus } from '../support/qemu.ts'

const project = resolve(import.meta.dirname, '../..')

test('saves a real VM both ways, reads it back, prints the table and draws', { timeout: 120_000 }, async () => {
  const folder = tempFolder()
  const { scripts } = JSON.parse(readFileSync(join(project, 'package.json'), 'utf8')) as { scripts: Record<string, string> }
  const [tool, ...args] = scripts['demo']!.split(' ')
  const { stdout } = await promisify(execFile)(join(project, 'node_modules/.bin', tool!), args, {
    cwd: project,
    env: { ...process.env, TMPDIR: folder },
    timeout: 100_000,
  })
  expect(stdout).toContain('read back, every byte is the same')
  expect(stdout).toContain('all 6 RAM blocks have the SHA-256 of the original')
  expect(stdout).toMatch(/simulated disk, 150 MB\/s.*\n(.*\n){3}\s+[\d.]+x/)
  expect(stdout).toMatch(/this disk, .*\n(.*\n){3}\s+[\d.]+x/)
  const drawing = /Drawing: (.*)/.exec(stdout)![1]!
  expect(existsSync(drawing)).toBe(true)
  if (qemus.length === 0) {
    expect(stdout).toContain('QEMU is not installed here')
  } else {
    expect(stdout.match(/No errors were found on the image/g)).toHaveLength(2)
    expect(stdout.match(/the guest runs and found all its memory right/g)).toHaveLength(2)
  }
})
