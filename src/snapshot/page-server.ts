/**
 * Gives a destination its pages: those the guest waits for before everything else, the rest in the
 * background. Owns who goes first and that no page goes twice; knows nothing of the conversation around
 * the pages.
 */
import { allocateAligned } from '../block/slab.ts'
import { Qcow2Error } from '../core/errors.ts'
import { RamPart, ramPartCapacity } from '../migration/ram-part.ts'
import type { DuplexStream } from '../qmp/duplex.ts'
import { BlockProgress, type Claim } from './block-progress.ts'
import { dataRanges, type DataRange } from './data-ranges.ts'
import { FaultRecorder, faultsOf, fittingOrder, type FaultOrder } from './fault-order.ts'
import { FaultQueue, type Fault } from './fault-queue.ts'
import type { PageSource } from './page-source.ts'
import { SendWindow } from './send-window.ts'

/** Bytes of one background read. */
const readSize = 512 << 10
/** The same while the guest asks for pages: what it asks for waits for the disk to end one. */
const shortReadSize = 128 << 10

/** How pages are sent. */
export interface PageServerOptions {
  /** Bytes read and sent around a fault, a power of two; default 64 KiB. */
  readonly clusterSize?: number | undefined
  /**
   * Bytes of background data that may be under way while the guest asks for pages; default 128 KiB. When it has not asked
   * for 20 ms, eight times as much.
   */
  readonly window?: number | undefined
  /** Host page sizes of RAM blocks at the destination where they are not the target's, for example 2 MiB. */
  readonly hostPageSizes?: Readonly<Record<string, number>> | undefined
  /** Faults of an earlier revert of the same state: their clusters are sent first. */
  readonly faultOrder?: FaultOrder | undefined
}

/** Counts of what was asked and sent. */
export interface PageServerReport {
  /** Requests of the guest, repeats included. */
  readonly requests: number
  /** Pages sent with content. */
  readonly pages: number
  /** Milliseconds from each request's arrival until its pages were handed to the connection. */
  readonly latencies: readonly number[]
  /** What the guest asked for, in order, behind the order that was given. */
  readonly faultOrder: FaultOrder
}

/** Serves the pages of one saved VM to one connection. */
export class PageServer {
  readonly #source: PageSource
  readonly #stream: DuplexStream
  readonly #blocks = new Map<string, BlockProgress>()
  readonly #window: SendWindow
  /** What of the order given is of use. */
  readonly #order: FaultOrder | undefined
  readonly #faults: FaultRecorder
  readonly #onError: (error: unknown) => void
  readonly #queue: FaultQueue
  readonly #latencies: number[] = []
  readonly #spare: Spare[] = []
  #requests = 0
  #pages = 0
  #failure: unknown

  /** `onError` hears of a request that cannot be served; nothing more is sent then. */
  constructor(source: PageSource, stream: DuplexStream, options: PageServerOptions, onError: (error: unknown) => void) {
    this.#source = source
    this.#stream = stream
    this.#onError = onError
    this.#order = options.faultOrder === undefined ? undefined : fittingOrder(options.faultOrder, source.pageSize, source.blocks)
    const clusterSize = options.clusterSize ?? this.#order?.clusterSize ?? Math.max(65_536, source.pageSize)
    if (Math.log2(clusterSize) % 1 !== 0 || clusterSize < source.pageSize) {
      throw new RangeError(`clusterSize must be a power of two of at least ${source.pageSize}, not ${clusterSize}`)
    }
    for (const block of source.blocks) {
      const hostPageSize = options.hostPageSizes?.[block.name] ?? source.pageSize
      if (Math.log2(hostPageSize) % 1 !== 0 || hostPageSize < source.pageSize || block.length % hostPageSize !== 0) {
        throw new RangeError(`host page size ${hostPageSize} does not fit RAM block ${block.name} of ${block.length} bytes`)
      }
      this.#blocks.set(block.name, new BlockProgress(block, source.pageSize, hostPageSize, clusterSize))
    }
    this.#faults = new FaultRecorder(clusterSize, this.#order)
    this.#window = new SendWindow(options.window ?? 131_072)
    this.#queue = new FaultQueue((fault) => this.#serve(fault), onError)
  }

