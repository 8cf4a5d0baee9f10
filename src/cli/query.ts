/**
 * SIGUSR1 asks how far the work is, as it asks qemu-img. Imported before everything else: until somebody listens, Node
 * answers the signal by opening its debugger on a port.
 */
import process from 'node:process'

let listener: (() => void) | undefined

// the BSDs send SIGINFO when Ctrl-T is pressed
for (const name of ['SIGUSR1', 'SIGINFO']) process.on(name, () => listener?.())

/** `tell` is called from now on, in place of the one before. */
export function onQuery(tell: () => void): void {
  listener = tell
}
