/**
 * Guest RAM as an ELF core (`ET_CORE`, 64-bit little-endian, x86-64), which forensic tools open: one
 * `PT_LOAD` segment for each run of guest physical memory. Owns the layout of the file and the guest
 * physical addresses of the machine types `pc` and `q35`, which streams mostly do not tell.
 *
 * ```
 *  0 ELF header (64) | program headers (56 each) | zeroes to 4096 | segments, each page aligned
 * ```
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { Qcow2Error } from '../core/errors.ts'
import { copyBlock } from './export-raw.ts'
import type { RamBlock } from './records.ts'
import type { VmState } from './vm-state.ts'

/** A run of guest physical memory and where its content is. */
export interface PhysicalRange {
  /** Name of the RAM block. */
  readonly block: string
  /** First byte within the block. */
  readonly offset: number
  /** Bytes. */
  readonly length: number
  /** Guest physical address. */
  readonly address: number
}

const GiB = 1 << 30
const fourGiB = 4 * GiB
const headerLength = 64
const segmentLength = 56
const alignment = 4096

/**
 * Where the RAM blocks are in guest physical memory: as the stream says, else as the machine types `pc`
 * and `q35` arrange it: main memory from 0 with a hole below 4 GiB, firmware ending at 4 GiB. Blocks whose
 * place is not known (video memory, tables that firmware copies) are left out. In ascending order.
 */
export function physicalRanges(vm: Pick<VmState, 'machine' | 'ram'>): PhysicalRange[] {
  const { blocks } = vm.ram
  const ranges = blocks.some(({ gpa }) => gpa !== undefined) ? toldRanges(blocks) : guessedRanges(vm.machine ?? '', blocks)
  return ranges.sort((a, b) => a.address - b.address)
}

/** ROM that is not mapped has address 0, like main memory, which is the largest there. */
function toldRanges(blocks: readonly RamBlock[]): PhysicalRange[] {
  const ranges: PhysicalRange[] = []
  const sorted = [...blocks].sort((a, b) => b.length - a.length)
  for (const { name: block, length, gpa } of sorted) {
    const overlaps = gpa === undefined || ranges.some((range) => gpa < range.address + range.length && range.address < gpa + length)
    if (!overlaps) ranges.push({ block, offset: 0, length, address: gpa })
  }
  return ranges
}

function guessedRanges(machine: string, blocks: readonly RamBlock[]): PhysicalRange[] {
  const [main] = [...blocks].sort((a, b) => b.length - a.length)
  const q35 = machine.startsWith('pc-q35')
  if (main === undefined || !(q35 || machine.startsWith('pc-i440fx'))) return []
  const most = q35 ? 0xb000_0000 : 0xe000_0000
  const low = main.length < most ? main.length : q35 ? 2 * GiB : 3 * GiB
  const ranges: PhysicalRange[] = [{ block: main.name, offset: 0, length: low, address: 0 }]
  if (main.length > low) ranges.push({ block: main.name, offset: low, length: main.length - low, address: fourGiB })
  const bios = blocks.find(({ name }) => name === 'pc.bios')
  if (bios !== undefined) ranges.push({ block: bios.name, offset: 0, length: bios.length, address: fourGiB - bios.length })
  return ranges
}

/**
 * Writes guest memory as an ELF core. Pages of zeroes are skipped, so `target` must read as zeroes where
 * nothing was written (a new file does).
 * @param options `ranges`: what goes into the file; default {@link physicalRanges}.
 * @throws Qcow2Error `ERR_NOT_FOUND` if no range is given and none is known
 */
export async function exportElfCore(
  vm: VmState,
  target: BlockDevice,
  options: CallOptions & { readonly ranges?: readonly PhysicalRange[] } = {},
): Promise<void> {
  const ranges = options.ranges ?? physicalRanges(vm)
  if (ranges.length === 0) {
    throw new Qcow2Error('ERR_NOT_FOUND', `the guest physical addresses of machine type '${vm.machine ?? ''}' are not known: give ranges`)
  }
  let offset = Math.ceil((headerLength + ranges.length * segmentLength) / alignment) * alignment
  const positions = ranges.map(({ length }) => {
    const position = offset
    offset += Math.ceil(length / alignment) * alignment
    return position
  })
  if (target.growable && target.size < offset) await target.resize(offset, options)
  await target.write(0, encodeHeaders(ranges, positions), options)
  for (const [i, { block, offset: from, length }] of ranges.entries()) {
    await copyBlock(vm.ram.device(block), from, length, target, positions[i]!, options)
  }
  await target.flush(options)
}

function encodeHeaders(ranges: readonly PhysicalRange[], positions: readonly number[]): Uint8Array {
  const bytes = new Uint8Array(headerLength + ranges.length * segmentLength)
  const view = new DataView(bytes.buffer)
  bytes.set([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]) // ELF, 64-bit, little-endian, version 1
  view.setUint16(16, 4, true) // ET_CORE
  view.setUint16(18, 62, true) // x86-64
  view.setUint32(20, 1, true)
  view.setUint32(32, headerLength, true) // program headers begin here
  view.setUint16(52, headerLength, true)
  view.setUint16(54, segmentLength, true)
  view.setUint16(56, ranges.length, true)
  ranges.forEach(({ length, address }, i) => {
    const at = headerLength + i * segmentLength
    view.setUint32(at, 1, true) // PT_LOAD
    view.setUint32(at + 4, 7, true) // readable, writable, executable
    setU64(view, at + 8, positions[i]!)
    setU64(view, at + 16, address) // virtual: all that a debugger looks at
    setU64(view, at + 24, address)
    setU64(view, at + 32, length)
    setU64(view, at + 40, length)
    setU64(view, at + 48, alignment)
  })
  return bytes
}

function setU64(view: DataView, at: number, value: number): void {
  view.setUint32(at, value % 0x1_0000_0000, true)
  view.setUint32(at + 4, Math.floor(value / 0x1_0000_0000), true)
}
