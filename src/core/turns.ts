/** Lets the event loop turn in long work that never waits: timers, signals and other requests get their chance. */

/** Milliseconds of work between two turns. */
const slice = 20

/** Gives what long work awaits now and then: it resolves at once, or after a turn of the event loop if the last was a while ago. */
export function turns(): () => Promise<void> | undefined {
  let last = performance.now()
  return () => {
    if (performance.now() - last < slice) return undefined
    return new Promise((resolve) => {
      setTimeout(() => {
        last = performance.now()
        resolve()
      }, 0)
    })
  }
}
