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
import { copyBlock } from './export-raw.ts'
import { physicalRanges, type PhysicalMapOptions, type PhysicalRange } from './physical-ranges.ts'
import type { VmState } from './vm-state.ts'

const headerLength = 64
const segmentLength = 56
const alignment = 4096

/**
 * Writes guest memory as an ELF core. Pages of zeroes are skipped, so `target` must read as zeroes where
 * nothing was written (a new file does).
 * @param options `map`: what goes into the file; default {@link physicalRanges}.
 * @throws what {@link physicalRanges} throws
 */
export async function exportElfCore(
  vm: VmState,
  target: BlockDevice,
  options: CallOptions & PhysicalMapOptions = {},
): Promise<void> {
  const ranges = physicalRanges(vm, options)
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
