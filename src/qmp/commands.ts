/**
 * The types of the QMP commands this library sends, and room for more. The protocol: QEMU's "QEMU
 * Machine Protocol Specification" and "QEMU QMP Reference Manual".
 */

/** What the greeting tells. */
export interface QmpGreeting {
  readonly version: { readonly qemu: { readonly major: number; readonly minor: number; readonly micro: number }; readonly package: string }
  /** Protocol capabilities on offer, for example `oob`. */
  readonly capabilities: readonly string[]
}

/** Run state of the virtual machine, the answer to `query-status`. */
export interface RunStatus {
  readonly running: boolean
  /** `running`, `paused`, `inmigrate`, `postmigrate`, `prelaunch`, … */
  readonly status: string
}

/** The state of a migration, the answer to `query-migrate`; fields are absent until they mean something. */
export interface MigrationInfo {
  /** `setup`, `active`, `postcopy-active`, `postcopy-paused`, `postcopy-recover`, `completed`, `failed`, `cancelled`, … */
  readonly status?: string
  /** Milliseconds the guest stood still. */
  readonly downtime?: number
  readonly 'total-time'?: number
  readonly 'error-desc'?: string
  readonly ram?: {
    /** Pages sent whole. */
    readonly normal: number
    /** Zero pages. */
    readonly duplicate: number
    /** All RAM in bytes. */
    readonly total: number
    readonly transferred: number
    readonly remaining: number
    readonly 'page-size': number
  }
}

/** A migration capability and whether it is on. */
export interface MigrationCapability {
  readonly capability: string
  readonly state: boolean
}

/** A block device as `query-named-block-nodes` tells of it. */
export interface BlockNode {
  readonly 'node-name': string
  readonly drv: string
  readonly file: string
  readonly ro: boolean
  readonly image: BlockImage
}

/** An image as QEMU has it open. */
export interface BlockImage {
  readonly filename: string
  readonly format: string
  /** Bytes. */
  readonly 'virtual-size': number
  readonly 'backing-filename'?: string
  /** The image below; left out where answers are asked to be flat. */
  readonly 'backing-image'?: BlockImage
}

/** A CPU as `query-cpus-fast` tells of it. */
export interface CpuInfo {
  readonly 'qom-path': string
  /** The host's number of its thread. */
  readonly 'thread-id': number
}

/** A device on a PCI bus as `query-pci` tells of it. */
export interface PciDevice {
  readonly slot: number
  readonly function: number
  readonly id: { readonly vendor: number; readonly device: number }
}

/** A drive as `query-block` tells of it. */
export interface BlockInfo {
  readonly device: string
  readonly qdev?: string
  readonly inserted?: BlockNode
}

interface Nothing {
  readonly [key: string]: never
}

interface Command<Arguments, Returns> {
  arguments: Arguments
  returns: Returns
}

/**
 * Command name to arguments and answer. Commands not listed here work too, with loosely typed
 * arguments and an `unknown` answer; add your own by declaration merging.
 */
export interface QmpCommands {
  'cont': Command<Nothing, Nothing>
  'stop': Command<Nothing, Nothing>
  'quit': Command<Nothing, Nothing>
  'query-status': Command<Nothing, RunStatus>
  'query-version': Command<Nothing, QmpGreeting['version']>
  'query-kvm': Command<Nothing, { readonly enabled: boolean; readonly present: boolean }>
  'query-cpus-fast': Command<Nothing, readonly CpuInfo[]>
  'query-pci': Command<Nothing, readonly { readonly bus: number; readonly devices: readonly PciDevice[] }[]>
  'qom-get': Command<{ path: string; property: string }, unknown>
  'qom-list': Command<{ path: string }, readonly { readonly name: string; readonly type: string }[]>
  'query-migrate': Command<Nothing, MigrationInfo>
  'query-migrate-parameters': Command<Nothing, Readonly<Record<string, unknown>>>
  'query-migrate-capabilities': Command<Nothing, readonly MigrationCapability[]>
  'query-block': Command<Nothing, readonly BlockInfo[]>
  'query-named-block-nodes': Command<{ flat?: boolean }, readonly BlockNode[]>
  'migrate': Command<{ uri: string; resume?: boolean }, Nothing>
  'migrate_cancel': Command<Nothing, Nothing>
  'migrate-incoming': Command<{ uri: string }, Nothing>
  'migrate-recover': Command<{ uri: string }, Nothing>
  'migrate-pause': Command<Nothing, Nothing>
  'migrate-start-postcopy': Command<Nothing, Nothing>
  'migrate-set-capabilities': Command<{ capabilities: readonly MigrationCapability[] }, Nothing>
  'migrate-continue': Command<{ state: 'pre-switchover' }, Nothing>
  'migrate-set-parameters': Command<Record<string, unknown>, Nothing>
  'blockdev-snapshot-sync': Command<
    {
      'device'?: string
      'node-name'?: string
      'snapshot-file': string
      'snapshot-node-name'?: string
      'format'?: string
      'mode'?: 'existing' | 'absolute-paths'
    },
    Nothing
  >
  'blockdev-snapshot-delete-internal-sync': Command<{ device: string; id?: string; name?: string }, unknown>
  'block-commit': Command<{ 'job-id': string; 'device': string; 'top-node'?: string; 'base-node'?: string }, Nothing>
  'change-backing-file': Command<{ 'device': string; 'image-node-name': string; 'backing-file': string }, Nothing>
  'block-job-complete': Command<{ device: string }, Nothing>
  'transaction': Command<{ actions: readonly { type: string; data: Record<string, unknown> }[] }, Nothing>
  'blockdev-add': Command<Record<string, unknown>, Nothing>
  'blockdev-del': Command<{ 'node-name': string }, Nothing>
  'snapshot-save': Command<{ 'job-id': string; tag: string; vmstate: string; devices: readonly string[] }, Nothing>
  'query-jobs': Command<Nothing, readonly { readonly id: string; readonly status: string; readonly error?: string }[]>
  'job-dismiss': Command<{ id: string }, Nothing>
  'query-yank': Command<Nothing, readonly { readonly type: string }[]>
  'human-monitor-command': Command<{ 'command-line': string }, string>
  'pmemsave': Command<{ val: number; size: number; filename: string }, Nothing>
}

/** Options of one {@link Qmp.execute}. */
export interface ExecuteOptions {
  readonly signal?: AbortSignal | undefined
  /** Milliseconds to wait for the answer; the client's default if left out, 0 for ever. */
  readonly timeout?: number | undefined
  /** Send as an out-of-band command, which QEMU runs even while its main loop is blocked. */
  readonly outOfBand?: boolean | undefined
}

/** The answer type of a command; `unknown` for commands that {@link QmpCommands} does not list. */
export type QmpReturn<Name extends string> = Name extends keyof QmpCommands ? QmpCommands[Name]['returns'] : unknown

/** The argument type of a command. */
export type QmpArguments<Name extends string> = Name extends keyof QmpCommands
  ? QmpCommands[Name]['arguments']
  : Record<string, unknown>
