/**
 * What a postcopy source says to its destination besides pages: the commands of a migration stream,
 * as bytes. Owns their layouts; the order in which to send them is the source's business.
 *
 * ```
 *  08 | be16 command | be16 length | payload
 * ```
 */
import { encodeCommand, type RamRange } from './commands.ts'

export type { RamRange } from './commands.ts'

/** Ranges in one DISCARD command: what fits its be16 length beside the longest block name. */
const discardRanges = 4079

/** OPEN_RETURN_PATH: the destination may answer on the same connection. */
export function openReturnPath(): Uint8Array {
  return encodeCommand({ name: 'openReturnPath' })
}

/** PING: the destination answers PONG with the same value. Only after {@link openReturnPath}. */
export function ping(value: number): Uint8Array {
  return encodeCommand({ name: 'ping', value })
}

/**
 * POSTCOPY_ADVISE: RAM will follow by postcopy. `pageSizes` are the host page sizes in bytes (powers of
 * two) of all RAM blocks at the destination, which compares their OR with its own.
 */
export function postcopyAdvise(pageSizes: Iterable<number>, targetPageSize: number): Uint8Array {
  const hostPageSizes = [...new Set(pageSizes)].reduce((sum, size) => sum + size, 0)
  return encodeCommand({ name: 'postcopyAdvise', hostPageSizes, pageSize: targetPageSize })
}

/** POSTCOPY_LISTEN: from here on pages are placed where the guest waits for them. */
export function postcopyListen(): Uint8Array {
  return encodeCommand({ name: 'postcopyListen' })
}

/** POSTCOPY_RUN: the guest starts. */
export function postcopyRun(): Uint8Array {
  return encodeCommand({ name: 'postcopyRun' })
}

/** POSTCOPY_RESUME: a recovered connection goes on with pages. */
export function postcopyResume(): Uint8Array {
  return encodeCommand({ name: 'postcopyResume' })
}

/** RECV_BITMAP: asks which pages of the RAM block have arrived. */
export function recvBitmap(block: string): Uint8Array {
  return encodeCommand({ name: 'recvBitmap', block })
}

/**
 * POSTCOPY_RAM_DISCARD: the pages of these ranges will come by postcopy. As many commands as it takes.
 *
 * ```
 *  u8 0 (version) | counted block name | u8 0 | 1..n of { be64 offset, be64 length }
 * ```
 */
export function postcopyRamDiscard(block: string, ranges: readonly RamRange[]): Uint8Array[] {
  const commands: Uint8Array[] = []
  for (let first = 0; first < ranges.length; first += discardRanges) {
    commands.push(encodeCommand({ name: 'postcopyRamDiscard', block, ranges: ranges.slice(first, first + discardRanges) }))
  }
  return commands
}

/** PACKAGED: `content` is a piece of stream which the destination reads whole before it acts on it. */
export function packaged(content: readonly Uint8Array[]): Uint8Array[] {
  const packageLength = content.reduce((sum, { length }) => sum + length, 0)
  return [encodeCommand({ name: 'packaged', packageLength }), ...content]
}

/** A string with its length in one byte before it. @throws RangeError unless it has 1 to 255 bytes of UTF-8. */
export function countedString(text: string): Uint8Array {
  const bytes = new TextEncoder().encode(text)
  if (bytes.length < 1 || bytes.length > 255) {
    throw new RangeError(`a counted string has 1 to 255 bytes, not ${bytes.length}`)
  }
  const counted = new Uint8Array(1 + bytes.length)
  counted[0] = bytes.length
  counted.set(bytes, 1)
  return counted
}
