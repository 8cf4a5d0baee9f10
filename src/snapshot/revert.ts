/**
 * Starts a saved VM in a waiting QEMU: the guest runs before its memory is there. Owns what is checked and set
 * up before the conversation; the conversation is {@link PostcopySource}'s.
 */
import type { Source } from '../block/source.ts'
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { Qcow2Image } from '../qcow2/image.ts'
import type { Qmp } from '../qmp/client.ts'
import { isDuplexStream, type DuplexStream } from '../qmp/duplex.ts'
import { QmpError } from '../qmp/error.ts'
import { connectSocket, type SocketAddress } from '../qmp/socket.ts'
import { differences } from './differences.ts'
import { ramBlocksOf } from './machine-facts.ts'
import type { Manifest } from './manifest.ts'
import { migrationStream } from './eager.ts'
import { openSaved, type OpenSavedOptions } from './open-saved.ts'
import { refuseDirtyBitmaps, type PageSource } from './page-source.ts'
import { PostcopySource, type PostcopyOptions, type RevertReport } from './postcopy-source.ts'

/**
 * Reads of up to a cluster, in a stream with the heads of its pages, are made synchronously unless the caller says
 * otherwise: what a guest waits for is mostly in the page cache, where a turn through the thread pool costs more than the read.
 */
const faultRead = 73_728

/** A saved VM: an open one, or what {@link openSaved} opens. */
export type SavedVm = PageSource | Source | Qcow2Image

/** Options of {@link revert}. */
export interface RevertOptions extends PostcopyOptions, OpenSavedOptions {
  /**
   * The destination: a QEMU that waits with `-incoming` at this address, or a connection to it. The transport must go
   * both ways. Without `qmp` the QEMU must have been started with the capability `postcopy-ram`:
   * `-global migration.x-postcopy-ram=on -incoming unix:PATH`.
   */
  readonly incoming: SocketAddress | DuplexStream
  /**
   * Monitor of a QEMU that waits with `-incoming defer`: differences to the saved VM are explained before anything
   * starts, host page sizes are asked for, the capability is set, and QEMU is told to listen at `incoming`.
   */
  readonly qmp?: Qmp | undefined
  /** What was said of the VM when it was saved: checked with `qmp`. */
  readonly manifest?: Manifest | undefined
}

/**
 * Starts the guest of a saved VM by postcopy: device state first, then the guest runs; pages it touches go before
 * everything else, the rest follows. Resolves when QEMU has all of it and needs this process no more.
 *
 * If the connection or this process dies while the guest runs, the guest pauses: {@link recover} goes on from the
 * same saved VM. The saved VM is never written to.
 *
 * @throws RevertError (`ERR_STREAM`) with the phase, and whether it can be recovered; `ERR_QMP` and
 *   `ERR_UNSUPPORTED` before anything has started.
 */
export async function revert(saved: SavedVm, options: RevertOptions): Promise<RevertReport> {
  return withSource(saved, options, async (source) => {
    const hostPageSizes = options.qmp === undefined ? options.hostPageSizes : await prepare(options.qmp, source, options)
    const stream = await connectTo(options.incoming, options)
    return new PostcopySource(source, stream, { ...options, hostPageSizes }).start()
  })
}

/** Options of {@link recover}. */
export interface RecoverOptions extends RevertOptions {
  /** Monitor of the paused QEMU, with out-of-band execution: it is told to listen at `incoming`. */
  readonly qmp?: Qmp | undefined
}

/**
 * Goes on with a revert whose connection was lost: asks QEMU which pages it has and sends the others. Needs nothing
 * but the saved VM it was reverted from.
 *
 * `incoming` must be a new address: QEMU is told to listen there, by `qmp` or before this call (`migrate-recover`).
 */
export async function recover(saved: SavedVm, options: RecoverOptions): Promise<RevertReport> {
  return withSource(saved, options, async (source) => {
    const { qmp, incoming } = options
    let { hostPageSizes } = options
    if (qmp !== undefined && !isDuplexStream(incoming)) {
      await listenAgain(qmp, uriOf(incoming), options)
    }
    // A paused vCPU may hold QEMU's main lock: only out-of-band commands are answered now.
    hostPageSizes ??= {}
    return new PostcopySource(source, await connectTo(incoming, options), { ...options, hostPageSizes }).recover()
  })
}

