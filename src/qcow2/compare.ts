/** Comparing the content of two disks: `qemu-img compare`. */
import type { BlockDevice, CallOptions, Extent } from '../block/device.ts'
import { pad } from '../block/pad.ts'
import { AbortPoints } from '../core/abort-points.ts'
import { allocatorFor } from './convert-lanes.ts'

/** Options of {@link compareDevices}. */
export interface CompareOptions extends CallOptions {
  /** Also a different size, or space allocated in only one of them, is a difference. Default false. */
  readonly strict?: boolean | undefined
  /** Bytes done, of how many. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined
}

/** The result of {@link compareDevices}. */
export type Comparison =
  | { readonly equal: true; /** One disk is longer; what it has more is zeroes. */ readonly sizesDiffer: boolean }
  | { readonly equal: false; /** First byte that differs. */ readonly offset: number; readonly reason: 'content' | 'size' | 'allocation' }

const pieceBytes = 1 << 20

/**
 * Compares what two disks read as. What the longer one has more must be zeroes. Where both are known to
 * be zeroes nothing is read.
 */
export async function compareDevices(a: BlockDevice, b: BlockDevice, options: CompareOptions = {}): Promise<Comparison> {
  const { strict = false, signal, onProgress } = options
  const [sizeA, sizeB] = [a.size, b.size]
  const total = Math.max(sizeA, sizeB)
  if (strict && sizeA !== sizeB) return { equal: false, offset: Math.min(sizeA, sizeB), reason: 'size' }
  const allocate = allocatorFor(a, b)
  const [left, right] = [new Side(a, sizeA, allocate(pieceBytes), signal), new Side(b, sizeB, allocate(pieceBytes), signal)]
  const abortPoints = new AbortPoints(signal)
  for (let at = 0; at < total; ) {
    const turn = abortPoints.pass()
    if (turn !== undefined) await turn
    const [inA, inB] = [await left.at(at), await right.at(at)]
    const zero = inA.zero && inB.zero
    const length = Math.min(total - at, inA.end - at, inB.end - at, zero ? Infinity : pieceBytes)
    if (strict && inA.present !== inB.present && at < sizeA) return { equal: false, offset: at, reason: 'allocation' }
    if (!zero) {
      const pieces = await Promise.all([left.read(at, length, inA.zero), right.read(at, length, inB.zero)])
      const difference = firstDifference(...pieces)
      if (difference >= 0) return { equal: false, offset: at + difference, reason: 'content' }
    }
    at += length
    onProgress?.({ done: at, total })
  }
  return { equal: true, sizesDiffer: sizeA !== sizeB }
}

/** Index of the first difference, -1 if there is none. Both begin at a word in memory. */
function firstDifference(a: Uint8Array, b: Uint8Array): number {
  const [wordsA, wordsB] = [new Int32Array(a.buffer, a.byteOffset, a.length >>> 2), new Int32Array(b.buffer, b.byteOffset, b.length >>> 2)]
  let word = 0
  while (word < wordsA.length && wordsA[word] === wordsB[word]) word++
  for (let i = word * 4; i < a.length; i++) if (a[i] !== b[i]) return i
  return -1
}

interface Place {
  /** Offset behind the extent. */
  readonly end: number
  readonly zero: boolean
  readonly present: boolean
}

/** One of the two: its extents, walked along as the offset grows, and its bytes. Past its end there are zeroes. */
class Side {
  readonly #device: BlockDevice
  readonly #size: number
  readonly #bytes: Uint8Array
  readonly #signal: AbortSignal | undefined
  readonly #extents: AsyncIterator<Extent>
  #current: Extent | undefined

  constructor(device: BlockDevice, size: number, bytes: Uint8Array, signal: AbortSignal | undefined) {
    this.#device = pad(device)
    this.#size = size
    this.#bytes = bytes
    this.#signal = signal
    this.#extents = device.map({ length: size, signal })[Symbol.asyncIterator]()
  }

  /** The bytes at an offset. They last until the next call. */
  async read(offset: number, length: number, zero: boolean): Promise<Uint8Array> {
    const bytes = this.#bytes.subarray(0, length)
    if (zero) bytes.fill(0)
    else await this.#device.readInto(offset, bytes, { signal: this.#signal })
    return bytes
  }

  async at(offset: number): Promise<Place> {
    if (offset >= this.#size) return { end: Number.MAX_SAFE_INTEGER, zero: true, present: false }
    while (this.#current === undefined || this.#current.start + this.#current.length <= offset) {
      const next = await this.#extents.next()
      if (next.done === true) return { end: this.#size, zero: false, present: true }
      this.#current = next.value
    }
    const { start, length, zero, present } = this.#current
    return { end: start + length, zero, present }
  }
}
