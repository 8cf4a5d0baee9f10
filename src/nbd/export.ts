/**
 * What a server offers: a named device and the metadata contexts a client may ask it about. Owns the
 * translation of a device's map into NBD's states; knows nothing of connections.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { allocationStates, dirtyState, transmissionFlags, type StatusRun } from './protocol.ts'

/** A question a client may ask of every range of an export, for example `base:allocation`. */
export interface NbdMetaContext {
  /** `namespace:leaf`. */
  readonly name: string
  /**
   * The state of the range as runs in order, without gaps, each at least 1 byte. It may end early or
   * run past the range; the server cuts and merges.
   */
  status(offset: number, length: number, options?: CallOptions): AsyncIterable<StatusRun>
}

/** One disk of a server. The caller keeps and closes the device. */
export interface NbdExport {
  /** What clients ask for; the empty name is the default export. */
  readonly name: string
  /** For people, in listings. */
  readonly description?: string | undefined
  /** Any device without a demand on memory alignment (wrap one that has it in `pad()`). */
  readonly device: BlockDevice
  /** Refuse changes; default what the device says. */
  readonly readOnly?: boolean | undefined
  /** Contexts beside `base:allocation` and `qemu:allocation-depth`, for example {@link dirtyBitmapContext}. */
  readonly contexts?: readonly NbdMetaContext[] | undefined
}

/** True if clients may not change the export. */
export function isReadOnly(entry: NbdExport): boolean {
  return entry.readOnly ?? entry.device.readOnly
}

/** The transmission flags that describe an export. `fragments`: the client understands structured replies. */
export function flagsOf(entry: NbdExport, fragments: boolean): number {
  const flags = transmissionFlags
  // one device behind all connections: a flush on any of them covers the writes of all
  const always = flags.hasFlags | flags.sendFlush | flags.sendFua | flags.canMultiConn | (fragments ? flags.sendDf : 0)
  if (isReadOnly(entry)) return always | flags.readOnly
  return always | flags.sendTrim | flags.sendWriteZeroes | flags.sendFastZero
}

/** Every context of an export, by name. */
export function contextsOf(entry: NbdExport): NbdMetaContext[] {
  return [allocationContext(entry.device), allocationDepthContext(entry.device), ...(entry.contexts ?? [])]
}

/** `base:allocation`: hole, zero, both or neither. */
export function allocationContext(device: BlockDevice): NbdMetaContext {
  return {
    name: 'base:allocation',
    async *status(offset, length, options) {
      for await (const { length: bytes, data, zero } of device.map({ offset, length, signal: options?.signal })) {
        yield { length: bytes, flags: (data ? 0 : allocationStates.hole) | (zero ? allocationStates.zero : 0) }
      }
    },
  }
}

/** `qemu:allocation-depth`: 0 unallocated, 1 in the image itself, n in its (n-1)th backing file. */
export function allocationDepthContext(device: BlockDevice): NbdMetaContext {
  return {
    name: 'qemu:allocation-depth',
    async *status(offset, length, options) {
      for await (const { length: bytes, present, depth } of device.map({ offset, length, signal: options?.signal })) {
        yield { length: bytes, flags: present ? depth + 1 : 0 }
      }
    },
  }
}

/** A source of dirty ranges, in order and apart from each other, in bytes. */
export interface DirtyRanges {
  /** The dirty ranges within `[offset, offset + length)`. */
  ranges(offset: number, length: number, options?: CallOptions): AsyncIterable<{ start: number; length: number }> | Iterable<{ start: number; length: number }>
}

/** `qemu:dirty-bitmap:NAME` over the dirty ranges of a bitmap. */
export function dirtyBitmapContext(name: string, bitmap: DirtyRanges): NbdMetaContext {
  return {
    name: `qemu:dirty-bitmap:${name}`,
    async *status(offset, length, options) {
      const end = offset + length
      let at = offset
      for await (const dirty of bitmap.ranges(offset, length, options)) {
        const from = Math.max(dirty.start, at)
        const to = Math.min(dirty.start + dirty.length, end)
        if (to <= from) continue
        if (from > at) yield { length: from - at, flags: 0 }
        yield { length: to - from, flags: dirtyState }
        at = to
      }
      if (at < end) yield { length: end - at, flags: 0 }
    },
  }
}
