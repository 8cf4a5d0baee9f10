/**
 * The manifest of a saved VM: what belongs together and what it needs to run again. Plain JSON beside the memory, one
 * for each saved VM (saved-names.ts has the names). Owns its form; parse-manifest.ts reads it, differences.ts compares.
 */
import type { QmpGreeting } from '../qmp/commands.ts'
import type { Cpus, MachineFacts } from './machine-facts.ts'
import type { StreamSummary } from './stream-check.ts'

/** A writable disk of a saved VM, frozen at the instant of the save or not. */
export interface SavedDisk {
  /** Node name of the layer that the guest wrote to until the save. */
  readonly node: string
  /** Node name of the layer that the guest writes to since: the overlay's, or the same. The next save may call the disk by it. */
  readonly activeNode: string
  /** Name of the drive (`-drive id=`), where it has one. */
  readonly device?: string
  /** The guest's device: its `id=`, or its QOM path where it has none. */
  readonly qdev?: string
  /**
   * That layer's file: an absolute path, or what QEMU calls something that is no file (`nbd://…`, `json:…`). Frozen by an
   * overlay, it holds the disk as it was at the instant of the save. A relative path is one of which only QEMU knows from
   * where, because it runs on another host or as another user.
   */
  readonly file: string
  /** Format of that file, as QEMU calls it: `qcow2`, `raw`, …; empty in manifests of version 1. */
  readonly format: string
  /** Bytes the guest sees; left out in manifests of version 1. */
  readonly size?: number
  /** How it was frozen; `false`: not at all, the file went on changing after the save. */
  readonly frozen: DiskFreeze | false
}

/** How a disk was frozen. */
export type DiskFreeze =
  /**
   * The guest went on in this new file, on top of the frozen one. `modified`: when the frozen file changed last, ISO 8601, as
   * its file system told after the save: one that was written to since tells another time. Left out where it was not seen.
   */
  | { readonly overlay: string; readonly modified?: string }
  /** An internal snapshot in the file itself. */
  | { readonly internal: string }

/** The manifest, of version 2. Those of version 1 are read as such, without what they did not tell. */
export interface Manifest {
  readonly format: 'qcow2 saved VM'
  readonly version: 2
  /** ISO 8601. */
  readonly created: string
  readonly qemu: QmpGreeting['version']
  /** Machine type with its version, for example `pc-i440fx-7.2`. */
  readonly machine: string
  readonly accelerator: 'kvm' | 'tcg'
  /** The guest was running when it was saved. */
  readonly running: boolean
  /** Its run state then, as `query-status` calls it: `running`, `paused`, `io-error`, `suspended`, … */
  readonly status: string
  /** Left out in manifests of version 1. */
  readonly cpus?: Cpus
  /** See {@link devicesOf}; left out in manifests of version 1. */
  readonly devices?: readonly string[]
  /** Where memory and device state are. */
  readonly memory: {
    readonly kind: string
    /** The file's path. */
    readonly file?: string
    /** Internal snapshot in that file. */
    readonly snapshot?: string
  }
  readonly pageSize: number
  readonly ramBlocks: readonly { readonly name: string; readonly length: number }[]
  /** Every writable disk of the VM; of version 1, those that were frozen. */
  readonly disks: readonly SavedDisk[]
}

/** What a manifest says of a stream and the VM it came from. */
export function makeManifest(
  summary: StreamSummary,
  facts: MachineFacts & Pick<Manifest, 'memory' | 'disks' | 'status'>,
): Manifest {
  return {
    format: 'qcow2 saved VM',
    version: 2,
    created: new Date().toISOString(),
    qemu: facts.qemu,
    machine: summary.machine,
    accelerator: facts.accelerator,
    running: facts.status === 'running',
    status: facts.status,
    cpus: facts.cpus,
    devices: facts.devices,
    memory: facts.memory,
    pageSize: summary.pageSize,
    ramBlocks: summary.blocks,
    disks: facts.disks,
  }
}
