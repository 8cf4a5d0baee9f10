/** What a save is asked to do, and what it reports: the types that the ways of saving share. */
import type { CallOptions } from '../block/device.ts'
import type { Qmp } from '../qmp/client.ts'
import type { DiskChoice } from './choose-disks.ts'
import type { DiskSnapshots } from './disk-snapshots.ts'
import type { MachineFacts } from './machine-facts.ts'
import type { Manifest } from './manifest.ts'
import type { MigrationReceiver } from './outgoing-migration.ts'
import type { SaveSink } from './save-sink.ts'
import type { StreamSummary } from './stream-check.ts'

/**
 * How the guest's memory is read: `background` while it runs on, write-protected; `stop` while it stands
 * still; `precopy` while it runs, with changed pages sent again and a stop at the end.
 */
export type SaveMode = 'background' | 'stop' | 'precopy'

/** Options of {@link saveTo}. */
export interface SaveToOptions extends CallOptions {
  /** Default `background`. A guest that stands still is saved as with `stop`. */
  readonly mode?: SaveMode | undefined
  /** What to do where QEMU or the host refuses a background snapshot; default: fail and say why. */
  readonly fallback?: 'stop' | 'precopy' | undefined
  /** Disks to freeze at the same instant. A VM with writable disks is not saved without a word about them. */
  readonly disks?: DiskChoice | undefined
  /** What the manifest says of the sink. */
  readonly memory?: Manifest['memory'] | undefined
  /** Where QEMU connects to; default a unix socket in a new folder, which only this user and QEMU's can enter. */
  readonly receiver?: MigrationReceiver | undefined
  /**
   * Folder for a file as large as the guest's memory, needed while a guest that stands still is saved. QEMU must be able to
   * write there. Default: the one of the memory, else the system's for temporary files.
   */
  readonly scratch?: string | undefined
  /** Milliseconds QEMU may take to report completion after the stream has ended; default 30 000. */
  readonly timeout?: number | undefined
  /** Bytes received so far; how many will come is not known. */
  readonly onProgress?: ((progress: { readonly done: number }) => void) | undefined
}

/** What a save did. */
export interface SaveReport {
  /** The way that was taken. */
  readonly mode: SaveMode
  readonly summary: StreamSummary
  readonly manifest: Manifest
  /** Milliseconds the guest stood still, by the timestamps of QEMU's events; 0 if it did before. */
  readonly stoppedFor: number
  /** Milliseconds in all. */
  readonly took: number
}

/** All that the ways of saving need. */
export interface SaveTask {
  readonly qmp: Qmp
  readonly sink: SaveSink
  readonly options: SaveToOptions
  readonly facts: MachineFacts
  /** The guest ran when the save began. */
  readonly running: boolean
  readonly disks: DiskSnapshots
  readonly vmDescription: 'required' | 'optional'
}
