/** Runs of zeroes and of other bytes, in grains: what is smaller than a grain is not worth a hole. */
import { isZero } from './zero.ts'

/** A run of grains that are all zero, or all not. */
export interface ZeroRun {
  /** Behind its last byte. */
  readonly end: number
  readonly zero: boolean
}

/**
 * The run that begins at `from`. Grains of `grain` bytes begin at its multiples, counted from `offset` bytes before `bytes`;
 * the first and the last may be cut. With a grain of 0 everything is one run that counts as not zero.
 */
export function zeroRun(bytes: Uint8Array, from: number, grain: number, offset = 0): ZeroRun {
  if (grain === 0) return { end: bytes.length, zero: false }
  const grainEnd = (at: number): number => Math.min(bytes.length, (Math.floor((offset + at) / grain) + 1) * grain - offset)
  let end = grainEnd(from)
  const zero = isZero(bytes, from, end - from)
  while (end < bytes.length) {
    const next = grainEnd(end)
    if (isZero(bytes, end, next - end) !== zero) break
    end = next
  }
  return { end, zero }
}