/** QEMU needs a moment to notice that a connection is lost; until then it refuses to recover. */
async function listenAgain(qmp: Qmp, uri: string, { signal, timeout = 30_000 }: RecoverOptions): Promise<void> {
  const deadline = performance.now() + timeout
  for (;;) {
    try {
      await qmp.execute('migrate-recover', { uri }, { outOfBand: true, signal })
      return
    } catch (error) {
      const early = error instanceof QmpError && /postcopy is paused/i.test(error.desc ?? '')
      if (!early || performance.now() > deadline) throw error
    }
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
}

/** What an eager revert did. */
export interface EagerRevertReport {
  /** Bytes sent. */
  readonly bytes: number
  /** Milliseconds until everything was handed over. */
  readonly took: number
}

/**
 * Sends a saved VM as an ordinary migration: the guest runs when all of it has arrived. For destinations that
 * cannot take postcopy. The QEMU waits with `-incoming` at the address; with `qmp`, with `-incoming defer`. A VM that
 * stood still when its memory was saved stays paused until `cont`.
 */
export async function revertEagerly(saved: SavedVm, options: RevertOptions): Promise<EagerRevertReport> {
  return withSource(saved, options, async (source) => {
    const started = performance.now()
    const { qmp, incoming, signal } = options
    if (qmp !== undefined) await explainDifferences(qmp, source, options.manifest)
    if (qmp !== undefined && !isDuplexStream(incoming)) await qmp.execute('migrate-incoming', { uri: uriOf(incoming) })
    const stream = await connectTo(incoming, options)
    let bytes = 0
    try {
      for await (const chunk of migrationStream(source, { signal })) {
        bytes += chunk.length
        await written(stream, chunk)
      }
      await ended(stream, options.timeout ?? 30_000)
    } catch (error) {
      stream.destroy()
      throw error
    }
    return { bytes, took: performance.now() - started }
  })
}

async function withSource<T>(saved: SavedVm, options: OpenSavedOptions, task: (source: PageSource) => Promise<T>): Promise<T> {
  options.signal?.throwIfAborted()
  if (isPageSource(saved)) {
    refuseDirtyBitmaps(saved)
    return task(saved)
  }
  await using source = await openSaved(saved, { ...options, syncLimit: options.syncLimit ?? faultRead })
  refuseDirtyBitmaps(source)
  return await task(source)
}

function isPageSource(saved: SavedVm): saved is PageSource {
  return typeof saved === 'object' && 'devices' in saved && 'ramSectionId' in saved
}

/** Checks the destination, sets it up, and gives the host page sizes of its RAM blocks. */
async function prepare(qmp: Qmp, source: PageSource, options: RevertOptions): Promise<Readonly<Record<string, number>>> {
  await explainDifferences(qmp, source, options.manifest)
  const saved = new Set(source.blocks.map(({ name }) => name))
  const blocks = await ramBlocksOf(qmp)
  const capabilities = [
    { capability: 'postcopy-ram', state: true },
    { capability: 'events', state: true },
  ]
  await qmp.execute('migrate-set-capabilities', { capabilities })
  if (!isDuplexStream(options.incoming)) await qmp.execute('migrate-incoming', { uri: uriOf(options.incoming) })
  const large = blocks.filter(({ name, pageSize }) => saved.has(name) && pageSize > source.pageSize)
  return { ...Object.fromEntries(large.map(({ name, pageSize }) => [name, pageSize])), ...options.hostPageSizes }
}

async function explainDifferences(qmp: Qmp, source: PageSource, manifest: Manifest | undefined): Promise<void> {
  const needs = {
    machine: source.machine,
    ramBlocks: source.blocks,
    ...(manifest !== undefined && { accelerator: manifest.accelerator }),
  }
  const found = await differences(needs, qmp)
  if (found.length > 0) throw new UnsupportedError(`this QEMU cannot go on from the saved VM:\n  ${found.join('\n  ')}`, found)
}

function connectTo(incoming: SocketAddress | DuplexStream, options: PostcopyOptions): Promise<DuplexStream> {
  return isDuplexStream(incoming) ? Promise.resolve(incoming) : connectSocket(incoming, { signal: options.signal })
}

function uriOf(address: SocketAddress): string {
  return typeof address === 'string' ? `unix:${address}` : `tcp:${address.host ?? 'localhost'}:${address.port}`
}

/** Resolves when the bytes were handed on: their memory is used again. */
function written(stream: DuplexStream, bytes: Uint8Array): Promise<void> {
  return new Promise((resolve, reject) => {
    stream.write(bytes, (error) => {
      if (error === undefined || error === null) resolve()
      else reject(new Qcow2Error('ERR_STREAM', `the destination went away: ${error.message}`, { cause: error }))
    })
  })
}

/** Half-closes and waits until the destination has closed, which it does when it has loaded everything. */
function ended(stream: DuplexStream, timeout: number): Promise<void> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      reject(new Qcow2Error('ERR_STREAM', `the destination did not take the end of the stream in ${timeout} ms`))
    }, timeout)
    const done = (): void => {
      clearTimeout(timer)
      resolve()
    }
    stream.on('close', done)
    stream.on('error', done)
    stream.resume()
    stream.end()
  })
}
