/** A device's first `length` bytes in large pieces, read ahead. Each piece is valid until the next. */
import { allocateAligned, type BlockDevice } from '../src/block.ts'

export async function* prefetched(device: BlockDevice, length: number): AsyncGenerator<Uint8Array, void, undefined> {
  const chunk = 2 << 20
  const total = Math.ceil(length / 4096) * 4096
  const slabs = [0, 1, 2].map(() => allocateAligned(chunk))
  const read = (n: number): Promise<void> | undefined => {
    const at = n * chunk
    return at >= total ? undefined : device.readInto(at, slabs[n % 3]!.subarray(0, Math.min(chunk, total - at)))
  }
  const flights = [read(0), read(1)]
  for (let n = 0; n * chunk < length; n++) {
    await flights[n]
    flights.push(read(n + 2))
    yield slabs[n % 3]!.subarray(0, Math.min(chunk, length - n * chunk))
  }
}
