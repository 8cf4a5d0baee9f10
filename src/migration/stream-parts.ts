/**
 * A stream without its pages, taken apart into what a VM needs to start again. Owns finding the parts;
 * sending them is the business of whoever starts the VM.
 */
import { concat } from '../bytes/concat.ts'
import { streamError } from './format.ts'
import { MigrationParser } from './parser.ts'
import type { RamBlock } from './records.ts'
import { deviceLengths, locateVmDescription, parseVmDescription } from './vm-description.ts'

/** The parts, as views of the stream they were found in. */
export interface StreamParts {
  /** Machine type; empty if the stream has no configuration section. */
  readonly machine: string
  /** Header and configuration section. */
  readonly head: Uint8Array
  /** In the order of the stream. */
  readonly blocks: readonly RamBlock[]
  /** Id of the `ram` section. */
  readonly ramSectionId: number
  /** Names of the dirty bitmaps that the stream carries; their contents are in no other part. */
  readonly dirtyBitmaps: readonly string[]
  /** True if sections end with footers. */
  readonly footers: boolean
  /** Device sections before the place of the pages, often none. */
  readonly earlyDevices: Uint8Array
  /** Device sections behind it, up to the EOF byte. */
  readonly devices: Uint8Array
  /** What is behind the EOF byte: the VM description with its head, or nothing. */
  readonly vmDescription: Uint8Array
}

/**
 * Takes a stream without pages apart, as {@link VmState.rest} gives it.
 * @param before What is before the place of the pages.
 * @param after What is behind it.
 * @throws FormatError (`ERR_STREAM`) if the stream is malformed
 */
export function splitStream(before: Uint8Array, after: Uint8Array): StreamParts {
  const location = locateVmDescription(after)
  const lengths =
    location === undefined
      ? undefined
      : deviceLengths(parseVmDescription(after.subarray(location.start, location.start + location.length), before.length + location.start))
  const first = new MigrationParser({ devices: lengths })
  const early: Uint8Array[] = []
  const sections: { id: number; idstr: string }[] = []
  const dirtyBitmaps: string[] = []
  let head = 0
  let section = 0
  let footers = false
  for (const record of first.push(before)) {
    const end = record.offset + record.length
    if (record.kind === 'header' || record.kind === 'configuration') head = end
    if (record.kind === 'section' && record.type === 'start') sections.push({ id: record.id, idstr: record.idstr })
    if (record.kind === 'section' && record.type === 'full') section = record.offset
    if (record.kind === 'dirty-bitmap' && record.granularity !== undefined) dirtyBitmaps.push(record.bitmap ?? '')
    if (record.kind !== 'footer') continue
    footers = true
    if (section > 0) early.push(before.subarray(section, end))
    section = 0
  }
  const { ramSectionId, blocks, configuration } = first
  if (ramSectionId === undefined) throw streamError('stream', 'ram', 'the stream has no ram section', 0)
  const devices = lengths?.slice(early.length)
  const second = new MigrationParser({ offset: before.length, devices, continues: { sections, blocks } })
  let start: number | undefined
  let eof = after.length - 1
  for (const record of second.push(after)) {
    const at = record.offset - before.length
    if ((record.kind === 'section' && record.type === 'full') || (record.kind === 'bytes' && record.of === 'tail')) start ??= at
    if (record.kind === 'eof') eof = at
  }
  second.end()
  return {
    machine: configuration?.machine ?? '',
    head: before.subarray(0, head),
    blocks,
    ramSectionId,
    dirtyBitmaps,
    footers,
    earlyDevices: concat(early),
    devices: after.subarray(start ?? eof, eof),
    vmDescription: after.subarray(eof + 1, location === undefined ? eof + 1 : location.start + location.length),
  }
}
