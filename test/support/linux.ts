/**
 * A Linux guest: Debian's cloud kernel with an initramfs of busybox and one script, built here
 * (test/fixtures/guest/linux-init.sh). Most of its memory is random data that it checks for ever.
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join, resolve } from 'node:path'
import { expect, test } from 'vitest'
import type { Guest, GuestOptions } from './guest.ts'
import { describeWithQemu, type Qemu } from './qemu.ts'

/** Where `.ci/install-qemu` unpacks kernel and busybox. */
const folder = process.env['QCOW2_LINUX_GUEST'] ?? '/opt/qcow2-linux-guest'
const init = resolve(import.meta.dirname, '../fixtures/guest/linux-init.sh')

/** How much memory the guest has, in MiB, and how many pieces of 1 MiB it fills with random data. */
export interface LinuxSize {
  readonly memory: number
  readonly pieces: number
}

const usual: LinuxSize = { memory: 256, pieces: 170 }
/** Rounds after which the guest has certainly checked every piece. */
export const roundsForAll = 9
/** How long a slow machine may take for some rounds, in milliseconds; a test does that several times. */
export const roundsTimeout = 180_000

/** Options of a Linux guest; undefined where the kernel or busybox is missing. */
export function linuxGuest({ memory, pieces }: LinuxSize = usual): GuestOptions | undefined {
  const kernel = find('boot', /^vmlinuz-/)
  const modules = findModules()
  const busybox = join(folder, 'bin/busybox')
  if (kernel === undefined || modules.length === 0 || !existsSync(busybox)) return undefined
  const work = mkdtempSync(join(tmpdir(), 'qcow2-linux-'))
  process.once('exit', () => rmSync(work, { recursive: true, force: true }))
  const initramfs = join(work, 'initramfs')
  writeFileSync(initramfs, archive([
    { name: 'bin' },
    { name: 'modules' },
    { name: 'init', content: readFileSync(init) },
    { name: 'bin/busybox', content: readFileSync(busybox) },
    ...modules.map((path) => ({ name: `modules/${basename(path)}`, content: readFileSync(path) })),
  ]))
  // panic=-1: a kernel that panics restarts at once, which ends QEMU
  const system = ['-kernel', kernel, '-initrd', initramfs, '-append', `console=ttyS0 quiet panic=-1 pieces=${pieces}`, '-no-reboot']
  return { memory, system }
}

/** The suite for each QEMU, with the options of the guest. Says loudly what is missing, and fails in CI. */
export function describeWithLinux(name: string, suite: (qemu: Qemu, linux: GuestOptions) => void, size?: LinuxSize): void {
  describeWithQemu(name, (qemu) => {
    const linux = linuxGuest(size)
    if (linux !== undefined) {
      suite(qemu, linux)
      return
    }
    const missing = `no Linux kernel and busybox in ${folder}: run .ci/install-qemu (Debian)`
    if (process.env['CI'] !== undefined) {
      test('needs a Linux kernel', () => expect.fail(missing))
    } else {
      console.warn(`\n*** "${name}" was not run: ${missing} ***\n`)
      test.skip('needs a Linux kernel', () => undefined)
    }
  })
}

/** The guest goes on from between the rounds `first` and `last`, and finds all of its memory, and its disk, whole. */
export async function expectLinuxGoesOn(guest: Guest, first: number, last: number): Promise<void> {
  await guest.run(roundsForAll, roundsTimeout)
  expect(guest.errors).toEqual([])
  expect(guest.ticks[0]).toBeGreaterThanOrEqual(first)
  expect(guest.ticks[0]).toBeLessThanOrEqual(last + 1)
  expect(guest.ticks).toEqual(guest.ticks.map((_tick, index) => guest.ticks[0]! + index))
}

function find(where: string, name: RegExp): string | undefined {
  const parent = join(folder, where)
  const found = existsSync(parent) ? readdirSync(parent).find((entry) => name.test(entry)) : undefined
  return found === undefined ? undefined : join(parent, found)
}

function findModules(): string[] {
  const parent = join(folder, 'modules')
  return existsSync(parent) ? readdirSync(parent).map((file) => join(parent, file)) : []
}

interface ArchiveEntry {
  readonly name: string
  /** Left out: a folder. */
  readonly content?: Uint8Array
}

/** A cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst of Linux). */
function archive(entries: readonly ArchiveEntry[]): Uint8Array {
  const pieces = [...entries, { name: 'TRAILER!!!', content: new Uint8Array(0) }].flatMap(({ name, content }, index) => {
    const mode = content === undefined ? 0o40755 : 0o100755
    const fields = [index + 1, mode, 0, 0, 1, 0, content?.length ?? 0, 0, 0, 0, 0, name.length + 1, 0]
    const header = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}${name}\0`
    return [padded(Buffer.from(header)), padded(content ?? new Uint8Array(0))]
  })
  return Buffer.concat(pieces)
}

function padded(bytes: Uint8Array): Uint8Array {
  const result = new Uint8Array(Math.ceil(bytes.length / 4) * 4)
  result.set(bytes)
  return result
}
