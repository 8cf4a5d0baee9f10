/** Saved VMs in compressed files that are larger than everything on the way holds at once. */
import * as zlib from 'node:zlib'
import { describe, expect, test } from 'vitest'
import { capturedVmState, enlargedVmState } from '../../bench/vm-state.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { expectBytes } from '../support/bytes.ts'
import { libvirtImage, zstdFrame } from './libvirt.ts'

/** Random pages: as large compressed as they are, so that more than 16 chunks of 1 MiB are read. */
const stream = Uint8Array.from(enlargedVmState(capturedVmState(), 20 << 20))

const compressions: Record<string, () => Uint8Array> = {
  gzip: () => zlib.gzipSync(stream, { level: 1 }),
  'gzip of several members': () => Buffer.concat([zlib.gzipSync(stream.subarray(0, 9_000_000), { level: 1 }), zlib.gzipSync(stream.subarray(9_000_000), { level: 0 })]),
  zstd: () => zstdFrame(stream),
  'zstd of several frames': () => Buffer.concat([zstdFrame(stream.subarray(0, 9_000_000)), Uint8Array.of(0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3), zstdFrame(stream.subarray(9_000_000))]),
  'zstd by Node': () => ('zstdCompressSync' in zlib ? (zlib as unknown as { zstdCompressSync(bytes: Uint8Array): Uint8Array }).zstdCompressSync(stream) : zstdFrame(stream)),
}

describe.each(Object.keys(compressions))('%s', (compression) => {
  const bytes = compressions[compression]!()

  test.each(['alone', 'in a save image of libvirt'])('%s', async (where) => {
    const file = where === 'alone' ? bytes : libvirtImage(bytes, compression.startsWith('gzip') ? 1 : 5)
    await using vm = await VmState.index(new MemoryDevice(Uint8Array.from(file)))
    expect(vm.streamLength).toBe(stream.length)
    expectBytes(await vm.storage.read(0, stream.length), stream)
    expect(vm.libvirt?.domainXml).toBe(where === 'alone' ? undefined : '<domain/>')
  })
})
