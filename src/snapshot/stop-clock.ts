/** How long a save makes the guest stand still, by the timestamps of QEMU's events. */
import type { Qmp } from '../qmp/client.ts'

/** Adds up the times between STOP and RESUME. */
export class StopClock {
  readonly #events: ReturnType<Qmp['events']>
  readonly #collecting: Promise<void>
  #stopped: number | undefined
  #total = 0
  #wake: (() => void) | undefined

  constructor(qmp: Qmp) {
    this.#events = qmp.events('STOP', 'RESUME')
    this.#collecting = this.#collect().catch(() => undefined)
  }

  /** Milliseconds so far; waits a moment for a RESUME that is still under way. */
  async stoppedFor(running: boolean): Promise<number> {
    if (!running) return 0
    if (this.#stopped !== undefined) await Promise.race([new Promise((wake) => setTimeout(wake, 1000)), new Promise<void>((wake) => (this.#wake = wake))])
    return this.#total
  }

  async close(): Promise<void> {
    await this.#events.return?.()
    await this.#collecting
  }

  async #collect(): Promise<void> {
    for await (const { event, timestamp } of this.#events) {
      const at = (timestamp?.seconds ?? 0) * 1000 + (timestamp?.microseconds ?? 0) / 1000
      if (event === 'STOP') {
        this.#stopped ??= at
      } else if (this.#stopped !== undefined) {
        this.#total += at - this.#stopped
        this.#stopped = undefined
        this.#wake?.()
      }
    }
  }
}
