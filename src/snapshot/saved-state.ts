/**
 * The run state of a saved VM: what it was when it was saved, and how a stream tells the destination. Owns the form of the
 * `globalstate` section; knows nothing of who sends it.
 *
 * ```
 *  04 | section id u32 | 0b "globalstate" | instance u32 0 | version u32 1 |
 *  length of the name with its NUL u32 | the name, 32 bytes of zeroes and it | 68 bytes, of others' business
 * ```
 * A destination obeys it when an ordinary migration has ended: `running` runs, unless QEMU was started with `-S`; any other
 * state is taken as it is. A postcopy does not look at it: there the guest runs in any case.
 */
import { viewOf } from '../bytes/view.ts'

/** What a reverted VM does: what it did when it was `saved`; `running`: it runs; `paused`: it waits, if it did not anyway. */
export type RunStateChoice = 'saved' | 'running' | 'paused'

/** States that a QEMU which waits for a migration can take. Of the others it would end. */
const takenFromStream: ReadonlySet<string> = new Set([
  'running',
  'paused',
  'prelaunch',
  'io-error',
  'shutdown',
  'suspended',
  'watchdog',
  'guest-panicked',
  'internal-error',
])

const nameLength = 32
const head = Uint8Array.from([0x0b, ...new TextEncoder().encode('globalstate'), 0, 0, 0, 0, 0, 0, 0, 1])

/** The run state in device sections; undefined where they have none, as those of machine types before 2.4. */
export function runStateIn(devices: Uint8Array): string | undefined {
  const at = findName(devices)
  if (at === undefined) return undefined
  const end = devices.indexOf(0, at)
  return new TextDecoder().decode(devices.subarray(at, Math.min(end < 0 ? devices.length : end, at + nameLength)))
}

/** A copy of device sections that tell another run state; the same bytes where they tell none. */
export function withRunState(devices: Uint8Array, state: string): Uint8Array {
  const at = findName(devices)
  if (at === undefined || runStateIn(devices) === state) return devices
  const changed = devices.slice()
  changed.fill(0, at, at + nameLength)
  changed.set(new TextEncoder().encode(state), at)
  viewOf(changed).setUint32(at - 4, state.length + 1)
  return changed
}

/** The state that a VM saved in state `saved` is to be in. */
export function wantedState(saved: string, choice: RunStateChoice = 'saved'): string {
  if (choice === 'running') return 'running'
  if (choice === 'paused' && saved === 'running') return 'paused'
  // of what is passed through on the way (inmigrate, finish-migrate, save-vm) or a debugger's, the VM waits
  return takenFromStream.has(saved) ? saved : 'paused'
}

/** Where the name of the state begins. */
function findName(devices: Uint8Array): number | undefined {
  for (let at = devices.lastIndexOf(head[0]!); at >= 5; at = devices.lastIndexOf(head[0]!, at - 1)) {
    const name = at + head.length + 4
    if (devices[at - 5] === 4 && head.every((byte, i) => devices[at + i] === byte) && name + nameLength <= devices.length) return name
  }
  return undefined
}
