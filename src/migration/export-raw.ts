/** Guest RAM as raw bytes: one RAM block, byte for byte. Zeroes are skipped where that changes nothing. */
import { checkRange, type BlockDevice, type CallOptions } from '../block/device.ts'
import type { VmState } from './vm-state.ts'

const copySize = 1 << 20

/** Options of {@link exportRaw}. */
export interface ExportRawOptions extends CallOptions {
  /**
   * `skip`: write no zeroes; `target` must read as zeroes already, as a new file does, which then stays
   * sparse. `write`: write everything. Default `skip`.
   */
  readonly zeroes?: 'skip' | 'write' | undefined
}

/** Writes RAM block `which` to `target` from byte 0. Absent pages are zeroes. A growable target becomes at least as large; a larger one
 * keeps what lies behind. */
export async function exportRaw(vm: VmState, which: string | number, target: BlockDevice, options: ExportRawOptions = {}): Promise<void> {
  const source = vm.ram.device(which)
  if (target.growable && target.size < source.size) await target.resize(source.size, options)
  checkRange(0, source.size, target.size)
  await copyBlock(source, 0, source.size, target, 0, options)
  await target.flush(options)
}

/** @internal Copies `length` bytes from `from` of `source` to `to` of `target`, by extents. */
export async function copyBlock(
  source: BlockDevice,
  from: number,
  length: number,
  target: BlockDevice,
  to: number,
  options: ExportRawOptions = {},
): Promise<void> {
  const { signal, zeroes } = options
  const buffers: Uint8Array[] = []
  let turn = 0
  let writing: Promise<void> = Promise.resolve()
  for await (const { start, length: run, zero } of source.map({ offset: from, length, signal })) {
    if (zero) {
      if (zeroes === 'write') await target.writeZeroes(to + start - from, run, { signal })
      continue
    }
    for (let at = start; at < start + run; at += copySize) {
      const piece = (buffers[turn++ % 2] ??= new Uint8Array(Math.min(copySize, length))).subarray(0, Math.min(copySize, start + run - at))
      await source.readInto(at, piece, { signal })
      await writing
      writing = target.write(to + at - from, piece, { signal })
      writing.catch(() => undefined) // reported where it is awaited
    }
  }
  await writing
}
