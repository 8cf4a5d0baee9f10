/**
 * How far to read ahead: pure policies, apart from the reading. A rotational disk wants one or two
 * requests at a time in sequence; a solid-state disk can serve more at once.
 */

/** What a policy decides on. */
export interface WindowState {
  /** Chunks consumed one after another since the start or the last seek. */
  readonly sequential: number
  /** Chunks beyond the current one that are buffered or being read. */
  readonly ahead: number
  /** Reads in flight, the current chunk's included. */
  readonly inFlight: number
}

/** How many more chunks to request now. Asked when a read completes and when a chunk is freed. */
export type WindowPolicy = (state: WindowState) => number

/**
 * Always `window` chunks ahead, with at most `depth` reads in flight: for a stream that is sure to be
 * read to its end.
 */
export function fixedWindow(window: number, depth: number = window): WindowPolicy {
  return ({ ahead, inFlight }) => Math.min(window - ahead, depth - inFlight)
}

/**
 * Nothing ahead at first, then 1, 2, 4 … up to `window` chunks as reading goes on in sequence: for reads
 * that may turn out to be random.
 */
export function growingWindow(window: number, depth: number = window): WindowPolicy {
  return ({ sequential, ahead, inFlight }) => {
    const target = sequential === 0 ? 0 : Math.min(window, 2 ** Math.min(30, sequential - 1))
    return Math.min(target - ahead, depth - inFlight)
  }
}
