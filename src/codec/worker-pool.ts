/**
 * Compression of many clusters on all cores. Owns the worker threads, the memory
 * they share and the splitting of a batch among them; knows nothing of qcow2 tables.
 *
 * The workers run from source text that needs only `node:zlib`, so that ESM and CommonJS builds,
 * bundlers and a run from source all work alike.
 */
import { availableParallelism, cpus } from 'node:os'
import { Worker } from 'node:worker_threads'
import { Qcow2Error } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import { canCompressZstd, noZstd } from './zstd.ts'
import type { CompressionType } from './cluster-codec.ts'

/** Options of {@link CodecPool}. */
export interface CodecPoolOptions {
  /** Bytes of each cluster. */
  readonly clusterSize: number
  readonly type: CompressionType
  /** Worker threads; default the number of cores. */
  readonly workers?: number | undefined
}

/** The result of {@link CodecPool.compress}. */
export interface CompressedClusters {
  /** The compressed clusters, one directly behind the other. Valid until `release` is called. */
  readonly bytes: Uint8Array
  /** Length of each in `bytes`; 0 for a cluster that would not shrink, of which nothing is in `bytes`. */
  readonly lengths: Uint32Array
  /** Gives the memory behind `bytes` back to the pool. */
  readonly release: () => void
}

/** Bytes one batch aims at: large enough to hide the message, small enough to keep all workers busy and memory low. */
export const batchBytes: number = 1 << 18

const source = `
const { parentPort, workerData } = require('node:worker_threads')
const zlib = require('node:zlib')
const { clusterSize, type } = workerData
const deflate = { windowBits: 12, memLevel: 9, chunkSize: clusterSize + 128 }
const zstd = { pledgedSrcSize: clusterSize }
const compress = (bytes) => (type === 'zlib' ? zlib.deflateRawSync(bytes, deflate) : zlib.zstdCompressSync(bytes, zstd))
parentPort.on('message', ({ memory, count }) => {
  try {
    const input = new Uint8Array(memory)
    const output = new Uint8Array(memory, memory.byteLength / 2)
    const lengths = new Uint32Array(count)
    let at = 0
    for (let i = 0; i < count; i++) {
      const compressed = compress(input.subarray(i * clusterSize, (i + 1) * clusterSize))
      if (compressed.length >= clusterSize) continue
      output.set(compressed, at)
      at += compressed.length
      lengths[i] = compressed.length
    }
    parentPort.postMessage({ lengths, length: at })
  } catch (error) {
    parentPort.postMessage({ error })
  }
})
`

type Reply = { readonly lengths: Uint32Array; readonly length: number } | { readonly error: Error }

interface Pending {
  resolve(reply: Reply): void
  reject(error: unknown): void
}

/** One thread. It answers its batches in the order they were posted. */
class CodecThread {
  readonly #worker: Worker
  readonly #pending: Pending[] = []
  #failure: Error | undefined

  constructor({ clusterSize, type }: CodecPoolOptions) {
    this.#worker = new Worker(source, { eval: true, name: 'qcow2 codec', execArgv: [], workerData: { clusterSize, type } })
    this.#worker.unref()
    this.#worker.on('message', (reply: Reply) => this.#settle()?.resolve(reply))
    this.#worker.on('error', (error) => this.#fail(codecError(error instanceof Error ? error.message : String(error), error)))
    this.#worker.on('exit', (code) => this.#fail(codecError(`its exit code is ${code}`)))
  }

