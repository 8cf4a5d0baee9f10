/** How images are opened: what holds for all of a command, and what for one. */
import type { BlockDevice } from '../../block/device.ts'
import type { ReferenceRule } from '../../qcow2/references.ts'
import type { Secrets } from './secrets.ts'

/** What all images of a command are opened with. */
export interface OpenerSettings {
  readonly signal: AbortSignal
  readonly secrets?: Secrets | undefined
  /** Asks for the passphrase of an encrypted image whose options name none. */
  readonly askSecret?: ((question: string) => Promise<Uint8Array>) | undefined
  /** Read images that a running QEMU writes to. */
  readonly forceShare?: boolean | undefined
  /** How far names in images are followed; default `tree`. With `any` backing files may be anything that can be named here. */
  readonly references?: ReferenceRule | undefined
  /** Told what the user should know but need not stop for. */
  readonly warn: (message: string) => void
  /** Told what was repaired, a line each, when an image had to be before it could be written. */
  readonly told?: ((lines: readonly string[]) => void) | undefined
  /** Put around the bytes of every file, for tracing. */
  readonly wrap?: ((device: BlockDevice, name: string) => BlockDevice) | undefined
  /** Speak as qemu-img does, whose lines scripts match: it names a file that cannot be opened for itself and for its driver. */
  readonly nameTwice?: boolean | undefined
}

/**
 * Files in the page cache are read and written synchronously in pieces that stay in the processor's cache: nothing
 * else waits for this program's event loop.
 */
export const syncLimit: number = 128 << 10

/** How one image is opened. */
export interface OpenHow {
  readonly readOnly: boolean
  /** Past the page cache. */
  readonly direct?: boolean | undefined
  /** Leave the backing file alone: what it would give reads as zeroes. */
  readonly withoutBacking?: boolean | undefined
  /** Largest synchronous request to a file, in bytes; default {@link syncLimit}. */
  readonly syncLimit?: number | undefined
}
