/**
 * How far a conversion is. Owns what counts: the bytes that are read, so that holes, however large, neither
 * slow the count down nor make it leap.
 */
import type { BlockDevice } from '../block/device.ts'
import { convertPieces, type ConvertPiece, type PlanOptions } from './convert-plan.ts'

/** How far a conversion is. */
export interface ConvertProgress {
  /** Bytes of data that are copied; what is known to be zero does not count. */
  readonly done: number
  /** Bytes of data the source holds. */
  readonly total: number
}

/** What wants to know. */
type ProgressListener = ((progress: ConvertProgress) => void) | undefined

/** Bytes between two calls of a listener. */
const step = 1 << 20

/** Counts the data of a source before it is copied, and while it is. */
export class DataProgress {
  readonly #tell: ProgressListener
  readonly #passes: number
  #counted = false
  #total = 0
  #done = 0
  #told = 0

  /** `passes`: how often the source is read. */
  constructor(tell: ProgressListener, passes = 1) {
    this.#tell = tell
    this.#passes = passes
  }

  /** Adds up what a pass will copy, once; nothing if nobody listens. */
  async count(pieces: () => AsyncIterable<ConvertPiece>): Promise<void> {
    if (this.#tell === undefined || this.#counted) return
    this.#counted = true
    for await (const { zero, length } of pieces()) if (!zero) this.#total += length * this.#passes
  }

  /** A piece is copied. */
  add({ zero, length }: ConvertPiece): void {
    if (zero) return
    this.#done += length
    if (this.#done - this.#told < step) return
    this.#told = this.#done - (this.#done % step)
    this.#tell?.({ done: this.#done, total: this.#total })
  }

  /** All is copied, if there was any. */
  finish(): void {
    if (this.#total > 0) this.#tell?.({ done: this.#total, total: this.#total })
  }
}

/** The pieces of a source, after those that count for the progress were counted. */
export async function* countedPieces(source: BlockDevice, options: PlanOptions, progress: DataProgress): AsyncGenerator<ConvertPiece, void, undefined> {
  await progress.count(() => convertPieces(source, options))
  yield* convertPieces(source, options)
}
