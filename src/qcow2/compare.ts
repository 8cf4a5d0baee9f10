/** Comparing the content of two disks: `qemu-img compare`. */
import type { BlockDevice, CallOptions, Extent } from '../block/device.ts'
import { AbortPoints } from '../core/abort-points.ts'

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
  const total = Math.max(a.size, b.size)
  if (strict && a.size !== b.size) return { equal: false, offset: Math.min(a.size, b.size), reason: 'size' }
  const [maps, bytes] = [[new Cursor(a, signal), new Cursor(b, signal)] as const, [new Uint8Array(pieceBytes), new Uint8Array(pieceBytes)] as const]
  const abortPoints = new AbortPoints(signal)
  for (let at = 0; at < total; ) {
    const turn = abortPoints.pass()
    if (turn !== undefined) await turn
    const [inA, inB] = [await maps[0].at(at), await maps[1].at(at)]
    const zero = inA.zero && inB.zero
    const length = Math.min(total - at, inA.end - at, inB.end - at, zero ? Infinity : pieceBytes)
    if (strict && inA.present !== inB.present && at < a.size) return { equal: false, offset: at, reason: 'allocation' }
    if (!zero) {
      const pieces = [bytes[0].subarray(0, length), bytes[1].subarray(0, length)] as const
      await Promise.all([read(a, at, pieces[0], inA.zero, signal), read(b, at, pieces[1], inB.zero, signal)])
      const difference = firstDifference(pieces[0], pieces[1])
      if (difference >= 0) return { equal: false, offset: at + difference, reason: 'content' }
    }
    at += length
    onProgress?.({ done: at, total })
  }
  return { equal: true, sizesDiffer: a.size !== b.size }
}

async function read(device: BlockDevice, at: number, target: Uint8Array, zero: boolean, signal: AbortSignal | undefined): Promise<void> {
  if (zero) target.fill(0)
  else await device.readInto(at, target, { signal })
}

/** Index of the first difference, -1 if there is none. Both begin at a word in memory. */
function firstDifference(a: Uint8Array, b: Uint8Array): number {
  const [wordsA, wordsB] = [new Int32Array(a.buffer, 0, a.length >>> 2), new Int32Array(b.buffer, 0, b.length >>> 2)]
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

/** The extents of a device, walked along as the offset grows. Past its end there are zeroes. */
class Cursor {
  readonly #size: number
  readonly #extents: AsyncIterator<Extent>
  #current: Extent | undefined

  constructor(device: BlockDevice, signal: AbortSignal | undefined) {
    this.#size = device.size
    this.#extents = device.map({ signal })[Symbol.asyncIterator]()
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
