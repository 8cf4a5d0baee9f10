/**
 * What a QEMU says of the machine it runs: type, accelerator, RAM blocks, CPUs, devices. Owns the questions; what the
 * answers mean for a saved VM is not its business.
 */
import type { Qmp } from '../qmp/client.ts'
import type { PciDevice, QmpGreeting } from '../qmp/commands.ts'

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

/** What a manifest says of a QEMU: version, accelerator, CPUs and devices. */
export async function machineFacts(qmp: Qmp): Promise<MachineFacts> {
  const [qemu, accelerator, cpus, devices] = await Promise.all([qmp.execute('query-version'), acceleratorOf(qmp), cpusOf(qmp), devicesOf(qmp)])
  return { qemu, accelerator, cpus, devices }
}

/** False for a machine that sends its state without a VM description (`suppress-vmdesc=on`, types up to 2.1). */
export async function sendsVmDescription(qmp: Qmp): Promise<boolean> {
  const suppressed = await qmp.execute('qom-get', { path: '/machine', property: 'suppress-vmdesc' }).catch(() => false)
  return suppressed !== true
}

/** The machine type of a QEMU, without the suffix of its class name. */
export async function machineOf(qmp: Qmp): Promise<string> {
  const type = await qmp.execute('qom-get', { path: '/machine', property: 'type' })
  return String(type).replace(/-machine$/, '')
}

/** What a manifest tells of the QEMU. */
export interface MachineFacts {
  readonly qemu: QmpGreeting['version']
  readonly accelerator: 'kvm' | 'tcg'
  readonly cpus: Cpus
  readonly devices: readonly string[]
}

/** The CPUs of a VM. */
export interface Cpus {
  readonly count: number
  /** QOM type of the first, for example `qemu64-x86_64-cpu`: the model, without flags that were added or taken away. */
  readonly type: string
}

/** The CPUs of a QEMU. */
export async function cpusOf(qmp: Qmp): Promise<Cpus> {
  const cpus = await qmp.execute('query-cpus-fast')
  const path = cpus[0]?.['qom-path']
  const type = path === undefined ? '' : String(await qmp.execute('qom-get', { path, property: 'type' }))
  return { count: cpus.length, type }
}

/**
 * The devices of a QEMU, each as a line that is the same for the same device in another QEMU: `PCI 0:3.0 1af4:1001`
 * (bus, slot and function, vendor and device) for those on root buses; `virtio-blk-pci`, the type, for those that the
 * command line or `device_add` made. Sorted. Names given to devices are left out: QEMU does not compare them either. What
 * is behind a bridge is known by its type alone: a QEMU that waits for a migration does not see it on its bus yet.
 */
export async function devicesOf(qmp: Qmp): Promise<string[]> {
  const buses = (await qmp.execute('query-pci')).flatMap(({ bus, devices }) => devices.map((device) => pciLine(bus, device)))
  const made = await Promise.all(['/machine/peripheral', '/machine/peripheral-anon'].map((path) => qmp.execute('qom-list', { path })))
  const types = made.flat().flatMap(({ type }) => /^child<(.*)>$/.exec(type)?.[1] ?? [])
  return [...buses, ...types].sort()
}

function pciLine(bus: number, { slot, function: part, id }: PciDevice): string {
  return `PCI ${bus}:${slot}.${part} ${hex(id.vendor)}:${hex(id.device)}`
}

function hex(id: number): string {
  return id.toString(16).padStart(4, '0')
}
