/**
 * What a postcopy source says to its destination besides pages: the commands of a migration stream,
 * as bytes. Owns their layouts; the order in which to send them is the source's business.
 *
 * ```
 *  08 | be16 command | be16 length | payload
 * ```
 */
import { writeU64 } from '../bytes/u64.ts'
import { viewOf } from '../bytes/view.ts'
import { commandNumber, sectionByte } from './format.ts'

/** A run of bytes within a RAM block, both multiples of the page size. */
export interface RamRange {
  readonly offset: number
  readonly length: number
}

/** Ranges in one DISCARD command: what fits its be16 length beside the longest block name. */
const discardRanges = 4079

/** A command with its payload. @throws RangeError for a payload of more than 65 535 bytes. */
export function encodeCommand(command: number, payload: Uint8Array = new Uint8Array(0)): Uint8Array {
  if (payload.length > 0xffff) throw new RangeError(`a command's payload has at most 65535 bytes, not ${payload.length}`)
  const bytes = new Uint8Array(5 + payload.length)
  const view = viewOf(bytes)
  bytes[0] = sectionByte.command
  view.setUint16(1, command)
  view.setUint16(3, payload.length)
  bytes.set(payload, 5)
  return bytes
}

/** OPEN_RETURN_PATH: the destination may answer on the same connection. */
export function openReturnPath(): Uint8Array {
  return encodeCommand(commandNumber.openReturnPath)
}

/** PING: the destination answers PONG with the same value. Only after {@link openReturnPath}. */
export function ping(value: number): Uint8Array {
  const payload = new Uint8Array(4)
  viewOf(payload).setUint32(0, value)
  return encodeCommand(commandNumber.ping, payload)
}

/**
 * POSTCOPY_ADVISE: RAM will follow by postcopy. `pageSizes` are the host page sizes in bytes (powers of
 * two) of all RAM blocks at the destination, which compares their OR with its own.
 */
export function postcopyAdvise(pageSizes: Iterable<number>, targetPageSize: number): Uint8Array {
  const payload = new Uint8Array(16)
  const view = viewOf(payload)
  const summary = [...new Set(pageSizes)].reduce((sum, size) => sum + size, 0)
  writeU64(view, 0, summary)
  writeU64(view, 8, targetPageSize)
  return encodeCommand(commandNumber.postcopyAdvise, payload)
}

/** POSTCOPY_LISTEN: from here on pages are placed where the guest waits for them. */
export function postcopyListen(): Uint8Array {
  return encodeCommand(commandNumber.postcopyListen)
}

/** POSTCOPY_RUN: the guest starts. */
export function postcopyRun(): Uint8Array {
  return encodeCommand(commandNumber.postcopyRun)
}

/** POSTCOPY_RESUME: a recovered connection goes on with pages. */
export function postcopyResume(): Uint8Array {
  return encodeCommand(commandNumber.postcopyResume)
}

/** RECV_BITMAP: asks which pages of the RAM block have arrived. */
export function recvBitmap(block: string): Uint8Array {
  return encodeCommand(commandNumber.recvBitmap, countedString(block))
}

/**
 * POSTCOPY_RAM_DISCARD: the pages of these ranges will come by postcopy. As many commands as it takes.
 *
 * ```
 *  u8 0 (version) | counted block name | u8 0 | 1..n of { be64 offset, be64 length }
 * ```
 */
export function postcopyRamDiscard(block: string, ranges: readonly RamRange[]): Uint8Array[] {
  const name = countedString(block)
  const commands: Uint8Array[] = []
  for (let first = 0; first < ranges.length; first += discardRanges) {
    const some = ranges.slice(first, first + discardRanges)
    const payload = new Uint8Array(2 + name.length + 16 * some.length)
    const view = viewOf(payload)
    payload.set(name, 1)
    some.forEach(({ offset, length }, index) => {
      writeU64(view, 2 + name.length + 16 * index, offset)
      writeU64(view, 10 + name.length + 16 * index, length)
    })
    commands.push(encodeCommand(commandNumber.postcopyRamDiscard, payload))
  }
  return commands
}

/** PACKAGED: `content` is a piece of stream which the destination reads whole before it acts on it. */
export function packaged(content: readonly Uint8Array[]): Uint8Array[] {
  const payload = new Uint8Array(4)
  viewOf(payload).setUint32(0, content.reduce((sum, { length }) => sum + length, 0))
  return [encodeCommand(commandNumber.packaged, payload), ...content]
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
