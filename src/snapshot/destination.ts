/**
 * The QEMU that is to go on from a saved VM, as its monitor shows it: compared with what was saved, set up, told to listen,
 * and asked what became of it. Without a monitor all of that is the caller's. Knows nothing of the bytes that are sent.
 */
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import type { Qmp } from '../qmp/client.ts'
import { isDuplexStream, type DuplexStream } from '../qmp/duplex.ts'
import { QmpError } from '../qmp/error.ts'
import { connectSocket, type SocketAddress } from '../qmp/socket.ts'
import { compareVm } from './differences.ts'
import { absoluteFile } from './host-files.ts'
import { ramBlocksOf } from './machine-facts.ts'
import type { Manifest } from './manifest.ts'
import { changeMigrationSettings, destinationSettings } from './migration-settings.ts'
import type { PageSource } from './page-source.ts'
import type { RunStateChoice } from './saved-state.ts'

/** Where a destination is, and how it is told. */
export interface DestinationOptions {
  /**
   * The destination: a QEMU that waits with `-incoming` at this address, or a connection to it. The transport must go
   * both ways. A relative path is taken from this process's folder. Without `qmp` the QEMU must have been started with the
   * capability `postcopy-ram`: `-global migration.x-postcopy-ram=on -incoming unix:PATH`.
   */
  readonly incoming: SocketAddress | DuplexStream
  /**
   * Monitor of a QEMU that waits with `-incoming defer`: differences to the saved VM are explained before anything
   * starts, host page sizes are asked for, capabilities are set, and QEMU is told to listen at `incoming`.
   */
  readonly qmp?: Qmp | undefined
  /** What was said of the VM when it was saved: checked with `qmp`. */
  readonly manifest?: Manifest | undefined
  /** Path of the saved memory: files of the manifest that are no longer where they were are looked for beside it. */
  readonly memory?: string | undefined
  /** Go on although the QEMU or its disks differ from what was saved; the differences become warnings. */
  readonly ignoreDifferences?: boolean | undefined
  readonly signal?: AbortSignal | undefined
  /** Milliseconds of silence of the destination after which it is called stuck; default 30 000. */
  readonly timeout?: number | undefined
}

const another = 'start another QEMU for another try'
const seeStderr = 'QEMU has ended; its standard error says why: a device that is missing, or is elsewhere than it was; memory in a file, which no postcopy can fill'

/** One QEMU that waits. */
export class Destination {
  /** What the caller should know and need not stop for. */
  readonly warnings: string[] = []
  readonly #options: DestinationOptions
  readonly #qmp: Qmp | undefined
  #restore: (() => Promise<void>) | undefined

  constructor(options: DestinationOptions) {
    this.#options = options
    this.#qmp = options.qmp
  }

