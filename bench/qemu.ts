/** Real QEMUs to measure against and to check with: finding them, running one, reading its CPU time. */
import { execFile, spawn, type ChildProcess } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { QmpClient } from '../src/qmp/client.ts'
import { outputOf } from './harness.ts'

/** One installed QEMU. */
export interface QemuInstallation {
  readonly version: string
  readonly folder: string
  /** Where its firmware lies, for one that is not installed in the system's place. */
  readonly dataFolders: readonly string[]
}

/** Debian's own and one unpacked beside it; oldest first. */
export function findQemus(): QemuInstallation[] {
  const side = process.env['QCOW2_QEMU10'] ?? '/opt/qemu-10.0'
  const candidates: [string, readonly string[]][] = [['/usr/bin', []], [`${side}/usr/bin`, [`${side}/usr/share/qemu`, '/usr/share/seabios']]]
  return candidates.flatMap(([folder, dataFolders]) => {
    const program = join(folder, 'qemu-system-x86_64')
    const version = existsSync(program) ? /version ([\d.]+)/.exec(outputOf(program, ['--version']) ?? '')?.[1] : undefined
    return version === undefined ? [] : [{ version, folder, dataFolders }]
  })
}

/** Runs `qemu-img`; its output, or an error with its message. */
export function qemuImg(qemu: QemuInstallation, ...args: string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    execFile(join(qemu.folder, 'qemu-img'), args, { timeout: 60_000, maxBuffer: 1 << 24 }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout)
      else reject(new Error(`qemu-img ${args.join(' ')}: ${stdout}${stderr}`))
    })
  })
}

/** Connects as soon as QEMU listens, within a minute. */
async function connect(socket: string, alive: () => boolean): Promise<QmpClient> {
  const late = Date.now() + 60_000
  for (;;) {
    try {
      return await QmpClient.connect(socket, { timeout: 60_000 })
    } catch (error) {
      if (!alive() || Date.now() > late) throw error
      await sleep(20)
    }
  }
}

/** A virtual machine without screen and network, driven by its monitor. */
export class QemuVm {
  readonly process: ChildProcess
  readonly qmp: QmpClient
  /** What the guest has printed on its serial port. */
  serial = ''
  readonly #folder: string

  private constructor(started: ChildProcess, qmp: QmpClient, folder: string) {
    this.process = started
    this.qmp = qmp
    this.#folder = folder
    started.stdout!.setEncoding('utf8').on('data', (text: string) => (this.serial += text))
  }

  /** Starts it and waits for its monitor, a minute at most. */
  static async start(qemu: QemuInstallation, args: readonly string[]): Promise<QemuVm> {
    const folder = mkdtempSync(join(tmpdir(), 'qcow2-vm-'))
    const socket = join(folder, 'qmp')
    const fixed = ['-accel', 'tcg', '-nodefaults', '-vga', 'none', '-display', 'none', '-serial', 'stdio', '-qmp', `unix:${socket},server=on,wait=off`]
    const started = spawn(join(qemu.folder, 'qemu-system-x86_64'), [...qemu.dataFolders.flatMap((data) => ['-L', data]), ...fixed, ...args])
    let complaint = ''
    started.stderr.setEncoding('utf8').on('data', (text: string) => (complaint += text))
    try {
      const alive = (): boolean => started.exitCode === null
      const qmp = await connect(socket, alive)
      return new QemuVm(started, qmp, folder)
    } catch (error) {
      started.kill('SIGKILL')
      rmSync(folder, { recursive: true, force: true })
      throw complaint === '' ? error : new Error(`QEMU did not start: ${complaint}`, { cause: error })
    }
  }

  /** A command of the human monitor; what it prints is an error. */
  async monitor(command: string): Promise<void> {
    const answer = await this.qmp.execute('human-monitor-command', { 'command-line': command }, { timeout: 300_000 })
    if (answer.trim() !== '') throw new Error(`${command}: ${answer.trim()}`)
  }

  /** User and system time of all its threads so far, in seconds (Linux). */
  get cpuSeconds(): number {
    const stat = readFileSync(`/proc/${this.process.pid}/stat`, 'utf8')
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    return (Number(fields[11]) + Number(fields[12])) / 100
  }

  /** Ends it: by `quit`, so that it closes its images; by SIGKILL where it does not obey within 10 seconds. */
  async end(): Promise<void> {
    const closed = new Promise((resolve) => this.process.once('close', resolve))
    const running = this.process.exitCode === null && this.process.signalCode === null
    await this.qmp.execute('quit', {}, { timeout: 10_000 }).catch(() => undefined)
    const late = setTimeout(() => this.process.kill('SIGKILL'), 10_000)
    if (running) await closed
    clearTimeout(late)
    await this.qmp.close()
    rmSync(this.#folder, { recursive: true, force: true })
  }
}
