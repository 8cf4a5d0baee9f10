/**
 * Locks for one event loop: they order asynchronous work, not threads. Waiters are served first
 * come, first served.
 */

/** Ends the hold it stands for. Calling it again does nothing. */
export type Release = () => void

/** One holder at a time. */
export class Mutex {
  #tail: Promise<void> = Promise.resolve()

  /** Resolves when the lock is held. */
  acquire(): Promise<Release> {
    const before = this.#tail
    let release!: Release
    this.#tail = new Promise((resolve) => {
      release = resolve
    })
    return before.then(() => release)
  }

  /** Runs `task` while holding the lock. */
  async run<T>(task: () => Promise<T>): Promise<T> {
    const release = await this.acquire()
    try {
      return await task()
    } finally {
      release()
    }
  }
}

/** Who else may hold a part of the range: nobody, or others that hold it shared. */
export type Hold = 'alone' | 'shared'

interface Range {
  readonly start: number
  readonly end: number
  readonly hold: Hold
  readonly done: Promise<void>
}

/** Locks half-open ranges `[start, end)`; only overlapping ranges wait for each other, those held shared do not. */
export class RangeLock {
  readonly #held = new Set<Range>()

  /** The lock without waiting, or `undefined` if any part of the range is held. */
  tryAcquire(start: number, end: number, hold: Hold = 'alone'): Release | undefined {
    for (const range of this.#held) {
      if (conflicts(range, start, end, hold)) return undefined
    }
    return this.#hold(start, end, hold).release
  }

  /** Resolves when no earlier holder overlaps the range. */
  async acquire(start: number, end: number, hold: Hold = 'alone'): Promise<Release> {
    const before: Promise<void>[] = []
    for (const range of this.#held) {
      if (conflicts(range, start, end, hold)) before.push(range.done)
    }
    const { release } = this.#hold(start, end, hold)
    if (before.length > 0) await Promise.all(before)
    return release
  }

  #hold(start: number, end: number, hold: Hold): { release: Release } {
    let resolve!: Release
    const done = new Promise<void>((settle) => {
      resolve = settle
    })
    const range = { start, end, hold, done }
    this.#held.add(range)
    return {
      release: () => {
        this.#held.delete(range)
        resolve()
      },
    }
  }
}

function conflicts(range: Range, start: number, end: number, hold: Hold): boolean {
  return range.start < end && start < range.end && (hold === 'alone' || range.hold === 'alone')
}
