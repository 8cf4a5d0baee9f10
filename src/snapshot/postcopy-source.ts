/**
 * The source side of a postcopy migration whose guest is not running but saved: QEMU starts the guest
 * before it has any memory and asks for the pages it touches. Owns the conversation on one connection
 * and its order; pages are the business of {@link PageServer}.
 *
 * The order, and what breaks otherwise (found with QEMU 7.2 and 10.0):
 *
 * ```
 *  header, configuration
 *  OPEN_RETURN_PATH, PING 1        without a return path no page is ever asked for
 *  POSTCOPY_ADVISE                 page sizes must be the destination's
 *  RAM START: the blocks
 *  RAM_DISCARD of every block      without at least one, the destination deadlocks
 *  PACKAGED { LISTEN, device sections, PING 3, RUN }
 *                                  device sections outside the package are eaten by the page loader
 *  RAM PART …                      each page once, in whole host pages; requests come even before RUN
 *  RAM END, EOF                    only after PONG 3, and never with a page missing: it would read as zero
 *  wait for SHUT, then close       QEMU 7.2 never completes if the connection closes before
 * ```
 */
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import {
  openReturnPath,
  packaged,
  ping,
  postcopyAdvise,
  postcopyListen,
  postcopyRamDiscard,
  postcopyResume,
  postcopyRun,
  recvBitmap,
} from '../migration/postcopy.ts'
import type { ReturnPathMessage } from '../migration/return-path.ts'
import { encodeRecord } from '../migration/writer.ts'
import type { DuplexStream } from '../qmp/duplex.ts'
import { PageServer, type PageServerOptions, type PageServerReport } from './page-server.ts'
import { refuseDirtyBitmaps, type PageSource } from './page-source.ts'
import { ramSection } from './ram-frame.ts'
import { ReturnPathReader } from './return-path-reader.ts'

/** How a saved VM is sent. */
export interface PostcopyOptions extends PageServerOptions {
  /** Aborting drops the connection: a guest that runs already is paused and can be recovered. */
  readonly signal?: AbortSignal | undefined
  /** Milliseconds of silence of the destination after which its phase is called stuck; default 30 000. */
  readonly timeout?: number | undefined
  /** Told the phase and how much memory is filled, whenever it changes. */
  readonly onProgress?: ((progress: RevertProgress) => void) | undefined
  /**
   * Called once, when the guest runs: long before all of its memory is there. With `-S` it could run now. Not called for a
   * guest that is to wait.
   */
  readonly onRunning?: (() => void) | undefined
}

/** Where a revert is. */
export interface RevertProgress {
  /**
   * `loading`: device state; `recovering`: finding out what arrived before; `running`: the guest runs, pages follow;
   * `complete`: QEMU has everything.
   */
  readonly phase: RevertPhase
  /** Bytes of RAM that the background fill has passed. */
  readonly done: number
  /** Bytes of RAM. */
  readonly total: number
}

/** The phases of a revert. */
export type RevertPhase = 'connecting' | 'loading' | 'recovering' | 'running' | 'completing' | 'complete'

/** What a postcopy did. Times are in milliseconds from its start. */
export interface PostcopyReport extends PageServerReport {
  /** Device state was loaded and the guest about to run; of a recovery: it went on. */
  readonly runningAfter: number
  /** QEMU had everything and needs the source no more. */
  readonly completeAfter: number
}

/** A revert that did not come to its end; code `ERR_STREAM`, `cause` is what happened. */
export class RevertError extends Qcow2Error {
  readonly phase: RevertPhase
  /**
   * True if the guest is paused and goes on when {@link recover} is called with the same source. Of a recovery that broke
   * off while `recovering`, it is true for QEMU 10.0; 7.2 has ended then. A connection lost in the moment between the last
   * device state and the guest's first instruction ends QEMU: then there is nothing to recover.
   */
  readonly recoverable: boolean

  constructor(phase: RevertPhase, cause: unknown) {
    const recoverable = phase === 'running' || phase === 'completing' || phase === 'recovering'
    const why = cause instanceof Error ? cause.message : String(cause)
    const unless = phase === 'recovering' ? ', unless QEMU has ended (7.2 does then)' : ''
    const next = recoverable ? `; the guest is paused and its memory incomplete: recover it with the same source${unless}` : ''
    super('ERR_STREAM', `revert failed while ${phase}: ${why}${next}`, { cause })
    this.phase = phase
    this.recoverable = recoverable
  }
}

const firstPing = 1
const runPing = 3
const bothDirections = 5_000

/** One connection to a destination. Use once: {@link PostcopySource.start} or {@link PostcopySource.recover}. */
export class PostcopySource {
  readonly #source: PageSource
  readonly #stream: DuplexStream
  readonly #options: PostcopyOptions
  readonly #timeout: number
  readonly #reader: ReturnPathReader
  readonly #server: PageServer
  /** Rejects with the first failure: even a read that never ends must not hold up the end. */
  readonly #failed: Promise<never>
  readonly #started = performance.now()
  #phase: RevertPhase = 'connecting'
  #filled = 0
  #runningAfter = 0

