/**
 * The tiny firmware guest under a real QEMU: 64 KiB of firmware, no kernel, no disk needed. It changes
 * and checks its memory for ever and prints `T <round>` on the serial port for each good round,
 * `E <page>` for a bad page and `S <sum>` for a bad sum (test/fixtures/guest/tinybios.S).
 * Every guest is killed by its process id when the test ends.
 */
import type { ChildProcessWithoutNullStreams } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createServer, type Server } from 'node:net'
import { join, resolve } from 'node:path'
import { expect, onTestFinished } from 'vitest'
import { QmpClient } from '../../src/qmp/client.ts'
import type { Qemu } from './qemu.ts'
import { tempFolder } from './temp.ts'

const firmware = resolve(import.meta.dirname, '../fixtures/guest/tinybios.bin')

/** RAM block of the guest's main memory with machine type `pc`. */
export const mainMemory = 'pc.ram'

export interface GuestOptions {
  /** As `-m` takes it: MiB, default 4. */
  readonly memory?: number | string
  /** What runs in it, default the firmware: options of QEMU, see `linuxGuest`. */
  readonly system?: readonly string[]
  /** Default `pc`; pin a version (`pc-i440fx-7.2`) to move a VM between QEMUs. */
  readonly machine?: string
  /** A disk of drive name and node name `d0`, `d1`, …: each a qcow2 file. */
  readonly disks?: readonly string[]
  /** `-incoming`: `defer` or a URI. */
  readonly incoming?: string
  readonly loadvm?: string
  /** `-S`: wait for `cont`. */
  readonly paused?: boolean
  readonly args?: readonly string[]
}

/** What a memory image of the guest says about itself. */
export interface GuestMemory {
  readonly tick: number
  readonly pages: number
  readonly total: number
  /** Every page obeys the formula and the generations add up: no page is torn, stale or misplaced. */
  readonly consistent: boolean
  readonly problems: readonly string[]
}

/** A running guest. */
export class Guest {
  readonly qemu: Qemu
  readonly process: ChildProcessWithoutNullStreams
  readonly folder: string
  /** All complete lines of the serial port so far. */
  readonly lines: string[] = []
  /** What QEMU wrote to stderr. */
  stderr = ''
  readonly #serial: Server
  #rest = ''
  #qmp: QmpClient | undefined
  readonly #exited: Promise<number | null>
  readonly #listeners = new Set<() => void>()

  private constructor(qemu: Qemu, options: GuestOptions) {
    this.qemu = qemu
    this.folder = tempFolder()
    // A socket of its own: QEMU writes messages of its own to stdout, in the middle of the guest's lines.
    this.#serial = createServer((socket) => socket.setEncoding('utf8').on('data', (text: string) => this.#read(text)))
    this.#serial.listen(this.#serialPath)
    this.process = qemu.system(...commandLine(this.#serialPath, this.qmpPath, options))
    this.process.stderr.setEncoding('utf8').on('data', (text: string) => (this.stderr += text))
    this.#exited = new Promise((settle) => {
      this.process.on('close', (code) => {
        settle(code)
        this.#notify()
      })
    })
    onTestFinished(() => this.kill())
  }

