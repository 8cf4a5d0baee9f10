/** Making a part of a device read as zeroes where it does not yet. */
import { isZero } from '../bytes/zero.ts'
import type { BlockDevice, CallOptions } from './device.ts'
import { allocateAligned } from './slab.ts'

const pieceBytes = 1 << 20

/**
 * Writes zeroes where `[offset, offset + length)` has other bytes. Reading first costs less than it seems: what a thin volume
 * has no space for is read from nowhere, and is not given space.
 */
export async function zeroContent(device: BlockDevice, offset: number, length: number, { signal }: CallOptions = {}): Promise<void> {
  const buffer = allocateAligned(Math.min(pieceBytes, Math.max(length, 1)))
  for (let at = 0; at < length; at += buffer.length) {
    const bytes = buffer.subarray(0, Math.min(buffer.length, length - at))
    await device.readInto(offset + at, bytes, { signal })
    if (!isZero(bytes)) await device.writeZeroes(offset + at, bytes.length, { signal })
  }
}
