/**
 * Starts a saved VM in a waiting QEMU: by postcopy, where the guest runs before its memory is there, or whole. Owns which of
 * both, and that the guest does afterwards what it did before it was saved. The conversation is {@link PostcopySource}'s,
 * the QEMU {@link Destination}'s.
 */
import type { Source } from '../block/source.ts'
import type { Qcow2Image } from '../qcow2/image.ts'
import type { Qmp } from '../qmp/client.ts'
import { isDuplexStream, type DuplexStream } from '../qmp/duplex.ts'
import { QmpError } from '../qmp/error.ts'
import { connectSocket } from '../qmp/socket.ts'
import { absoluteAddress, Destination, uriOf, type DestinationOptions } from './destination.ts'
import { sendWhole } from './eager.ts'
import type { FaultOrder } from './fault-order.ts'
import { openSaved, type OpenSavedOptions } from './open-saved.ts'
import { refuseDirtyBitmaps, type PageSource } from './page-source.ts'
import { PostcopySource, RevertError, type PostcopyOptions, type PostcopyReport } from './postcopy-source.ts'
import { runStateIn, wantedState, type RunStateChoice } from './saved-state.ts'

/**
 * Reads of up to a cluster, in a stream with the heads of its pages, are made synchronously unless the caller says
 * otherwise: what a guest waits for is mostly in the page cache, where a turn through the thread pool costs more than the read.
 */
export const faultRead = 73_728

/** A saved VM: an open one, or what {@link openSaved} opens. */
export type SavedVm = PageSource | Source | Qcow2Image

/** Options of {@link revert}. */
export interface RevertOptions extends PostcopyOptions, OpenSavedOptions, DestinationOptions {
  /**
   * What the guest does afterwards. `saved` (default): what it did before it was saved, by the manifest, else by the stream;
   * `running`: it runs, also if QEMU was started with `-S`; `paused`: it waits for `cont`.
   */
  readonly state?: RunStateChoice | undefined
  /** Send an ordinary migration where QEMU or its host refuse postcopy before anything has started; default: fail and say why. */
  readonly fallback?: 'eager' | undefined
}

/** What a revert did. Times are in milliseconds from its start. */
export interface RevertReport extends PostcopyReport {
  /**
   * How memory was sent. `eager`: all of it before the guest ran, because the guest was not to run or QEMU could not take
   * postcopy (`fallback`); nothing is counted then but times.
   */
  readonly mode: 'postcopy' | 'eager'
  /** The run state now, as `query-status` names it; without a monitor the one that QEMU was told. */
  readonly state: string
  /** What the caller should know and need not stop for. */
  readonly warnings: readonly string[]
}

/**
 * Starts the guest of a saved VM by postcopy: device state first, then the guest runs; pages it touches go before
 * everything else, the rest follows. Resolves when QEMU has all of it and needs this process no more; `onRunning` is
 * called when the guest runs. A guest that is not to run (see `state`) waits for no page: all of it is sent, as by
 * {@link revertEagerly}, and QEMU is in the state it was saved in, be it `paused`, `suspended` or `io-error`.
 *
 * If the connection or this process dies while the guest runs, the guest pauses: {@link recover} goes on from the
 * same saved VM. The saved VM is never written to.
 *
 * @throws RevertError (`ERR_STREAM`) with the phase, and whether it can be recovered; `ERR_QMP` and
 *   `ERR_UNSUPPORTED` (differences to the saved VM) before anything has started.
 */
export async function revert(saved: SavedVm, options: RevertOptions): Promise<RevertReport> {
  return withSource(saved, options, async (source) => {
    const destination = new Destination(options)
    const state = stateFor(source, options)
    await destination.compare(source)
    if (state === 'running' && (await takesPostcopy(destination, source, options))) return byPostcopy(destination, source, options)
    const { took, state: now, warnings } = await sendEagerly(destination, source, state, options)
    const nothing = { requests: 0, pages: 0, latencies: [], faultOrder: options.faultOrder ?? noFaults }
    return { ...nothing, mode: 'eager', state: now, runningAfter: took, completeAfter: took, warnings }
  })
}

const noFaults: FaultOrder = { version: 1, clusterSize: 65_536, blocks: [], faults: [] }

/** Options of {@link recover}. */
export interface RecoverOptions extends RevertOptions {
  /** Monitor of the paused QEMU, with out-of-band execution: it is told to listen at `incoming`. */
  readonly qmp?: Qmp | undefined
}

/**
 * Goes on with a revert whose connection was lost: asks QEMU which pages it has and sends the others. Needs nothing
 * but the saved VM it was reverted from. The guest runs as it did before, unless `state` says otherwise.
 *
 * `incoming` must be a new address: QEMU is told to listen there, by `qmp` or before this call (`migrate-recover`).
 */
