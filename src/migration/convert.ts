/**
 * A saved VM written as a stream again: whatever form it was stored in (mapped-ram, XBZRLE,
 * compressed pages, pages sent many times), it becomes a plain stream with every page once. Owns the
 * order of things; the pages come from the index.
 */
import type { CallOptions } from '../block/device.ts'
import { streamError } from './format.ts'
import { RamPart, isZero, ramPartCapacity } from './ram-part.ts'
import type { RamBlock } from './records.ts'
import type { VmState } from './vm-state.ts'

/** Options of {@link plainStream}. */
export interface PlainStreamOptions extends CallOptions {
  /**
   * `keep` writes a record for each zero page, `drop` leaves them out: then the stream suits a fresh
   * VM only (`-incoming`), as `loadvm` does not clear memory first. Default `keep`.
   */
  readonly zeroPages?: 'keep' | 'drop' | undefined
  /** What is done with a stream that is {@link VmState.cut} short: no QEMU loads what comes of it. Default `refuse`. */
  readonly cut?: 'refuse' | 'take' | undefined
}

/** Pages in one PART section. */
const partPages = 256

/**
 * The VM as a plain migration stream that any QEMU loads: the rest byte for byte, every page once and
 * raw, in the order of the blocks. Pages that the source lacks are left out. The chunks belong to the caller.
 * @throws FormatError (`ERR_STREAM`) for a stream that is cut short
 */
export async function* plainStream(vm: VmState, options: PlainStreamOptions = {}): AsyncGenerator<Uint8Array, void, undefined> {
  refuseCut(vm, options.cut)
  yield* vm.rest('before', options)
  for (const block of vm.ram.blocks) yield* blockParts(vm, block, options)
  yield* vm.rest('after', options)
}

/**
 * The VM's stream without any page: machine, RAM block list, devices, VM description. An empty section
 * marks the place of the pages. The chunks belong to the caller.
 * @throws FormatError (`ERR_STREAM`) for a stream that is cut short
 */
export async function* strippedStream(vm: VmState, options: Pick<PlainStreamOptions, 'signal' | 'cut'> = {}): AsyncGenerator<Uint8Array, void, undefined> {
  refuseCut(vm, options.cut)
  yield* vm.rest('before', options)
  yield emptyPart(vm)
  yield* vm.rest('after', options)
}

/** A PART section of RAM without pages. Without any PART, device sections would seem to come before RAM. */
export function emptyPart(vm: VmState): Uint8Array {
  const { sectionId, footers } = vm.ramSection
  const { pageSize } = vm.ram
  return new RamPart(new Uint8Array(ramPartCapacity(0, pageSize)), { sectionId, pageSize, footers }).begin('ram').finish()
}

function refuseCut({ cut, streamOffset, streamLength }: VmState, wanted: PlainStreamOptions['cut']): void {
  if (cut === undefined || wanted === 'take') return
  throw streamError('stream', 'length', `the stream is cut short: ${cut}`, streamOffset + streamLength)
}

async function* blockParts(vm: VmState, block: RamBlock, options: PlainStreamOptions): AsyncGenerator<Uint8Array, void, undefined> {
  const { pageSize } = vm.ram
  const { sectionId, footers } = vm.ramSection
  const keepZero = options.zeroPages !== 'drop'
  const bytes = new Uint8Array(partPages * pageSize)
  for (let offset = 0; offset < block.length; offset += bytes.length) {
    const target = bytes.subarray(0, Math.min(bytes.length, block.length - offset))
    const kinds = pageKinds(vm, block, offset, target.length)
    if (kinds.includes('data')) await vm.ram.readInto(block, offset, target, options)
    const part = new RamPart(new Uint8Array(ramPartCapacity(kinds.length, pageSize)), { sectionId, pageSize, footers })
    part.begin(block.name)
    for (const [i, kind] of kinds.entries()) {
      const at = i * pageSize
      if (kind === 'data' && !isZero(target, at, pageSize)) part.page(offset + at, target, at)
      else if (kind !== 'absent' && keepZero) part.zero(offset + at)
    }
    if (!part.empty) yield part.finish()
  }
}

function pageKinds(vm: VmState, block: RamBlock, offset: number, length: number): ('absent' | 'zero' | 'data')[] {
  const kinds: ('absent' | 'zero' | 'data')[] = []
  for (let at = 0; at < length; at += vm.ram.pageSize) kinds.push(vm.ram.pageKind(block.index, offset + at))
  return kinds
}