  get report(): PageServerReport {
    const { order: faultOrder } = this.#faults
    return { requests: this.#requests, pages: this.#pages, latencies: this.#latencies, faultOrder }
  }

  /** Marks pages the destination has already, as its bitmap tells. */
  received(block: string, bitmap: Uint8Array): void {
    this.#block(block).received(bitmap)
  }

  /** The guest waits for these bytes: they go out as soon as they are read, with the cluster around them. */
  request(block: string, offset: number, length: number): void {
    const arrived = performance.now()
    this.#requests++
    this.#window.requested()
    try {
      const progress = this.#block(block)
      checkRequest(progress, offset, length)
      this.#faults.add(block, offset)
      const cluster = offset - (offset % progress.clusterSize)
      this.#queue.add(`${block}:${cluster}`, { block, offset, length, arrived })
    } catch (error) {
      this.#onError(error)
    }
  }

  /** The destination answered a PING. */
  pong(value: number): void {
    this.#window.pong(value)
  }

  /** Stops: nothing is sent any more, {@link fill} rejects with `reason`. */
  fail(reason: unknown): void {
    this.#failure ??= reason
    this.#window.fail(reason)
    this.#queue.fail(reason)
  }

  /**
   * Sends everything that is not known to be zero: the recorded faults first, then block by block.
   * Resolves when every such page has been handed to the connection. `onProgress` gets the bytes passed.
   */
  async fill(onProgress?: (filled: number) => void): Promise<void> {
    if (this.#order !== undefined) await this.#fillFaults(this.#order)
    let filled = 0
    for (const progress of this.#blocks.values()) {
      await this.#fillBlock(progress, (within) => onProgress?.(filled + within))
      filled += progress.block.length
    }
    for (const progress of this.#blocks.values()) await this.#assertFilled(progress)
  }

  /** Resolves when no request is being served: the connection has taken everything asked for so far. */
  quiet(): Promise<void> {
    return this.#queue.idle()
  }

  async #serve({ block, offset, length, arrived }: Fault): Promise<void> {
    const progress = this.#block(block)
    const claim = progress.claimFault(offset, length)
    if (claim === undefined) return
    const spare = this.#take(claim.length)
    const bytes = spare.bytes.subarray(0, claim.length)
    await progress.block.content.readInto(claim.offset, bytes)
    if (this.#failure !== undefined) return
    spare.part.begin(block)
    this.#pages += progress.write(spare.part, claim, bytes)
    const taken = this.#send(spare)
    this.#latencies.push(performance.now() - arrived)
    await taken
  }

  /** What was asked for last time, in the same order, clusters whole: the guest will touch them again. */
  async #fillFaults(order: FaultOrder): Promise<void> {
    const ahead: { progress: BlockProgress; claim: Claim; reading: Promise<Spare> }[] = []
    const sendFirst = async (): Promise<void> => {
      const { progress, claim, reading } = ahead.shift()!
      const spare = await reading
      await this.#turn(claim.length)
      spare.part.begin(progress.block.name)
      this.#pages += progress.write(spare.part, claim, spare.bytes)
      void this.#send(spare, this.#window.sent(claim.length))
    }
    for (const { block, offset } of faultsOf(order)) {
      const progress = this.#blocks.get(block)
      if (progress === undefined) continue
      const claim = progress.claimCluster(offset)
      if (claim === undefined) continue
      const spare = this.#take(claim.length)
      const reading = progress.block.content.readInto(claim.offset, spare.bytes.subarray(0, claim.length)).then(() => spare)
      reading.catch(() => undefined) // reported where it is awaited
      ahead.push({ progress, claim, reading })
      if (ahead.length >= 4) await sendFirst()
    }
    while (ahead.length > 0) await sendFirst()
  }

  /** Two buffers in turn: one is read into while the other is sent. */
  async #fillBlock(progress: BlockProgress, onProgress: (within: number) => void): Promise<void> {
    const { content } = progress.block
    const buffers = [new Uint8Array(0), new Uint8Array(0)] as [Uint8Array, Uint8Array]
    const size = Math.max(readSize, progress.clusterSize)
    let turn = 0
    let sending: { range: DataRange; reading: Promise<Uint8Array> } | undefined
    for await (const range of dataRanges(content, progress.clusterSize, size)) {
      const end = range.offset + range.length
      for (let offset = range.offset, length: number; offset < end; offset += length) {
        length = Math.min(end - offset, this.#window.isQuiet ? size : Math.max(shortReadSize, progress.clusterSize))
        if (!progress.pending(offset, length)) continue
        if (buffers[turn]!.length < length) buffers[turn] = allocateAligned(size)
        const target = buffers[turn]!.subarray(0, length)
        const reading = content.readInto(offset, target).then(() => target)
        reading.catch(() => undefined) // reported where it is awaited
        if (sending !== undefined) await this.#fillRange(progress, sending.range, await sending.reading)
        sending = { range: { offset, length }, reading }
        turn = 1 - turn
        onProgress(offset)
      }
    }
    if (sending !== undefined) await this.#fillRange(progress, sending.range, await sending.reading)
  }

  async #fillRange(progress: BlockProgress, range: DataRange, bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < range.length; at += progress.clusterSize) {
      const length = Math.min(progress.clusterSize, range.length - at)
      if (!progress.pending(range.offset + at, length)) continue
      await this.#turn(length)
      const spare = this.#take(length)
      spare.part.begin(progress.block.name)
      this.#pages += progress.writePending(spare.part, range.offset + at, bytes.subarray(at, at + length))
      if (spare.part.empty) this.#spare.push(spare)
      else void this.#send(spare, this.#window.sent(length))
    }
  }

