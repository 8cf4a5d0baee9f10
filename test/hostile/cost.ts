/** What an operation on hostile bytes may cost, measured so that other load on the machine does not count: CPU, memory, turns of the event loop, and the kind of its error. */
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { Qcow2Error } from '../../src/core/errors.ts'

/** The bounds; `turn` is CPU between two turns of the event loop, with what the collector of garbage takes. */
export const bounds = { cpuSeconds: 2, turnSeconds: 0.75, memory: 150 << 20 } as const

/** Runs with the signal that ends it; it may go on for this long. */
export type Operation = (signal: AbortSignal) => Promise<unknown>

export type Outcome = 'result' | 'refused' | 'aborted'

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

function memoryInUse(): number {
  const { heapUsed, arrayBuffers } = process.memoryUsage()
  return heapUsed + arrayBuffers
}

function cpuSeconds(): number {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1e6
}

/**
 * Runs an operation within the bounds. An operation that takes long is aborted after 1.5 s: what it was asked for may be
 * much, but it has to hear that.
 * @throws Error that says which bound it broke, or the error that is none of the library's
 */
export async function withinBounds(operation: Operation): Promise<Outcome> {
  const abort = new AbortController()
  const reason = new Error('long enough')
  const start = cpuSeconds()
  const memory = memoryInUse()
  let [turned, longest, peak] = [start, 0, 0]
  const look = (): void => {
    const now = cpuSeconds()
    longest = Math.max(longest, now - turned)
    turned = now
    if (now - start > 1.5) abort.abort(reason)
    if (memoryInUse() - memory - peak > bounds.memory) {
      collect()
      turned = cpuSeconds()
      peak = Math.max(peak, memoryInUse() - memory)
    }
  }
  const timer = setInterval(look, 5)
  let outcome: Outcome = 'result'
  try {
    await operation(abort.signal)
  } catch (error) {
    if (error === reason) outcome = 'aborted'
    else if (Qcow2Error.is(error)) outcome = 'refused'
    else throw error
  } finally {
    clearInterval(timer)
  }
  look()
  const cpu = cpuSeconds() - start
  if (peak > bounds.memory) throw new Error(`takes ${Math.round(peak / 2 ** 20)} MiB`)
  if (longest > bounds.turnSeconds) throw new Error(`the event loop does not turn for ${longest.toFixed(2)} s of CPU`)
  if (cpu > bounds.cpuSeconds) throw new Error(`takes ${cpu.toFixed(2)} s of CPU${outcome === 'aborted' ? ', and hears its signal late' : ''}`)
  return outcome
}