  /** Starts QEMU and waits for its monitor. */
  static async boot(qemu: Qemu, options: GuestOptions = {}): Promise<Guest> {
    const guest = new Guest(qemu, options)
    await guest.until(() => existsSync(guest.qmpPath), 'monitor socket')
    // The socket's file is there a moment before QEMU listens.
    for (let tries = 0; guest.#qmp === undefined; tries++) {
      guest.#qmp = await QmpClient.connect(guest.qmpPath, { timeout: 20_000 }).catch((error: unknown) => {
        if (tries === 100 || !guest.running) throw error
        return undefined
      })
      if (guest.#qmp === undefined) await new Promise((wake) => setTimeout(wake, 10))
    }
    return guest
  }

  get qmpPath(): string {
    return join(this.folder, 'qmp')
  }

  get #serialPath(): string {
    return join(this.folder, 'serial')
  }

  /** The monitor, with out-of-band execution. */
  get qmp(): QmpClient {
    return this.#qmp!
  }

  get running(): boolean {
    return this.process.exitCode === null && this.process.signalCode === null
  }

  /** The numbers of all good rounds so far. */
  get ticks(): number[] {
    return this.lines.filter((line) => line.startsWith('T ')).map((line) => Number.parseInt(line.slice(2), 16))
  }

  /** Lines that report bad memory. */
  get errors(): string[] {
    return this.lines.filter((line) => !line.startsWith('T '))
  }

  /** Waits until the guest has printed `count` good rounds more than now; gives the last one. */
  async run(count = 3, timeout = 20_000): Promise<number> {
    const before = this.ticks.length
    await this.until(() => this.ticks.length >= before + count, `${count} rounds of the guest`, timeout)
    return this.ticks.at(-1)!
  }

  /** Waits for something that changes with output, exit or time; fails loudly after `timeout` milliseconds. */
  async until(condition: () => boolean, what: string, timeout = 20_000): Promise<void> {
    const deadline = Date.now() + timeout
    while (!condition()) {
      if (!this.running) throw new Error(`QEMU ended (${String(this.process.exitCode)}) before ${what}: ${this.stderr}`)
      if (Date.now() > deadline) throw new Error(`no ${what} in ${timeout} ms; stderr: ${this.stderr}`)
      await new Promise<void>((wake) => {
        const done = (): void => {
          clearTimeout(timer)
          this.#listeners.delete(done)
          wake()
        }
        const timer = setTimeout(done, 5)
        this.#listeners.add(done)
      })
    }
  }

  /** Resolves with the exit code when the process has ended. */
  exited(timeout = 20_000): Promise<number | null> {
    let timer: NodeJS.Timeout
    const late = new Promise<never>((_resolve, reject) => {
      timer = setTimeout(() => reject(new Error(`QEMU did not end in ${timeout} ms`)), timeout)
    })
    return Promise.race([this.#exited, late]).finally(() => clearTimeout(timer))
  }

  /**
   * The guest goes on from a memory saved with round counter `tick`: no bad page, no bad sum, and the next
   * round first (or that very round, if it was saved before it had printed it).
   */
  async expectGoesOn(tick: number): Promise<void> {
    await this.run(3)
    expect(this.errors).toEqual([])
    expect(this.ticks[0]).toBeGreaterThanOrEqual(tick)
    expect(this.ticks[0]).toBeLessThanOrEqual(tick + 2)
  }

  /** Ends the process by SIGKILL, which even a deadlocked QEMU obeys. */
  async kill(): Promise<void> {
    await this.#qmp?.close()
    if (this.running) this.process.kill('SIGKILL')
    await this.#exited
    this.#serial.close()
  }

  #read(text: string): void {
    const lines = (this.#rest + text).split('\n')
    this.#rest = lines.pop()!
    // A guest saved while it printed begins with the rest of that line.
    if (this.lines.length === 0 && lines.length > 0 && !/^[A-Z] [0-9a-f]{8}$/.test(lines[0]!)) lines.shift()
    this.lines.push(...lines)
    this.#notify()
  }

  #notify(): void {
    for (const listener of [...this.#listeners]) listener()
  }
}

function commandLine(serialPath: string, qmpPath: string, options: GuestOptions): string[] {
  const { memory = 4, system = ['-bios', firmware], machine = 'pc', disks = [], incoming, loadvm, paused, args = [] } = options
  return [
    ...['-M', machine, '-m', String(memory), ...system],
    ...['-nodefaults', '-vga', 'none', '-display', 'none'],
    ...['-chardev', `socket,id=serial,path=${serialPath}`, '-serial', 'chardev:serial'],
    ...['-chardev', `socket,id=qmp,path=${qmpPath},server=on,wait=off`, '-mon', 'chardev=qmp,mode=control'],
    ...disks.flatMap((disk, index) => ['-blockdev', `driver=qcow2,node-name=d${index},file.driver=file,file.filename=${disk}`]),
    ...disks.flatMap((_disk, index) => ['-device', `virtio-blk-pci,drive=d${index},id=disk${index}`]),
    ...(incoming === undefined ? [] : ['-incoming', incoming]),
    ...(loadvm === undefined ? [] : ['-loadvm', loadvm]),
    ...(paused === true ? ['-S'] : []),
    ...args,
  ]
}

/** Reads bytes of the guest's main memory. */
export type ReadMemory = (offset: number, length: number) => Uint8Array | Promise<Uint8Array>

/** Checks a memory image by the guest's own formula, without running it. */
export async function checkGuestMemory(read: ReadMemory): Promise<GuestMemory> {
  const variables = view(await read(0x100000, 16))
  const tick = variables.getUint32(4, true)
  const total = variables.getUint32(8, true)
  const pages = variables.getUint32(12, true)
  const problems: string[] = []
  if (pages < 1 || pages > 8192) return { tick, pages, total, consistent: false, problems: [`${pages} pages`] }
  const memory = view(await read(0x110000, pages * 4096))
  let sum = 0
  for (let page = 0; page < pages; page++) {
    const at = page * 4096
    const generation = memory.getUint32(at + 4, true)
    const check = (Math.imul(generation, 0x9e3779b1) ^ page) >>> 0
    sum = (sum + generation) >>> 0
    const good =
      memory.getUint32(at, true) === (page ^ 0x5a5a1234) >>> 0 &&
      memory.getUint32(at + 8, true) === check &&
      memory.getUint32(at + 0xffc, true) === check
    if (!good) problems.push(`page ${page} is torn, stale or misplaced`)
  }
  if (sum !== total) problems.push(`generations add up to ${sum}, the guest counted ${total}`)
  return { tick, pages, total, consistent: problems.length === 0, problems }
}

function view(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}
