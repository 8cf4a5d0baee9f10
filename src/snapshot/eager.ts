/**
 * A saved VM as an ordinary migration stream: for destinations that cannot take it by postcopy, and to
 * store it for QEMU's `loadvm`. Owns the order of the stream; pages come from a {@link PageSource}.
 */
import type { CallOptions } from '../block/device.ts'
import { Qcow2Error } from '../core/errors.ts'
import { RamPart, ramPartCapacity } from '../migration/ram-part.ts'
import { isZero } from '../bytes/zero.ts'
import { encodeRecord } from '../migration/writer.ts'
import type { DuplexStream } from '../qmp/duplex.ts'
import { dataRanges } from './data-ranges.ts'
import { refuseDirtyBitmaps, type PageSource, type SavedRamBlock } from './page-source.ts'
import { ramSection } from './ram-frame.ts'
import { withRunState } from './saved-state.ts'

/** Options of {@link migrationStream}. */
export interface MigrationStreamOptions extends CallOptions {
  /**
   * `drop` leaves pages of zeroes out, which suits a fresh VM (`-incoming`, `-loadvm`); `keep` sends them, which
   * `loadvm` in a running VM needs. Default `drop`.
   */
  readonly zeroPages?: 'keep' | 'drop' | undefined
  /** The run state that the stream tells instead of its own, as `query-status` names it: `running` or `paused`, say. */
  readonly runState?: string | undefined
}

/** Bytes of RAM in one PART section. */
const partSize = 1 << 20

/**
 * The bytes of the whole stream, in order. The chunks belong to the caller.
 * @throws UnsupportedError for a saved VM with dirty bitmaps: it would come back without them.
 */
export async function* migrationStream(
  source: PageSource,
  options: MigrationStreamOptions = {},
): AsyncGenerator<Uint8Array, void, undefined> {
  refuseDirtyBitmaps(source)
  yield source.head.slice()
  yield* ramSection(source, 'start')
  if (source.earlyDevices.length > 0) yield source.earlyDevices.slice()
  for (const block of source.blocks) yield* blockPages(source, block, options)
  yield* ramSection(source, 'end')
  const { runState } = options
  yield (runState === undefined ? source.devices : withRunState(source.devices, runState)).slice()
  yield encodeRecord({ kind: 'eof' })
  if (source.vmDescription.length > 0) yield source.vmDescription.slice()
}

/** Two reads in turn: one runs while the other's pages are sent. */
async function* blockPages(
  source: PageSource,
  block: SavedRamBlock,
  options: MigrationStreamOptions,
): AsyncGenerator<Uint8Array, void, undefined> {
  const keep = options.zeroPages === 'keep'
  const read = (offset: number, length: number): { offset: number; reading: Promise<Uint8Array> } => {
    const reading = block.content.read(offset, length, options)
    reading.catch(() => undefined) // reported where it is awaited
    return { offset, reading }
  }
  let ahead: { offset: number; reading: Promise<Uint8Array> } | undefined
  for await (const range of keep ? everything(block) : dataRanges(block.content, source.pageSize, partSize, options.signal)) {
    const next = read(range.offset, range.length)
    if (ahead !== undefined) yield* encodePages(source, block, ahead.offset, await ahead.reading, keep)
    ahead = next
  }
  if (ahead !== undefined) yield* encodePages(source, block, ahead.offset, await ahead.reading, keep)
}

function* everything(block: SavedRamBlock): Generator<{ offset: number; length: number }, void, undefined> {
  for (let offset = 0; offset < block.length; offset += partSize) {
    yield { offset, length: Math.min(partSize, block.length - offset) }
  }
}

function* encodePages(
  { pageSize, ramSectionId: sectionId, footers }: PageSource,
  block: SavedRamBlock,
  offset: number,
  bytes: Uint8Array,
  keep: boolean,
): Generator<Uint8Array, void, undefined> {
  const part = new RamPart(new Uint8Array(ramPartCapacity(bytes.length / pageSize, pageSize)), { pageSize, sectionId, footers })
  part.begin(block.name)
  for (let at = 0; at < bytes.length; at += pageSize) {
    if (!isZero(bytes, at, pageSize)) part.page(offset + at, bytes, at)
    else if (keep) part.zero(offset + at)
  }
  if (!part.empty) yield part.finish()
}

/**
 * Sends a saved VM over a connection and waits until the destination has closed it, which it does when it has loaded
 * everything, and when it has failed. Gives the bytes sent.
 * @throws Qcow2Error `ERR_STREAM` if the destination goes away before
 */
export async function sendWhole(
  source: PageSource,
  stream: DuplexStream,
  options: MigrationStreamOptions & { readonly timeout?: number | undefined; readonly onBytes?: (sent: number) => void },
): Promise<number> {
  let bytes = 0
  const closed = closing(stream)
  try {
    for await (const chunk of migrationStream(source, options)) {
      await written(stream, chunk, closed.failure)
      bytes += chunk.length
      options.onBytes?.(bytes)
    }
    stream.end()
    await closed.within(options.timeout ?? 30_000)
    return bytes
  } catch (error) {
    stream.destroy()
    throw error
  }
}

/** Resolves when the connection has taken the bytes. A stream that was destroyed calls nobody back: `failure` then rejects. */
function written(stream: DuplexStream, bytes: Uint8Array, failure: Promise<never>): Promise<void> {
  const taken = new Promise<void>((resolve, reject) => {
    stream.write(bytes, (error) => {
      if (error === undefined || error === null) resolve()
      else reject(new Qcow2Error('ERR_STREAM', `the destination went away: ${error.message}`, { cause: error }))
    })
  })
  return Promise.race([taken, failure])
}

/** Watches for the end of a connection; its reason counts only while something is still to be sent. */
function closing(stream: DuplexStream): { failure: Promise<never>; within: (timeout: number) => Promise<void> } {
  let reject!: (reason: unknown) => void
  const failure = new Promise<never>((_resolve, fail) => (reject = fail))
  failure.catch(() => undefined) // whoever writes hears of it
  const ended = new Promise<void>((resolve) => {
    stream.on('close', () => {
      reject(new Qcow2Error('ERR_STREAM', 'the destination closed the connection before it had everything'))
      resolve()
    })
  })
  stream.on('error', (cause: Error) => reject(new Qcow2Error('ERR_STREAM', `the destination went away: ${cause.message}`, { cause })))
  stream.resume()
  const within = async (timeout: number): Promise<void> => {
    let timer: ReturnType<typeof setTimeout> | undefined
    const late = new Promise<never>((_resolve, fail) => {
      const complaint = `the destination has everything, but does not close the connection: no sign of it in ${timeout} ms`
      timer = setTimeout(() => fail(new Qcow2Error('ERR_STREAM', complaint)), timeout)
    })
    await Promise.race([ended, late]).finally(() => clearTimeout(timer))
  }
  return { failure, within }
}
