/**
 * Guest memory as an ELF core (`ET_CORE`, 64-bit little-endian), which debuggers, `crash` and forensic tools open: one
 * `PT_LOAD` segment for each run of guest physical memory, and notes of the CPUs. Owns the layout of the file.
 *
 * ```
 *  0 ELF header (64) | program headers (56 each) | section header (64), for 65,535 segments and more | notes
 *  … zeroes to a multiple of 4096 | segments, each page aligned
 * ```
 */
import type { BlockDevice } from '../block/device.ts'
import { UnsupportedError } from '../core/errors.ts'
import { viewOf } from '../bytes/view.ts'
import { elfMachine, elfNotes } from './elf-notes.ts'
import { copyRanges, type ExportPhysicalOptions } from './physical-export.ts'
import { physicalRanges, type PhysicalRange } from './physical-ranges.ts'
import type { VmState } from './vm-state.ts'

const headerLength = 64
const segmentLength = 56
const sectionLength = 64
const alignment = 4096
/** `PN_XNUM`: so many segments or more are counted in the first section header. */
const manySegments = 0xffff

/**
 * Writes guest memory as an ELF core with the notes that QEMU's `dump-guest-memory` writes: registers of each CPU,
 * QEMU's own CPU state (x86), and the kernel's VMCOREINFO where the guest has told where it is. Pages of zeroes are
 * skipped, so `target` must read as zeroes where nothing was written (a new file does).
 * @param options `map`: what goes into the file; default {@link physicalRanges}
 * @throws UnsupportedError for a processor other than x86, AArch64 and RISC-V, which a stream may not tell
 * @throws what {@link physicalRanges} throws
 */
export async function exportElfCore(vm: VmState, target: BlockDevice, options: ExportPhysicalOptions = {}): Promise<void> {
  const ranges = physicalRanges(vm, options)
  const { notes, machine } = await elfNotes(vm, machineOf(vm), { ...options, map: ranges })
  const layout = layoutOf(ranges, notes.length)
  if (target.growable && target.size < layout.end) await target.resize(layout.end, options)
  await target.write(0, encodeHeaders(machine, ranges, notes, layout), options)
  await copyRanges(vm, ranges, layout.positions, target, options)
  await target.flush(options)
}

function machineOf({ machine, ram: { blocks } }: VmState): number {
  if (machine === undefined || /^(pc(-.*)?|microvm|isapc)$/.test(machine)) return elfMachine.x8664
  if (blocks.some(({ name }) => name.startsWith('riscv_virt_board.'))) return elfMachine.riscv
  if (machine.startsWith('virt-')) return elfMachine.arm64
  throw new UnsupportedError(`the processor of machine type '${machine}' is not known, which an ELF core names: export raw memory instead`, ['ELF core'])
}

interface Layout {
  /** Position of the notes. */
  readonly notesAt: number
  /** Position of each range. */
  readonly positions: readonly number[]
  readonly end: number
}

function layoutOf(ranges: readonly PhysicalRange[], notesLength: number): Layout {
  const segments = ranges.length + 1
  const notesAt = headerLength + segments * segmentLength + (segments < manySegments ? 0 : sectionLength)
  let end = align(notesAt + notesLength)
  const positions: number[] = []
  for (const { length } of ranges) {
    positions.push(end)
    end = align(end + length)
  }
  return { notesAt, positions, end }
}

function align(position: number): number {
  return Math.ceil(position / alignment) * alignment
}

function encodeHeaders(machine: number, ranges: readonly PhysicalRange[], notes: Uint8Array, { notesAt, positions }: Layout): Uint8Array {
  const bytes = new Uint8Array(notesAt + notes.length)
  const view = viewOf(bytes)
  const segments = ranges.length + 1
  bytes.set([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]) // ELF, 64-bit, little-endian, version 1
  view.setUint16(16, 4, true) // ET_CORE
  view.setUint16(18, machine, true)
  view.setUint32(20, 1, true)
  view.setUint32(32, headerLength, true) // program headers begin here
  view.setUint16(52, headerLength, true)
  view.setUint16(54, segmentLength, true)
  view.setUint16(56, Math.min(segments, manySegments), true)
  if (segments >= manySegments) encodeCount(view, segments, notesAt - sectionLength)
  encodeSegment(view, headerLength, { type: 4, flags: 0, position: notesAt, address: 0, length: notes.length, align: 0 })
  ranges.forEach(({ length, address }, i) => {
    encodeSegment(view, headerLength + (i + 1) * segmentLength, { type: 1, flags: 7, position: positions[i]!, address, length, align: alignment })
  })
  bytes.set(notes, notesAt)
  return bytes
}

/** The number of segments that the header has no room for, in `sh_info` of section 0. */
function encodeCount(view: DataView, segments: number, at: number): void {
  setU64(view, 40, at)
  view.setUint16(58, sectionLength, true)
  view.setUint16(60, 1, true)
  view.setUint32(at + 44, segments, true)
}

interface ElfSegment {
  readonly type: number
  readonly flags: number
  readonly position: number
  /** Physical and, as all that some debuggers look at, virtual. */
  readonly address: number
  readonly length: number
  readonly align: number
}

function encodeSegment(view: DataView, at: number, { type, flags, position, address, length, align }: ElfSegment): void {
  view.setUint32(at, type, true)
  view.setUint32(at + 4, flags, true)
  setU64(view, at + 8, position)
  setU64(view, at + 16, address)
  setU64(view, at + 24, address)
  setU64(view, at + 32, length)
  setU64(view, at + 40, length)
  setU64(view, at + 48, align)
}

function setU64(view: DataView, at: number, value: number): void {
  view.setUint32(at, value % 0x1_0000_0000, true)
  view.setUint32(at + 4, Math.floor(value / 0x1_0000_0000), true)
}
