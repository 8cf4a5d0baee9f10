/**
 * Guest physical memory as files without further structure: raw, where the position in the file is the address, and the format
 * of LiME, which memory forensics reads. Owns copying ranges to their places in a file.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { viewOf } from '../bytes/view.ts'
import { copyBlock } from './export-raw.ts'
import { physicalRanges, type PhysicalMapOptions, type PhysicalRange } from './physical-ranges.ts'
import type { VmState } from './vm-state.ts'

/** Options of the exports by guest physical address. */
export interface ExportPhysicalOptions extends CallOptions, PhysicalMapOptions {
  /** Bytes of memory that are done, of all. */
  readonly onProgress?: ((progress: { readonly done: number; readonly total: number }) => void) | undefined
}

const limeHeaderLength = 32
const limeMagic = 0x4c69_4d45

/**
 * Writes guest memory so that byte `a` of `target` is at guest physical address `a`. What is no memory, and pages of zeroes, are
 * skipped: `target` must read as zeroes where nothing was written, as a new file does, which then stays sparse.
 * @throws what {@link physicalRanges} throws
 */
export async function exportPhysical(vm: VmState, target: BlockDevice, options: ExportPhysicalOptions = {}): Promise<void> {
  const ranges = physicalRanges(vm, options)
  const last = ranges.at(-1)
  await prepare(target, last === undefined ? 0 : last.address + last.length, options)
  await copyRanges(vm, ranges, ranges.map(({ address }) => address), target, options)
  await target.flush(options)
}

/**
 * Writes guest memory in the format of LiME, version 1: each range with a header before it. Pages of zeroes are skipped, so
 * `target` must read as zeroes where nothing was written.
 *
 * ```
 * u32 "EMiL", u32 version 1, u64 first address, u64 last address, 8 zeroes | content       (little-endian)
 * ```
 * @throws what {@link physicalRanges} throws
 */
export async function exportLime(vm: VmState, target: BlockDevice, options: ExportPhysicalOptions = {}): Promise<void> {
  const ranges = physicalRanges(vm, options)
  const positions: number[] = []
  let end = 0
  for (const { length } of ranges) {
    positions.push(end + limeHeaderLength)
    end += limeHeaderLength + length
  }
  await prepare(target, end, options)
  for (const [i, range] of ranges.entries()) {
    await target.write(positions[i]! - limeHeaderLength, limeHeader(range), options)
    await copyRanges(vm, [range], [positions[i]!], target, { ...options, onProgress: undefined })
    options.onProgress?.({ done: positions[i]! + range.length, total: end })
  }
  await target.flush(options)
}

function limeHeader({ address, length }: PhysicalRange): Uint8Array {
  const bytes = new Uint8Array(limeHeaderLength)
  const view = viewOf(bytes)
  view.setUint32(0, limeMagic, true)
  view.setUint32(4, 1, true)
  setU64(view, 8, address)
  setU64(view, 16, address + length - 1)
  return bytes
}

function setU64(view: DataView, at: number, value: number): void {
  view.setUint32(at, value % 0x1_0000_0000, true)
  view.setUint32(at + 4, Math.floor(value / 0x1_0000_0000), true)
}

/** A file has its whole length at once, the rest of it being zeroes. */
async function prepare(target: BlockDevice, length: number, options: CallOptions): Promise<void> {
  if (target.growable && target.size < length) await target.resize(length, options)
}

/** @internal Copies each range to its position, in their order. */
export async function copyRanges(
  vm: VmState,
  ranges: readonly PhysicalRange[],
  positions: readonly number[],
  target: BlockDevice,
  { onProgress, ...options }: ExportPhysicalOptions,
): Promise<void> {
  const total = ranges.reduce((sum, { length }) => sum + length, 0)
  let done = 0
  for (const [i, { block, offset, length }] of ranges.entries()) {
    const device = vm.ram.device(block)
    for (let at = 0; at < length; at += pieceLength) {
      const part = Math.min(pieceLength, length - at)
      await copyBlock(device, offset + at, part, target, positions[i]! + at, options)
      done += part
      onProgress?.({ done, total })
    }
  }
}

/** Bytes between two reports of progress. */
const pieceLength = 64 << 20
