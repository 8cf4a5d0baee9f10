// Saves a running VM, which runs on, and reverts to it in an instant: the guest goes on before its memory is loaded.
// It counts on its serial port; QEMU is killed in between, and the count goes on. Needs Linux with qemu-system-x86_64 and the right to use userfaultfd (root, or
// sysctl vm.unprivileged_userfaultfd=1): it looks first, and says what is missing. QEMU 7.2 will do; QEMU=PATH names
// another. It takes some seconds, and leaves nothing behind. After `npm ci`, in the project's folder:
//   npx tsx --tsconfig examples/tsconfig.json examples/save-and-revert/run.ts
import { spawn, type ChildProcess } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { doctor, QmpClient, revertFile, save } from 'qcow2/snapshot'

const qemu = process.env['QEMU'] ?? 'qemu-system-x86_64'
// 64 KiB of firmware that is the whole guest: it changes its memory, checks all of it, and prints "T <round>".
const firmware = resolve(import.meta.dirname, '../../test/fixtures/guest/tinybios.bin')
const folder = mkdtempSync(join(tmpdir(), 'save-and-revert-'))
const memory = join(folder, 'warm.qcow2')

/** Starts QEMU; its guest's rounds go to `onRound`. */
async function start(name: string, onRound: (round: number) => void, ...more: string[]): Promise<{ vm: ChildProcess; qmp: QmpClient }> {
  const socket = join(folder, name)
  const vm = spawn(qemu, [
    ...['-M', 'pc', '-m', '64', '-bios', firmware, '-nodefaults', '-vga', 'none', '-display', 'none', '-serial', 'stdio'],
    ...['-qmp', `unix:${socket},server=on,wait=off`, ...more],
  ])
  vm.stdout.setEncoding('utf8').on('data', (text: string) => {
    for (const [, round] of text.matchAll(/T ([0-9a-f]{8})\n/g)) onRound(Number.parseInt(round!, 16))
  })
  vm.stderr.pipe(process.stderr)
  for (let tries = 0; !existsSync(socket) && tries < 500; tries++) await sleep(10)
  await sleep(50) // the file is there a moment before QEMU listens
  return { vm, qmp: await QmpClient.connect(socket) }
}

async function until(condition: () => boolean): Promise<void> {
  for (let waited = 0; !condition(); waited += 5) {
    if (waited > 30_000) throw new Error('the guest does not count')
    await sleep(5)
  }
}

const running: ChildProcess[] = []
try {
  const able = await doctor({ qemu })
  if (!able.backgroundSave || !able.instantRevert) {
    for (const { name, status, detail, advice } of able.findings) console.log(`${name}: ${status}: ${detail}${advice === undefined ? '' : `; ${advice}`}`)
    throw new Error('this host cannot do it: change what is listed above')
  }
  console.log(able.findings.find(({ name }) => name === 'qemu')?.detail)

  let round = 0
  const first = await start('first.qmp', (now) => (round = now))
  running.push(first.vm)
  await until(() => round >= 20)
  console.log(`the guest counts: round ${round}`)

  const from = round
  const saved = await save(first.qmp, { memory })
  console.log(`saved between rounds ${from} and ${round}: ${saved.summary.pages.data + saved.summary.pages.zero} pages in ${saved.took.toFixed(0)} ms; the guest stood still for ${saved.stoppedFor.toFixed(1)} ms`)
  const then = round
  await until(() => round >= then + 20)
  console.log(`it ran on to round ${round}`)
  first.vm.kill('SIGKILL')
  await first.qmp.close()
  console.log('QEMU is killed; only the saved memory is left')

  for (const attempt of ['first', 'second']) {
    let again = 0
    const next = await start(`${attempt}-revert.qmp`, (now) => (again ||= now), '-incoming', 'defer')
    running.push(next.vm)
    const before = performance.now()
    const reverting = revertFile(memory, { qmp: next.qmp, incoming: join(folder, `${attempt}.incoming`) })
    await Promise.race([until(() => again > 0), reverting.then(() => until(() => again > 0))])
    console.log(`${attempt} revert: goes on at round ${again} after ${(performance.now() - before).toFixed(0)} ms`)
    const report = await reverting
    console.log(`  the guest ran after ${report.runningAfter.toFixed(0)} ms; ${report.requests} pages it waited for; all of its memory was there after ${report.completeAfter.toFixed(0)} ms`)
    next.vm.kill('SIGKILL')
    await next.qmp.close()
  }
} catch (error) {
  console.error(error instanceof Error ? error.message : error)
  process.exitCode = 1
} finally {
  for (const vm of running) vm.kill('SIGKILL')
  rmSync(folder, { recursive: true, force: true })
}