export async function recover(saved: SavedVm, options: RecoverOptions): Promise<RevertReport> {
  return withSource(saved, options, async (source) => {
    const { qmp, incoming, signal } = options
    const address = isDuplexStream(incoming) ? undefined : absoluteAddress(incoming)
    if (qmp !== undefined && address !== undefined) await listenAgain(qmp, uriOf(address), options)
    const stream = address === undefined ? (incoming as DuplexStream) : await connectSocket(address, { signal })
    // A paused vCPU may hold QEMU's main lock: page sizes cannot be asked for, as only out-of-band commands are answered now.
    const { hostPageSizes = {} } = options
    const report = await new PostcopySource(source, stream, { ...options, hostPageSizes }).recover()
    return finish(new Destination(options), report, options)
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
  /** The run state now, as `query-status` names it; without a monitor the one that QEMU was told. */
  readonly state: string
  /** What the caller should know and need not stop for. */
  readonly warnings: readonly string[]
}

/**
 * Sends a saved VM as an ordinary migration: the guest goes on when all of it has arrived, in the run state it was saved in
 * (see `state`). For destinations that cannot take postcopy. The QEMU waits with `-incoming` at the address; with `qmp`,
 * with `-incoming defer`.
 *
 * Without `qmp` nothing tells whether QEMU took what it was sent: it closes the connection in any case.
 * @throws Qcow2Error `ERR_STREAM` if the destination goes away or refuses what it was sent; as {@link revert} before that.
 */
export async function revertEagerly(saved: SavedVm, options: RevertOptions): Promise<EagerRevertReport> {
  return withSource(saved, options, async (source) => {
    const destination = new Destination(options)
    await destination.compare(source)
    return sendEagerly(destination, source, stateFor(source, options), options)
  })
}

/** What the VM is to be in the end. */
function stateFor(source: PageSource, { manifest, state }: RevertOptions): string {
  return wantedState(manifest?.status ?? source.runState ?? runStateIn(source.devices) ?? 'running', state)
}

/** Sets the destination up for postcopy; false if it refuses and all is to be sent before the guest runs. */
async function takesPostcopy(destination: Destination, source: PageSource, { fallback }: RevertOptions): Promise<boolean> {
  try {
    await destination.setUp(source, { postcopy: true })
    return true
  } catch (error) {
    if (fallback !== 'eager' || !(error instanceof QmpError)) throw error
    const { message } = error.cause instanceof QmpError ? error.cause : error
    destination.warnings.push(`all memory was sent before the guest ran, as postcopy was refused: ${message}`)
    return false
  }
}

async function byPostcopy(destination: Destination, source: PageSource, options: RevertOptions): Promise<RevertReport> {
  const hostPageSizes = { ...(await destination.hostPageSizes(source)), ...options.hostPageSizes }
  const stream = await destination.connect()
  const onRunning = (): void => {
    // also where -S said otherwise; that it went well is looked at in the end
    if (options.state === 'running' && options.qmp !== undefined) destination.run().catch(() => undefined)
    options.onRunning?.()
  }
  try {
    const report = await new PostcopySource(source, stream, { ...options, hostPageSizes, onRunning }).start()
    return await finish(destination, report, options)
  } catch (error) {
    // the monitor of a guest that waits for pages may not answer
    if (!(error instanceof RevertError) || error.recoverable) throw error
    throw new RevertError(error.phase, await destination.explained(error.cause))
  }
}

/** QEMU has everything: from here on nothing makes a revert fail. */
async function finish(destination: Destination, report: PostcopyReport, options: RevertOptions): Promise<RevertReport> {
  const state = await destination.settle(options.state, 'running')
  await destination.restore()
  return { ...report, mode: 'postcopy', state, warnings: destination.warnings }
}

async function sendEagerly(destination: Destination, source: PageSource, state: string, options: RevertOptions): Promise<EagerRevertReport> {
  const began = performance.now()
  const { signal, timeout, onProgress } = options
  await destination.setUp(source, { postcopy: false })
  if (state !== 'running' && runStateIn(source.devices) === undefined) await destination.hold()
  const stream = await destination.connect()
  const total = source.blocks.reduce((sum, { length }) => sum + length, 0)
  const onBytes = (sent: number): void => onProgress?.({ phase: 'loading', done: Math.min(sent, total), total })
  let bytes: number
  try {
    bytes = await sendWhole(source, stream, { signal, timeout, runState: state, onBytes })
    await destination.arrived()
  } catch (error) {
    signal?.throwIfAborted()
    throw await destination.explained(error)
  }
  const now = await destination.settle(options.state, state)
  await destination.restore()
  if (now === 'running') options.onRunning?.()
  onProgress?.({ phase: 'complete', done: total, total })
  return { bytes, took: performance.now() - began, state: now, warnings: destination.warnings }
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
