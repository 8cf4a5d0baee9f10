/**
 * The manifest of a saved VM: what belongs together and what it needs to run again. Plain JSON beside the
 * image. Owns its form and the comparison with a QEMU that is to go on from it.
 */
import { FormatError } from '../core/errors.ts'
import type { Qmp } from '../qmp/client.ts'
import type { QmpGreeting } from '../qmp/commands.ts'
import type { FrozenDisk } from './disk-snapshots.ts'
import type { StreamSummary } from './stream-check.ts'

/** Version 1 of the manifest. */
export interface Manifest {
  readonly format: 'qcow2 saved VM'
  readonly version: 1
  /** ISO 8601. */
  readonly created: string
  readonly qemu: QmpGreeting['version']
  /** Machine type with its version, for example `pc-i440fx-7.2`. */
  readonly machine: string
  readonly accelerator: 'kvm' | 'tcg'
  /** The guest was running (not paused) when it was saved. */
  readonly running: boolean
  /** Where memory and device state are. */
  readonly memory: {
    readonly kind: string
    /** File name, relative to the manifest where possible. */
    readonly file?: string
    /** Internal snapshot in that file. */
    readonly snapshot?: string
  }
  readonly pageSize: number
  readonly ramBlocks: readonly { readonly name: string; readonly length: number }[]
  readonly disks: readonly FrozenDisk[]
}

/** What a manifest says of a stream and the VM it came from. */
export function makeManifest(
  summary: StreamSummary,
  facts: Pick<Manifest, 'qemu' | 'accelerator' | 'memory' | 'disks' | 'running'>,
): Manifest {
  return {
    format: 'qcow2 saved VM',
    version: 1,
    created: new Date().toISOString(),
    qemu: facts.qemu,
    machine: summary.machine,
    accelerator: facts.accelerator,
    running: facts.running,
    memory: facts.memory,
    pageSize: summary.pageSize,
    ramBlocks: summary.blocks,
    disks: facts.disks,
  }
}

/** Reads the text of a manifest. @throws FormatError (`ERR_FORMAT`) if it is none that this library reads. */
export function parseManifest(text: string): Manifest {
  const fail = (field: string, detail: string, cause?: unknown): FormatError =>
    new FormatError(detail, { structure: 'manifest', field }, 'ERR_FORMAT', cause === undefined ? undefined : { cause })
  let value: Partial<Record<keyof Manifest, unknown>> | null
  try {
    value = JSON.parse(text) as typeof value
  } catch (cause) {
    throw fail('JSON', 'not valid JSON', cause)
  }
  if (typeof value !== 'object' || value === null || value.format !== 'qcow2 saved VM') {
    throw fail('format', 'not the manifest of a saved VM')
  }
  if (value.version !== 1) throw fail('version', `version is ${String(value.version)}, expected 1`)
  for (const field of ['machine', 'accelerator', 'created'] as const) {
    if (typeof value[field] !== 'string') throw fail(field, `${field} is missing`)
  }
  for (const field of ['ramBlocks', 'disks'] as const) {
    if (!Array.isArray(value[field])) throw fail(field, `${field} is not a list`)
  }
  for (const field of ['qemu', 'memory'] as const) {
    if (typeof value[field] !== 'object' || value[field] === null) throw fail(field, `${field} is missing`)
  }
  return value as Manifest
}

/** A RAM block of a QEMU, as it is set up now. */
export interface RunningRamBlock {
  readonly name: string
  /** Bytes. */
  readonly length: number
  /** Host page size in bytes. */
  readonly pageSize: number
}

/** The RAM blocks of a QEMU, running or waiting for a migration. */
export async function ramBlocksOf(qmp: Qmp): Promise<RunningRamBlock[]> {
  return parseRamBlocks(await qmp.execute('human-monitor-command', { 'command-line': 'info ramblock' }))
}

/** Reads the table that the monitor command `info ramblock` prints: name, page size, offset, used, total. */
export function parseRamBlocks(table: string): RunningRamBlock[] {
  const blocks: RunningRamBlock[] = []
  for (const line of table.split('\n')) {
    const match = /^\s*(\S.*?)\s+(\d+) ([KMG]?)i?B\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x[0-9a-f]+/.exec(line)
    if (match === null) continue
    const unit = { '': 1, 'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30 }[match[3] ?? ''] ?? 1
    blocks.push({ name: match[1]!, pageSize: Number(match[2]) * unit, length: Number.parseInt(match[4]!, 16) })
  }
  return blocks
}

/** `kvm` or `tcg`. */
export async function acceleratorOf(qmp: Qmp): Promise<'kvm' | 'tcg'> {
  const { enabled } = await qmp.execute('query-kvm')
  return enabled ? 'kvm' : 'tcg'
}

/** The machine type of a QEMU, without the suffix of its class name. */
export async function machineOf(qmp: Qmp): Promise<string> {
  const type = await qmp.execute('qom-get', { path: '/machine', property: 'type' })
  return String(type).replace(/-machine$/, '')
}

/** What a saved VM needs of a QEMU. A {@link Manifest} and a page source both tell it. */
export interface Needs {
  readonly machine: string
  readonly ramBlocks: readonly { readonly name: string; readonly length: number }[]
  readonly accelerator?: 'kvm' | 'tcg'
}

/** Why the QEMU cannot go on from the saved VM, in words for people; empty if nothing was found. */
export async function differences(needs: Needs, qmp: Qmp): Promise<string[]> {
  const found: string[] = []
  const [machine, accelerator, here] = await Promise.all([machineOf(qmp), acceleratorOf(qmp), ramBlocksOf(qmp)])
  if (needs.machine !== '' && machine !== needs.machine) {
    found.push(`machine type: saved ${needs.machine}, here ${machine} (start QEMU with -M ${needs.machine})`)
  }
  if (needs.accelerator !== undefined && needs.accelerator !== accelerator) {
    found.push(`accelerator: saved under ${needs.accelerator}, here ${accelerator} (the CPU model may not be the same)`)
  }
  const blocks = new Map(here.map((block) => [block.name, block.length]))
  if (blocks.size === 0) return found
  for (const { name, length } of needs.ramBlocks) {
    const size = blocks.get(name)
    // Tables and firmware are resizable: they take the size of the saved block.
    if (size === undefined) found.push(`RAM block ${name} of ${length} bytes is missing here (a device or -m differs)`)
    else if (size !== length && !name.startsWith('/rom@')) found.push(`RAM block ${name}: saved ${length} bytes, here ${size}`)
  }
  return found
}