  /** @throws UnsupportedError if it differs from the saved VM in what matters, unless differences are to be ignored */
  async compare(source: PageSource): Promise<void> {
    const { manifest, memory, ignoreDifferences } = this.#options
    if (this.#qmp === undefined) return
    const needs = { ...manifest, machine: source.machine, ramBlocks: source.blocks }
    const { differences, remarks } = await compareVm(needs, this.#qmp, memory)
    this.warnings.push(...remarks)
    if (ignoreDifferences === true) this.warnings.push(...differences)
    else if (differences.length > 0) {
      const goOn = 'ignoreDifferences (--force) goes on nevertheless'
      throw new UnsupportedError(`this QEMU cannot go on from the saved VM: ${differences.join('; ')}; ${goOn}`, differences)
    }
  }

  /**
   * Sets the capabilities that a revert needs, and switches off those that are in its way.
   * @throws QmpError (`ERR_QMP`) if QEMU refuses; for `postcopy`, with what to do where its host has no userfaultfd
   */
  async setUp(source: PageSource, { postcopy }: { readonly postcopy: boolean }): Promise<void> {
    const qmp = this.#qmp
    if (qmp === undefined) return
    try {
      this.#restore = await changeMigrationSettings(qmp, destinationSettings(postcopy ? ['postcopy-ram'] : [], capabilitiesIn(source)))
    } catch (error) {
      if (!postcopy || !(error instanceof QmpError)) throw error
      const advice = "'qcow2 doctor' says what the host lacks; an ordinary migration needs none of it (revertEagerly, --eager; fallback: 'eager')"
      throw new QmpError(`${error.message}; ${advice}`, { cause: error })
    }
  }

  /** Host page sizes of RAM blocks where they are larger than the pages of the saved VM. */
  async hostPageSizes(source: PageSource): Promise<Readonly<Record<string, number>> | undefined> {
    if (this.#qmp === undefined) return undefined
    const saved = new Set(source.blocks.map(({ name }) => name))
    const large = (await ramBlocksOf(this.#qmp)).filter(({ name, pageSize }) => saved.has(name) && pageSize > source.pageSize)
    return Object.fromEntries(large.map(({ name, pageSize }) => [name, pageSize]))
  }

  /** Tells QEMU to listen, and connects. */
  async connect(): Promise<DuplexStream> {
    const { incoming, signal } = this.#options
    if (isDuplexStream(incoming)) return incoming
    const address = absoluteAddress(incoming)
    try {
      await this.#qmp?.execute('migrate-incoming', { uri: uriOf(address) }, { signal })
    } catch (error) {
      await this.restore()
      if (!(error instanceof QmpError)) throw error
      throw new QmpError(`${error.message}; a QEMU takes one revert, and waits for it with -incoming defer: ${another}`, { cause: error })
    }
    return connectSocket(address, { signal })
  }

  /** Puts capabilities back. What they were matters only to what is done with the VM later: a failure is a warning. */
  async restore(): Promise<void> {
    const restore = this.#restore
    this.#restore = undefined
    await restore?.().catch((error: unknown) => this.warnings.push(`migration capabilities could not be set back: ${wordsOf(error)}`))
  }

  /** Lets the guest wait for `cont` when all has arrived, where the stream cannot tell that. */
  async hold(): Promise<void> {
    if (this.#qmp === undefined) throw new UnsupportedError('the stream of this machine type does not tell QEMU to wait: give its monitor, or start it with -S')
    await this.#qmp.execute('stop', undefined, { signal: this.#options.signal })
  }

  /**
   * Waits until QEMU says that it has everything.
   * @throws Qcow2Error `ERR_STREAM` if it has not, or has ended
   */
  async arrived(): Promise<void> {
    const { timeout = 30_000, signal } = this.#options
    const deadline = performance.now() + timeout
    for (;;) {
      const info = await this.#qmp?.execute('query-migrate', undefined, { signal })
      if (info === undefined || info.status === 'completed') return
      const { status, 'error-desc': reason = 'its standard error says why' } = info
      if (status === 'failed') throw new Qcow2Error('ERR_STREAM', `the destination refused the saved VM: ${reason}; ${another}`)
      if (performance.now() > deadline) throw new Qcow2Error('ERR_STREAM', `everything was sent, but QEMU reports ${String(status)} for ${timeout} ms`)
      await new Promise((resolve) => setTimeout(resolve, 5))
    }
  }

  /** The run state that QEMU is in, changed if the caller's choice asks for it; `otherwise` without a monitor. Never fails. */
  async settle(choice: RunStateChoice | undefined, otherwise: string): Promise<string> {
    const qmp = this.#qmp
    if (qmp === undefined) return otherwise
    try {
      if (choice === 'running') await this.run()
      const { status } = await qmp.execute('query-status')
      if (choice !== 'paused' || status !== 'running') return status
      await qmp.execute('stop')
      return (await qmp.execute('query-status')).status
    } catch (error) {
      this.warnings.push(`QEMU has everything, but does not say in which state it is: ${wordsOf(error)}`)
      return otherwise
    }
  }

  /** Sets the guest running, whatever state it is in. */
  async run(): Promise<void> {
    const status = (await this.#qmp?.execute('query-status'))?.status
    if (status !== undefined && status !== 'running') await this.#qmp?.execute(status === 'suspended' ? 'system_wakeup' : 'cont')
  }

  /** An error of the connection, with what became of QEMU: the connection alone does not tell. */
  async explained(error: unknown): Promise<unknown> {
    const qmp = this.#qmp
    if (!Qcow2Error.is(error, 'ERR_STREAM') && !Qcow2Error.is(error, 'ERR_QMP')) return error
    if (qmp === undefined) return tell(error, `if QEMU has ended, its standard error says why; ${another}`)
    // its monitor closes a moment later than its end of the migration
    for (const wait of [0, 50, 150, 300]) {
      await new Promise((resolve) => setTimeout(resolve, wait))
      const gone = await qmp.execute('query-status', undefined, { timeout: 1_000 }).then(() => false, () => true)
      if (!gone) continue
      const advice = `${seeStderr}; ${another}, with --eager (revertEagerly) if postcopy is the reason`
      return new Qcow2Error('ERR_STREAM', `${error.message}; ${advice}`, { cause: error })
    }
    const { 'error-desc': reason } = await qmp.execute('query-migrate', undefined, { timeout: 1_000 }).catch(() => ({ 'error-desc': undefined }))
    return reason === undefined ? error : tell(error, `QEMU says: ${reason}`)
  }
}

/** Capabilities that a stream names because the destination must have them, too, as it was made with them. */
function capabilitiesIn({ head }: PageSource): string[] {
  const text = new TextDecoder('latin1').decode(head)
  return ['x-ignore-shared', 'mapped-ram'].filter((name) => text.includes(name))
}

function tell(error: Qcow2Error, more: string): Qcow2Error {
  return new Qcow2Error(error.code, `${error.message}; ${more}`, { cause: error })
}

function wordsOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

/** QEMU resolves a relative path in its own folder, we in ours: both take the same absolute one. */
export function absoluteAddress(address: SocketAddress): SocketAddress {
  return typeof address === 'string' ? absoluteFile(address) : address
}

/** An address as QEMU's migration commands take it. */
export function uriOf(address: SocketAddress): string {
  if (typeof address === 'string') return `unix:${address}`
  const { host = 'localhost', port } = address
  return `tcp:${host.includes(':') ? `[${host}]` : host}:${port}`
}
