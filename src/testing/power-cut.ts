/**
 * What a medium holds after a power cut. Owns the rules of a volatile write cache: what completed before a
 * flush was asked for is durable once the flush has completed; of everything later each sector may have
 * arrived or not, in any order.
 */
import type { RecordedChange, RecordedRequest, Recording } from '../block/record.ts'

/** The unit that a disk writes whole or not at all, in bytes. */
export const sectorSize = 512

/**
 * Decides over what is not yet durable: whether `sector` of a change (counted from its first; 0 for
 * a resize) has reached the medium.
 */
export type Survival = (request: RecordedRequest, sector: number) => boolean

/** Options of {@link powerCut}. */
export interface PowerCutOptions {
  /** Moment of the cut: events with a smaller number have happened. Default: after the last. */
  readonly at?: number | undefined
  /** Default: everything submitted has arrived. */
  readonly survives?: Survival | undefined
}

/**
 * The bytes of the medium after a power cut.
 * @param before the bytes when the recording began; they stay as they are
 */
export function powerCut(before: Uint8Array, recording: Recording, options: PowerCutOptions = {}): Uint8Array {
  const at = options.at ?? recording.events
  const survives = options.survives ?? (() => true)
  const durable = durableBefore(recording, at)
  const medium = new Medium(before)
  for (const request of recording.requests) {
    if (request.submitted >= at) break
    const isDurable = request.completed !== undefined && request.completed < durable
    medium.apply(request.change, (sector) => isDurable || survives(request, sector))
  }
  return medium.bytes
}

/** Changes that completed before this event are durable: the submission of the last flush that completed before `at`. */
function durableBefore(recording: Recording, at: number): number {
  let durable = 0
  for (const { change, submitted, completed } of recording.requests) {
    if (change.kind === 'flush' && completed !== undefined && completed < at) durable = Math.max(durable, submitted)
  }
  return durable
}

class Medium {
  #bytes: Uint8Array
  #size: number

  constructor(before: Uint8Array) {
    this.#bytes = before.slice()
    this.#size = before.length
  }

  get bytes(): Uint8Array {
    return this.#bytes.subarray(0, this.#size)
  }

  apply(change: RecordedChange, arrived: (sector: number) => boolean): void {
    switch (change.kind) {
      case 'flush':
        return
      case 'resize':
        if (arrived(0)) this.#resize(change.size)
        return
      case 'write':
        this.#sectors(change.offset, change.bytes.length, arrived, (from, to) => {
          this.#bytes.set(change.bytes.subarray(from - change.offset, to - change.offset), from)
        })
        return
      default:
        this.#sectors(change.offset, change.length, arrived, (from, to) => this.#bytes.fill(0, from, to))
    }
  }

  #sectors(offset: number, length: number, arrived: (sector: number) => boolean, put: (from: number, to: number) => void): void {
    const end = offset + length
    for (let from = offset, sector = 0; from < end; sector++) {
      const to = Math.min(end, from - (from % sectorSize) + sectorSize)
      if (arrived(sector)) {
        this.#resize(Math.max(this.#size, to))
        put(from, to)
      }
      from = to
    }
  }

  #resize(size: number): void {
    if (size < this.#size) this.#bytes.fill(0, size, this.#size)
    if (size > this.#bytes.length) {
      const grown = new Uint8Array(Math.max(size, this.#bytes.length * 2))
      grown.set(this.bytes)
      this.#bytes = grown
    }
    this.#size = size
  }
}
