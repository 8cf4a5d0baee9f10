import { isDeepStrictEqual } from 'node:util'
import type { DeviceValue } from '../../migration/device-fields.ts'
import type { RamBlock } from '../../migration/records.ts'
import type { VmState } from '../../migration/vm-state.ts'
import { command } from '../command.ts'
import { forceShareOption, objectOption, outputOption } from '../image/options.ts'
import { openVmState } from '../image/vm-state.ts'
import { prettyJson } from '../print/shapes.ts'

export const vmstateDiff = command({
  name: 'diff',
  summary: 'Compare two saved VMs: which pages and which device fields differ',
  options: { ...outputOption, ...forceShareOption, ...objectOption },
  arguments: [
    { name: 'VM1', help: 'IMAGE@SNAPSHOT, a RAM image, or a stream file' },
    { name: 'VM2', help: 'the other' },
  ],
  exitCodes: { 0: 'the VMs are equal', 1: 'they differ', 2: 'they could not be compared' },
  failure: () => 2,
  examples: [{ line: 'qcow2 vmstate diff vm.qcow2@before vm.qcow2@after', shows: 'what the guest changed' }],
  async run(context) {
    const { options, args, print, signal } = context
    const first = await openVmState(context, args[0]!)
    try {
      const second = await openVmState(context, args[1]!)
      try {
        const result = { ram: await compareRam(first.vm, second.vm, signal), devices: await compareDevices(first.vm, second.vm, signal) }
        if (options.output === 'json') await print(prettyJson(result))
        else for (const line of resultLines(result)) await print(line)
        return result.ram.length === 0 && result.devices.length === 0 ? 0 : 1
      } finally {
        await second.close()
      }
    } finally {
      await first.close()
    }
  },
})

interface BlockDifference {
  readonly block: string
  /** Bytes in each; absent where the block is not there. */
  readonly lengths: readonly (number | undefined)[]
  /** Pages that differ. */
  readonly pages: number
  /** Byte offsets of runs of pages that differ, at most a hundred. */
  readonly runs: readonly { readonly offset: number; readonly length: number }[]
}

interface FieldDifference {
  readonly device: string
  readonly field: string
  readonly values: readonly (DeviceValue | undefined)[]
}

const maxRuns = 100
const pagesAtOnce = 256

async function compareRam(a: VmState, b: VmState, signal: AbortSignal): Promise<BlockDifference[]> {
  const names = new Set([...a.ram.blocks, ...b.ram.blocks].map(({ name }) => name))
  const differences: BlockDifference[] = []
  for (const name of names) {
    const [one, other] = [a, b].map(({ ram }) => ram.blocks.find((block) => block.name === name))
    const { pages, runs } = one === undefined || other === undefined ? { pages: 0, runs: [] } : await comparePages(a, b, one, other, signal)
    if (pages > 0 || one?.length !== other?.length) differences.push({ block: name, lengths: [one?.length, other?.length], pages, runs })
  }
  return differences
}

async function comparePages(a: VmState, b: VmState, one: RamBlock, other: RamBlock, signal: AbortSignal): Promise<Pick<BlockDifference, 'pages' | 'runs'>> {
  const { pageSize } = a.ram
  const runs: { offset: number; length: number }[] = []
  let pages = 0
  const end = Math.min(one.length, other.length)
  for (let offset = 0; offset < end; offset += pagesAtOnce * pageSize) {
    const length = Math.min(pagesAtOnce * pageSize, end - offset)
    const [mine, theirs] = await Promise.all([a.ram.read(one.index, offset, length, { signal }), b.ram.read(other.index, offset, length, { signal })])
    if (Buffer.compare(mine, theirs) === 0) continue
    for (let at = 0; at < length; at += pageSize) {
      if (Buffer.compare(mine.subarray(at, at + pageSize), theirs.subarray(at, at + pageSize)) === 0) continue
      pages++
      const last = runs.at(-1)
      if (last !== undefined && last.offset + last.length === offset + at) last.length += pageSize
      else if (runs.length < maxRuns) runs.push({ offset: offset + at, length: pageSize })
    }
  }
  return { pages, runs }
}

async function compareDevices(a: VmState, b: VmState, signal: AbortSignal): Promise<FieldDifference[]> {
  const [mine, theirs] = await Promise.all([a.decodeDevices({ signal }), b.decodeDevices({ signal })])
  const differences: FieldDifference[] = []
  for (const device of new Set([...Object.keys(mine), ...Object.keys(theirs)])) {
    compareValues(mine[device], theirs[device], '', (field, values) => differences.push({ device, field, values }))
  }
  return differences
}

/** Tells each innermost value that differs, by its path. */
function compareValues(a: DeviceValue | undefined, b: DeviceValue | undefined, path: string, tell: (field: string, values: (DeviceValue | undefined)[]) => void): void {
  if (isDeepStrictEqual(a, b)) return
  if (typeof a !== 'object' || typeof b !== 'object' || a === null || b === null || Array.isArray(a) !== Array.isArray(b)) {
    tell(path, [a, b])
    return
  }
  const [left, right] = [a, b] as [Record<string, DeviceValue>, Record<string, DeviceValue>]
  for (const key of new Set([...Object.keys(left), ...Object.keys(right)])) {
    compareValues(left[key], right[key], path === '' ? key : Array.isArray(a) ? `${path}[${key}]` : `${path}.${key}`, tell)
  }
}

function resultLines({ ram, devices }: { ram: readonly BlockDifference[]; devices: readonly FieldDifference[] }): string[] {
  if (ram.length === 0 && devices.length === 0) return ['The VMs are equal.']
  const lines: string[] = []
  for (const { block, lengths, pages, runs } of ram) {
    if (lengths[0] !== lengths[1]) lines.push(`RAM block ${block}: ${lengths.map((length) => (length === undefined ? 'absent' : `${length} bytes`)).join(' and ')}`)
    if (pages > 0) lines.push(`RAM block ${block}: ${pages} pages differ, the first at offset 0x${runs[0]!.offset.toString(16)}`)
  }
  for (const { device, field, values } of devices) {
    const [before, after] = values.map((value) => (value === undefined ? 'absent' : JSON.stringify(value)))
    lines.push(`${device}${field === '' ? '' : ` ${field}`}: ${before!} -> ${after!}`)
  }
  return lines
}
