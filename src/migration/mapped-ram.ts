/**
 * A saved VM as a mapped-ram file (QEMU 9.0 and later, capability `mapped-ram`): each page of a block at a
 * fixed place, a bitmap for the pages that are there. Owns the layout QEMU writes; the rest of the stream
 * is passed on.
 *
 * ```
 * header, configuration, START | for each block: entry, mapped-ram header, bitmap, … pages at 1 MiB |
 * EOS, footer, empty PART | rest of the stream
 * ```
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { Qcow2Error } from '../core/errors.ts'
import { AlignedWriteQueue } from '../block/write-queue.ts'
import { emptyPart } from './convert.ts'
import { copyBlock } from './export-raw.ts'
import { MigrationParser } from './parser.ts'
import { mappedRamBitmapLength } from './ram-block-list.ts'
import type { ConfigurationSubsection, MigrationRecord, RamBlock } from './records.ts'
import type { VmState } from './vm-state.ts'
import { encodeRecord } from './writer.ts'

/** Where QEMU puts the pages of each block: readers ask for page alignment only. */
const pagesAlignment = 1 << 20
const capability = 'mapped-ram'

/** Options of {@link exportMappedRam}. */
export interface ExportMappedRamOptions extends CallOptions {
  /** Where the stream begins in `target`, behind a header of another format. Default 0. */
  readonly offset?: number | undefined
}

/**
 * Writes the VM to `target`, a new growable device, as QEMU's `migrate file:` with `mapped-ram` does.
 * @returns The length of the file in bytes.
 * @throws Qcow2Error `ERR_UNSUPPORTED` for a stream with `x-ignore-shared`, which goes with mapped-ram in QEMU but not here
 */
export async function exportMappedRam(vm: VmState, target: BlockDevice, options: ExportMappedRamOptions = {}): Promise<number> {
  if (vm.capabilities.includes('x-ignore-shared')) {
    throw new Qcow2Error('ERR_UNSUPPORTED', 'a stream with x-ignore-shared lacks the memory of shared blocks: a mapped-ram file of it would be of no use')
  }
  let at = options.offset ?? 0
  const write = async (bytes: Uint8Array): Promise<void> => {
    await target.write(at, bytes, options)
    at += bytes.length
  }
  const parser = new MigrationParser({ pageSize: vm.ram.pageSize, devices: earlyLengths(vm) })
  for await (const chunk of vm.rest('before', options)) {
    for (const record of parser.push(chunk)) {
      if (record.kind === 'ram-block') at = await writeBlock(vm, record.block, target, at, options)
      else await write(encodeMapped(record))
    }
  }
  await write(emptyPart(vm))
  for await (const chunk of vm.rest('after', options)) await write(chunk)
  await target.flush(options)
  return at
}

/** The device sections that the part before the pages may contain, with their lengths. */
function earlyLengths(vm: VmState): { name: string; instanceId: number; bodyLength: number }[] {
  return vm.devices.map(({ name, instanceId, length }) => ({ name, instanceId, bodyLength: length }))
}

/** The record with the capability listed. */
function encodeMapped(record: MigrationRecord): Uint8Array {
  if (record.kind !== 'configuration') return encodeRecord(record)
  const listed = record.subsections.find((part) => part.name === 'configuration/capabilities')
  const capabilities: ConfigurationSubsection = {
    name: 'configuration/capabilities',
    version: 1,
    capabilities: [...(listed?.capabilities ?? []), capability],
  }
  return encodeRecord({ ...record, subsections: [...record.subsections.filter((part) => part !== listed), capabilities] })
}

/** Writes a block's entry, bitmap and pages; gives the position behind them. */
async function writeBlock(vm: VmState, block: RamBlock, target: BlockDevice, at: number, options: CallOptions): Promise<number> {
  const { pageSize } = vm.ram
  const entry = (mapped: RamBlock['mapped']): Uint8Array => encodeRecord({ kind: 'ram-block', block: { ...block, ...(mapped !== undefined && { mapped }) } })
  const headLength = entry({ version: 1, pageSize, bitmapOffset: 0, pagesOffset: 0 }).length
  const bitmapOffset = at + headLength
  const bitmapLength = mappedRamBitmapLength(block.length, pageSize)
  const pagesOffset = Math.ceil((bitmapOffset + bitmapLength) / pagesAlignment) * pagesAlignment
  await target.write(at, entry({ version: 1, pageSize, bitmapOffset, pagesOffset }), options)
  await target.write(bitmapOffset, bitmapOf(vm, block, bitmapLength), options)
  const end = pagesOffset + block.length
  if (target.growable && target.size < end) await target.resize(end, options)
  await copyBlock(vm.ram.device(block.index), 0, block.length, target, pagesOffset, options)
  return end
}

function bitmapOf(vm: VmState, block: RamBlock, length: number): Uint8Array {
  const bitmap = new Uint8Array(length)
  for (let page = 0; page * vm.ram.pageSize < block.length; page++) {
    if (vm.ram.pageKind(block.index, page * vm.ram.pageSize) !== 'data') continue
    bitmap[page >>> 3] = bitmap[page >>> 3]! | (1 << (page & 7))
  }
  return bitmap
}

/** Writes chunks (a {@link plainStream}) to `target` from byte 0, by large aligned requests; gives their length. */
export async function writeStream(chunks: AsyncIterable<Uint8Array>, target: BlockDevice, options: CallOptions = {}): Promise<number> {
  const queue = new AlignedWriteQueue(target, { signal: options.signal })
  let length = 0
  try {
    for await (const chunk of chunks) {
      await queue.write(chunk)
      length += chunk.length
    }
    await queue.close()
  } catch (error) {
    await queue.abort(error)
    throw error
  }
  return length
}
