/**
 * SIGUSR1 asks how far the work is, as it asks qemu-img. Owns that the signal is taken before everything else is loaded: until
 * somebody listens, Node answers it by opening its debugger on a port.
 */
import process from 'node:process'

let listener: (() => void) | undefined

/** Takes the signals from now on. A call, because bundlers leave out modules that are imported for their effect alone. */
export function hearQueries(): void {
  // the BSDs send SIGINFO when Ctrl-T is pressed
  for (const name of ['SIGUSR1', 'SIGINFO']) process.on(name, () => listener?.())
}

/** `tell` is called from now on, in place of the one before. */
export function onQuery(tell: () => void): void {
  listener = tell
}
