/**
 * Converting where one side is a pipe: a raw disk that comes as a stream into an image, and an image
 * that goes out as a stream. Owns the order of the bytes; what is stored is decided as in any conversion.
 *
 * All of an image but its header can be written in one growing sequence. So a stream out takes two passes
 * over the source: the first finds out what the header will say, the second sends everything.
 */
import { BaseDevice, anyRequest, type BlockDevice, type BlockLimits } from '../block/device.ts'
import { equalBytes } from '../bytes/equal.ts'
import { withTarget, type Source } from '../block/source.ts'
import { Qcow2Error } from '../core/errors.ts'
import { refuseUnknownOptions } from '../core/options.ts'
import { allocatorFor } from './convert-lanes.ts'
import { streamPieces } from './convert-plan.ts'
import { conversionOptions, deviceContent, writeImage, type ConvertToQcow2Options, type ImageContent } from './convert.ts'
import { DataProgress } from './convert-progress.ts'

/** Options of {@link convertStreamToQcow2}. */
export interface ConvertStreamOptions extends Omit<ConvertToQcow2Options, 'onProgress'> {
  /** Called with the bytes of the disk that are stored; how many will come is not known. */
  readonly onProgress?: ((progress: { readonly done: number }) => void) | undefined
}

/**
 * Writes a raw disk that arrives as a stream into `target` as a new qcow2 image, in one pass. The whole content of a
 * device is replaced; a path names a file that does not exist yet, and is there only when all of the stream was stored. The disk has the size of the stream, rounded up to 512 bytes.
 * @throws what `convertToQcow2` throws, and what the stream does; TypeError for chunks of text. The stream is ended in any case.
 */
export async function convertStreamToQcow2(chunks: AsyncIterable<Uint8Array>, target: Source, options: ConvertStreamOptions = {}): Promise<void> {
  const { onProgress, ...shape } = options
  let end = 0
  const reading = { begun: false }
  const pieces: ImageContent['pieces'] = (_, pieceSize) => {
    reading.begun = true
    return streamPieces(chunks, pieceSize)
  }
  const onPiece: ImageContent['onPiece'] = ({ start, length }) => {
    end = Math.max(end, start + length)
    onProgress?.({ done: end })
  }
  try {
    refuseUnknownOptions('convertStreamToQcow2', options, conversionOptions)
    await withTarget(target, options, (host) =>
      writeImage(host, { ...shape, size: 0 }, { allocate: allocatorFor(host, host), source: undefined, pieces, onPiece, finalSize: () => end }),
    )
  } catch (error) {
    // a stream that nobody began to read would stay open
    if (!reading.begun) await giveUp(chunks)
    throw error
  }
}

/** Ends a stream that was not read: the `return` of an iterator that was not begun does not end Node's. */
async function giveUp(chunks: AsyncIterable<Uint8Array> & { destroy?: () => unknown; cancel?: () => Promise<void> }): Promise<void> {
  if (typeof chunks.destroy === 'function') chunks.destroy()
  else if (typeof chunks.cancel === 'function') await chunks.cancel().catch(() => undefined)
  else await chunks[Symbol.asyncIterator]().return?.()
}

/**
 * Sends the content of `source` as a new qcow2 image to `send`, from its first byte to its last, for pipes
 * and uploads. The source is read twice and must not change meanwhile; progress counts both times. The next
 * call of `send` follows when the last has resolved; the bytes belong to `send`.
 * @throws what `convertToQcow2` and `send` throw; Qcow2Error `ERR_BUSY` if the source changed between
 * the two passes: what was sent is not an image then.
 */
export async function convertToQcow2Stream(source: BlockDevice, send: (bytes: Uint8Array) => Promise<void>, options: ConvertToQcow2Options = {}): Promise<void> {
  refuseUnknownOptions('convertToQcow2Stream', options, conversionOptions)
  const { signal } = options
  const progress = new DataProgress(options.onProgress, 2)
  const pass = (target: BlockDevice): Promise<void> =>
    writeImage(target, { ...options, size: source.size, inOrder: true }, deviceContent(source, allocatorFor(source, source), options, progress))
  const dry = new DryRun()
  await pass(dry)
  signal?.throwIfAborted()
  await send(dry.header.slice())
  await pass(new InOrder(dry.header, send))
  progress.finish()
}

/** The first pass: takes everything and keeps the header. */
class DryRun extends BaseDevice {
  readonly readOnly = false
  readonly limits: BlockLimits = anyRequest
  header: Uint8Array = new Uint8Array(0)
  size = 0

  override get growable(): boolean {
    return true
  }

  protected onWrite(offset: number, bytes: Uint8Array): Promise<void> {
    if (offset === 0) this.header = bytes.slice()
    this.size = Math.max(this.size, offset + bytes.length)
    return done
  }

  protected onRead = unreadable
  protected onFlush = nothing
  protected onClose = nothing
}

interface Waiting {
  readonly bytes: Uint8Array
  readonly resolve: () => void
  readonly reject: (error: unknown) => void
}

/** The second pass: a write resolves when all bytes before it and its own are sent. The header is sent already. */
class InOrder extends BaseDevice {
  readonly readOnly = false
  readonly limits: BlockLimits = anyRequest
  readonly #header: Uint8Array
  readonly #send: (bytes: Uint8Array) => Promise<void>
  readonly #waiting = new Map<number, Waiting>()
  #sent: number
  #sending = false
  #failure: { readonly error: unknown } | undefined

  constructor(header: Uint8Array, send: (bytes: Uint8Array) => Promise<void>) {
    super()
    this.#header = header
    this.#send = send
    this.#sent = header.length
  }

  override get growable(): boolean {
    return true
  }

  /** Nothing of it can be replaced, so it begins empty; what is sent grows it. */
  get size(): number {
    return this.#sent === this.#header.length ? 0 : this.#sent
  }

  protected onWrite(offset: number, bytes: Uint8Array): Promise<void> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure.error)
    if (offset === 0) return this.#compareHeader(bytes)
    return new Promise((resolve, reject) => {
      this.#waiting.set(offset, { bytes, resolve, reject })
      void this.#sendNext()
    })
  }

  async #sendNext(): Promise<void> {
    if (this.#sending) return
    this.#sending = true
    try {
      for (let next; (next = this.#waiting.get(this.#sent)) !== undefined; ) {
        await this.#send(next.bytes.slice())
        this.#waiting.delete(this.#sent)
        this.#sent += next.bytes.length
        next.resolve()
      }
    } catch (error) {
      this.#failure = { error }
      for (const { reject } of this.#waiting.values()) reject(error)
      this.#waiting.clear()
    }
    this.#sending = false
  }

  #compareHeader(bytes: Uint8Array): Promise<void> {
    const same = bytes.length === this.#header.length && equalBytes(bytes, this.#header, 0, bytes.length)
    if (same) return done
    return Promise.reject(new Qcow2Error('ERR_BUSY', 'the source changed while it was read; what was sent is not a whole image'))
  }

  protected onRead = unreadable
  protected onFlush = nothing
  protected onClose = nothing
}

const done: Promise<void> = Promise.resolve()
const nothing = (): Promise<void> => done
const unreadable = (): Promise<void> => Promise.reject(new Qcow2Error('ERR_UNSUPPORTED', 'what was sent cannot be read'))
