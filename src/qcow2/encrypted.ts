/**
 * Guest data through the cipher. Ciphers know whole sectors, requests are of any length at any offset: a partial sector
 * is read whole for a read, and read, changed and written for a write. A run begins and ends at sectors in the guest and
 * in the file alike, so the rest of a sector always belongs to the same run.
 */
import { InFlight } from '../core/in-flight.ts'
import type { DataCipher, Engine } from './engine.ts'

const sectorSize = 512
/** Bytes of unaligned requests that are bounced at once. */
const bounceSize = 1 << 20

const toSector = (value: number): number => Math.ceil(value / sectorSize) * sectorSize

/** Fills `target` with what is at a host offset, which is one run of guest data. */
export function readEncrypted(engine: Engine, cipher: DataCipher, guest: number, host: number, target: Uint8Array): Promise<void> {
  if (guest % sectorSize !== 0 || target.length % sectorSize !== 0) return readBounced(engine, cipher, guest, host, target)
  return engine.data.readInto(host, target).then(() => cipher.decrypt(guest, host, target))
}

async function readBounced(engine: Engine, cipher: DataCipher, guest: number, host: number, target: Uint8Array): Promise<void> {
  for (let at = 0; at < target.length; ) {
    const before = (guest + at) % sectorSize
    const length = Math.min(target.length - at, bounceSize - before)
    const bytes = engine.host.allocate(toSector(before + length))
    await readEncrypted(engine, cipher, guest + at - before, host + at - before, bytes)
    target.set(bytes.subarray(before, before + length), at)
    at += length
  }
}

/**
 * Stores `source` at a host offset. The caller holds the lock of the clusters: a partial sector takes its neighbours'
 * bytes along.
 */
export function writeEncrypted(engine: Engine, cipher: DataCipher, guest: number, host: number, source: Uint8Array): Promise<void> {
  if (guest % sectorSize !== 0 || source.length % sectorSize !== 0) return writeJoined(engine, cipher, guest, host, source)
  const bytes = engine.host.allocate(source.length)
  bytes.set(source)
  cipher.encrypt(guest, host, bytes)
  return engine.data.write(host, bytes)
}

/** Writes whole sectors: the payload, and at both ends what is stored around it. */
async function writeJoined(engine: Engine, cipher: DataCipher, guest: number, host: number, source: Uint8Array): Promise<void> {
  const before = guest % sectorSize
  const end = before + source.length
  const bytes = engine.host.allocate(toSector(end))
  const last = bytes.length - sectorSize
  const reads = new InFlight()
  const read = (at: number): void => reads.add(readEncrypted(engine, cipher, guest - before + at, host - before + at, bytes.subarray(at, at + sectorSize)))
  if (before > 0) read(0)
  if (end < bytes.length && (last > 0 || before === 0)) read(last)
  await reads.settle()
  bytes.set(source, before)
  cipher.encrypt(guest - before, host - before, bytes)
  await engine.data.write(host - before, bytes)
}