  compress(memory: SharedArrayBuffer, count: number): Promise<Reply> {
    return new Promise<Reply>((resolve, reject) => {
      if (this.#failure !== undefined) {
        reject(this.#failure)
        return
      }
      this.#pending.push({ resolve, reject })
      this.#worker.ref()
      this.#worker.postMessage({ memory, count })
    })
  }

  async terminate(): Promise<void> {
    await this.#worker.terminate()
  }

  #settle(): Pending | undefined {
    const pending = this.#pending.shift()
    if (this.#pending.length === 0) this.#worker.unref()
    return pending
  }

  #fail(error: Error): void {
    this.#failure ??= error
    for (const pending of this.#pending.splice(0)) pending.reject(this.#failure)
  }
}

function codecError(why: string, cause?: unknown): Qcow2Error {
  return new Qcow2Error('ERR_IO', `a codec thread ended: ${why}`, cause === undefined ? undefined : { cause })
}

/** Memory for one batch: the clusters, then what they compress to. Bound to one thread. */
interface Slot {
  readonly thread: CodecThread
  readonly memory: SharedArrayBuffer
}

/**
 * Compresses clusters on worker threads. Threads start with the first batch and never keep the
 * process alive by themselves; `close` ends them.
 *
 * @example
 * await using pool = new CodecPool({ clusterSize: 65536, type: 'zlib' })
 * const { bytes, lengths, release } = await pool.compress(sixteenClusters)
 */
export class CodecPool extends Resource {
  /** Clusters that {@link compress} takes at most. */
  readonly batchClusters: number
  /** Batches worth having in flight: one in work and one waiting for each thread. */
  readonly depth: number
  readonly #workers: number
  readonly #options: CodecPoolOptions
  readonly #threads: CodecThread[] = []
  #slots = 0
  readonly #idle: Slot[] = []
  readonly #waiting: { resolve(slot: Slot): void; reject(error: unknown): void }[] = []

  /** @throws UnsupportedError for zstd on a Node without it. */
  constructor(options: CodecPoolOptions) {
    super()
    if (options.type === 'zstd' && !canCompressZstd) throw noZstd()
    this.#options = options
    this.#workers = options.workers ?? coreCount()
    if (!Number.isInteger(this.#workers) || this.#workers < 1) {
      throw new RangeError(`workers must be a positive integer, not ${this.#workers}`)
    }
    this.depth = 2 * this.#workers
    this.batchClusters = Math.max(1, Math.floor(batchBytes / options.clusterSize))
  }

  /**
   * Compresses up to {@link batchClusters} clusters on one thread. Call it concurrently to use the
   * others; calls beyond {@link depth} wait until the result of an earlier one is released.
   */
  async compress(clusters: Uint8Array): Promise<CompressedClusters> {
    this.assertOpen()
    const count = clusters.length / this.#options.clusterSize
    if (!Number.isInteger(count) || count < 1 || count > this.batchClusters) {
      throw new RangeError(`a batch is 1 to ${this.batchClusters} whole clusters, not ${clusters.length} bytes`)
    }
    const slot = await this.#take()
    try {
      new Uint8Array(slot.memory).set(clusters)
      const reply = await slot.thread.compress(slot.memory, count)
      if ('error' in reply) throw reply.error
      const bytes = new Uint8Array(slot.memory, slot.memory.byteLength / 2, reply.length)
      return { bytes, lengths: reply.lengths, release: once(() => this.#give(slot)) }
    } catch (error) {
      this.#give(slot)
      throw error
    }
  }

  protected override async onClose(): Promise<void> {
    for (const waiting of this.#waiting.splice(0)) waiting.reject(new Qcow2Error('ERR_CLOSED', 'CodecPool is closed'))
    await Promise.all(this.#threads.map((thread) => thread.terminate()))
  }

  #take(): Promise<Slot> | Slot {
    const idle = this.#idle.shift()
    if (idle !== undefined) return idle
    if (this.#slots === this.depth) return new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }))
    const thread = (this.#threads[this.#slots % this.#workers] ??= new CodecThread(this.#options))
    this.#slots++
    return { thread, memory: new SharedArrayBuffer(2 * this.batchClusters * this.#options.clusterSize) }
  }

  #give(slot: Slot): void {
    const next = this.#waiting.shift()
    if (next === undefined) this.#idle.push(slot)
    else next.resolve(slot)
  }
}

function coreCount(): number {
  // availableParallelism is newer than Node 20.0's types promise; both count what this process may use
  return Math.max(1, typeof availableParallelism === 'function' ? availableParallelism() : cpus().length)
}

function once(action: () => void): () => void {
  let called = false
  return () => {
    if (called) return
    called = true
    action()
  }
}