  /** Waits until background data may go: no request is being served, and the window has room. */
  async #turn(length: number): Promise<void> {
    await this.#window.room(length)
    await this.quiet()
  }

  /** A lost page would silently read as zeroes in the guest, so look again before the end is declared. */
  async #assertFilled(progress: BlockProgress): Promise<void> {
    for await (const { offset, length } of dataRanges(progress.block.content, progress.hostPageSize, 2 ** 40)) {
      if (!progress.pending(offset, length)) continue
      throw new Qcow2Error('ERR_STREAM', `pages of RAM block ${progress.block.name} in ${length} bytes at ${offset} were not sent; this is a bug`)
    }
  }

  /** Resolves when the connection has taken the section, and `behind`, which goes out with it. */
  #send(spare: Spare, behind?: Uint8Array): Promise<void> {
    const section = spare.part.finish()
    let bytes = section
    if (behind !== undefined) {
      spare.buffer.set(behind, section.length)
      bytes = spare.buffer.subarray(0, section.length + behind.length)
    }
    return new Promise((resolve) => {
      this.#stream.write(bytes, () => {
        this.#spare.push(spare)
        resolve()
      })
    })
  }

  #take(length: number): Spare {
    const index = this.#spare.findIndex((spare) => spare.bytes.length >= length)
    if (index >= 0) return this.#spare.splice(index, 1)[0]!
    return new Spare(length, this.#source)
  }

  #block(name: string): BlockProgress {
    const progress = this.#blocks.get(name)
    if (progress !== undefined) return progress
    const known = [...this.#blocks.keys()].join(', ')
    throw new Qcow2Error('ERR_STREAM', `the destination asks for RAM block ${name}, which the saved VM does not have (${known}): its machine is set up differently`)
  }
}

/** Memory to read pages into and to build their section in, used again and again. */
class Spare {
  readonly bytes: Uint8Array
  readonly buffer: Uint8Array
  readonly part: RamPart

  constructor(length: number, source: PageSource) {
    const { pageSize, ramSectionId: sectionId, footers } = source
    this.bytes = new Uint8Array(length)
    this.buffer = new Uint8Array(ramPartCapacity(length / pageSize, pageSize) + 16)
    this.part = new RamPart(this.buffer, { pageSize, sectionId, footers })
  }
}

function checkRequest(progress: BlockProgress, offset: number, length: number): void {
  const { name, length: size } = progress.block
  const unit = progress.hostPageSize
  if (length > 0 && offset % unit === 0 && length % unit === 0 && offset + length <= size) return
  throw new Qcow2Error(
    'ERR_STREAM',
    `the destination asks for ${length} bytes at offset ${offset} of RAM block ${name}: not whole pages of ${unit} bytes within ${size}; give hostPageSizes if its memory has larger pages`,
  )
}
