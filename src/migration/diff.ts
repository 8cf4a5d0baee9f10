/** What differs between two saved VMs: pages of RAM and fields of devices. */
import type { CallOptions } from '../block/device.ts'
import { equalBytes } from '../bytes/equal.ts'
import type { DeviceValue } from './device-fields.ts'
import type { RamRange } from './commands.ts'
import type { VmState } from './vm-state.ts'

/** How a RAM block differs. */
export interface RamBlockDifference {
  readonly block: string
  /** `changed`: in both; `added`, `removed`: only in the second or the first. */
  readonly kind: 'changed' | 'added' | 'removed'
  /** Runs of pages whose content differs, in bytes; of an added or removed block, all of it. */
  readonly ranges: readonly RamRange[]
}

/** A field of a device that differs. */
export interface FieldDifference {
  /** `name (instance)` as in {@link VmState.decodeDevices}. */
  readonly device: string
  /** Path within the device, for example `env.regs.3`; empty if the whole device is only in one of the two. */
  readonly field: string
  /** Undefined where there is none. */
  readonly before: DeviceValue | undefined
  readonly after: DeviceValue | undefined
}

/** What {@link diffVmStates} finds. */
export interface VmStateDifference {
  readonly ram: readonly RamBlockDifference[]
  readonly devices: readonly FieldDifference[]
}

const compareSize = 1 << 20

/** Compares two saved VMs by content: how and where pages are stored does not matter. Blocks that are equal are not listed. */
export async function diffVmStates(before: VmState, after: VmState, options: CallOptions = {}): Promise<VmStateDifference> {
  const ram: RamBlockDifference[] = []
  const names = new Set([...before.ram.blocks, ...after.ram.blocks].map(({ name }) => name))
  for (const name of names) {
    const difference = await diffBlock(before, after, name, options)
    if (difference !== undefined) ram.push(difference)
  }
  const devices: FieldDifference[] = []
  const [old, next] = [await before.decodeDevices(options), await after.decodeDevices(options)]
  for (const device of new Set([...Object.keys(old), ...Object.keys(next)])) collect(devices, device, '', old[device], next[device])
  return { ram, devices }
}

async function diffBlock(before: VmState, after: VmState, name: string, options: CallOptions): Promise<RamBlockDifference | undefined> {
  const lengthOf = (vm: VmState): number => vm.ram.blocks.find((block) => block.name === name)?.length ?? 0
  const [old, next] = [lengthOf(before), lengthOf(after)]
  if (old === 0 || next === 0) {
    return { block: name, kind: old === 0 ? 'added' : 'removed', ranges: [{ offset: 0, length: Math.max(old, next) }] }
  }
  const ranges = await changedRanges(before, after, name, Math.min(old, next), options)
  if (old !== next) ranges.push({ offset: Math.min(old, next), length: Math.abs(old - next) })
  return ranges.length === 0 ? undefined : { block: name, kind: 'changed', ranges }
}

async function changedRanges(before: VmState, after: VmState, name: string, length: number, options: CallOptions): Promise<RamRange[]> {
  const { pageSize } = before.ram
  const ranges: { offset: number; length: number }[] = []
  for (let offset = 0; offset < length; offset += compareSize) {
    const size = Math.min(compareSize, length - offset)
    const [old, next] = await Promise.all([before.ram.read(name, offset, size, options), after.ram.read(name, offset, size, options)])
    for (let at = 0; at < size; at += pageSize) {
      if (equalBytes(old, next, at, Math.min(pageSize, size - at))) continue
      const last = ranges.at(-1)
      if (last !== undefined && last.offset + last.length === offset + at) last.length += pageSize
      else ranges.push({ offset: offset + at, length: pageSize })
    }
  }
  return ranges
}

function collect(found: FieldDifference[], device: string, field: string, before: DeviceValue | undefined, after: DeviceValue | undefined): void {
  if (before === after) return
  if (typeof before !== 'object' || typeof after !== 'object' || before === null || after === null) {
    found.push({ device, field, before, after })
    return
  }
  const [old, next] = [before as Record<string, DeviceValue>, after as Record<string, DeviceValue>]
  for (const key of new Set([...Object.keys(old), ...Object.keys(next)])) {
    collect(found, device, field === '' ? key : `${field}.${key}`, old[key], next[key])
  }
}