  constructor(source: PageSource, stream: DuplexStream, options: PostcopyOptions = {}) {
    refuse(source)
    this.#source = source
    this.#stream = stream
    this.#options = options
    this.#timeout = options.timeout ?? 30_000
    this.#server = new PageServer(source, stream, options, (error) => this.#fail(error))
    let giveUp!: (reason: unknown) => void
    this.#failed = new Promise((_resolve, reject) => (giveUp = reject))
    this.#failed.catch(() => undefined) // reported by the conversation
    this.#reader = new ReturnPathReader(
      stream,
      (message) => this.#receive(message),
      (reason) => {
        this.#server.fail(reason)
        giveUp(reason)
      },
    )
  }

  /** Starts the guest, sends its memory, and resolves when QEMU has all of it. The stream is closed then. */
  start(): Promise<PostcopyReport> {
    return this.#conversation(async () => {
      const opened = this.#expectPong(firstPing, bothDirections, 'the destination does not use the return path')
      const running = this.#expectPong(runPing, this.#timeout, 'the destination does not finish loading device state')
      opened.catch(() => undefined) // awaited below, like the other
      running.catch(() => undefined)
      this.#sendOpening()
      this.#enter('loading')
      const started = running.then(() => this.#enter('running'))
      await Promise.all([opened, started, this.#fill()])
    })
  }

  /** Goes on where a lost connection stopped, knowing only the saved VM. */
  recover(): Promise<PostcopyReport> {
    return this.#conversation(async () => {
      this.#enter('recovering')
      for (const { name } of this.#source.blocks) {
        const answer = this.#reader.expect('received-bitmap', this.#timeout, `the destination does not tell which pages of ${name} it has`)
        this.#stream.write(recvBitmap(name))
        const { block, bitmap } = await answer
        this.#server.received(block, bitmap)
      }
      const acknowledged = this.#reader.expect('resume-ack', this.#timeout, 'the destination does not resume')
      this.#stream.write(postcopyResume())
      const { value } = await acknowledged
      if (value !== 1) throw new Qcow2Error('ERR_STREAM', `the destination refused to resume (${value})`)
      this.#enter('running')
      await this.#fill()
    })
  }

  async #conversation(talk: () => Promise<void>): Promise<PostcopyReport> {
    const { signal } = this.#options
    const onAbort = (): void => this.#fail(signal?.reason)
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      signal?.throwIfAborted()
      const talking = talk().then(() => this.#finish())
      await Promise.race([talking, this.#failed])
    } catch (error) {
      this.#fail(error)
      this.#stream.destroy()
      signal?.throwIfAborted()
      throw new RevertError(this.#phase, this.#reader.failure)
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
    const completeAfter = performance.now() - this.#started
    return { ...this.#server.report, runningAfter: this.#runningAfter, completeAfter }
  }

  #sendOpening(): void {
    const { pageSize, blocks, head, earlyDevices, devices } = this.#source
    const pageSizes = blocks.map(({ name }) => this.#options.hostPageSizes?.[name] ?? pageSize)
    const opening = [
      head,
      openReturnPath(),
      ping(firstPing),
      postcopyAdvise([pageSize, ...pageSizes], pageSize),
      ...ramSection(this.#source, 'start', this.#options.hostPageSizes),
      earlyDevices,
      ...blocks.flatMap(({ name, length }) => postcopyRamDiscard(name, [{ offset: 0, length }])),
      ...packaged([postcopyListen(), devices, ping(runPing), postcopyRun()]),
    ]
    for (const bytes of opening) if (bytes.length > 0) this.#stream.write(bytes)
  }

  /** RAM END, EOF, and SHUT as the answer. */
  async #finish(): Promise<void> {
    await this.#server.quiet()
    this.#enter('completing')
    const shut = this.#reader.expect('shut', this.#timeout, 'the destination does not complete')
    for (const bytes of [...ramSection(this.#source, 'end'), encodeRecord({ kind: 'eof' })]) this.#stream.write(bytes)
    const { value } = await shut
    if (value !== 0) throw new Qcow2Error('ERR_STREAM', `the destination reports failure (SHUT ${value})`)
    this.#enter('complete')
    this.#stream.end()
  }

  #fill(): Promise<void> {
    return this.#server.fill((filled) => {
      this.#filled = filled
      this.#report()
    })
  }

  async #expectPong(value: number, silence: number, complaint: string): Promise<void> {
    await this.#reader.expect('pong', silence, complaint, value)
  }

  #receive(message: ReturnPathMessage): void {
    switch (message.kind) {
      case 'request-pages':
        // A request that crosses RAM END is for a page of zeroes, which completion puts there.
        if (this.#phase !== 'completing') this.#server.request(message.block, message.offset, message.length)
        break
      case 'pong':
        this.#server.pong(message.value)
        break
      case 'shut':
        if (this.#phase !== 'completing') this.#fail(new Qcow2Error('ERR_STREAM', `the destination gave up (SHUT ${message.value})`))
    }
  }

  #enter(phase: RevertPhase): void {
    this.#phase = phase
    if (phase === 'running') this.#runningAfter = performance.now() - this.#started
    this.#report()
    if (phase === 'running') this.#options.onRunning?.()
  }

  #report(): void {
    const total = this.#source.blocks.reduce((sum, { length }) => sum + length, 0)
    this.#options.onProgress?.({ phase: this.#phase, done: this.#filled, total })
  }

  #fail(reason: unknown): void {
    if (this.#phase !== 'complete') this.#reader.fail(reason)
  }
}

function refuse(source: PageSource): void {
  refuseDirtyBitmaps(source)
  if (source.blocks.length > 0) return
  throw new UnsupportedError('the saved VM has no RAM blocks: there is nothing to send by postcopy')
}
