/** Streams of targets other than x86: other page sizes, other devices. */
import { readFileSync } from 'node:fs'
import { resolve } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import { decodeStruct } from '../../src/migration/device-fields.ts'
import { locateVmDescription, parseVmDescription } from '../../src/migration/vm-description.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { encodeRecord } from '../../src/migration/writer.ts'
import { sha256 } from './captures.ts'

function stream(target: string): Uint8Array {
  return new Uint8Array(gunzipSync(readFileSync(resolve(import.meta.dirname, `../fixtures/targets/${target}.mig.gz`))))
}

test.each([
  ['aarch64', { machine: 'virt-7.2', pageSize: 4096, memory: 'mach-virt.ram', devices: 16, pattern: 0x100000, sha: 'b072ba14d76ed078793e269758de1173cecf4d92aa1d04306c6d6599ad99ab5f' }],
  ['arm', { machine: 'versatilepb', pageSize: 1024, memory: 'versatile.ram', devices: 36, pattern: 0x100000, sha: 'a2f9e57587c69a6fccc68b1b3d05b209ce7e89c974413864774d52382e358257' }],
])('%s: memory is what pmemsave wrote, and every device is decoded', async (target, want) => {
  await using vm = await VmState.index(new MemoryDevice(stream(target)))
  expect(vm.machine).toBe(want.machine)
  expect(vm.ram.pageSize).toBe(want.pageSize)
  const length = vm.ram.blocks.find(({ name }) => name === want.memory)!.length
  expect(length).toBe(16 << 20)
  expect(sha256(await vm.ram.read(want.memory, 0, length))).toBe(want.sha)
  const page = await vm.ram.read(want.memory, want.pattern + 5 * 4096, 4096)
  expect(new Uint32Array(page.buffer)).toEqual(new Uint32Array(1024).fill(5))
  expect(vm.devices).toHaveLength(want.devices)
  expect(vm.tailOffset).toBeUndefined()
  for (const device of vm.devices) expect(Object.keys(await vm.decodeDevice(device))).not.toHaveLength(0)
})

test.each(['aarch64', 'arm'])('%s: written again, the same bytes', (target) => {
  const bytes = stream(target)
  const parser = new MigrationParser({ pageSize: target === 'arm' ? 1024 : undefined })
  const written: Uint8Array[] = []
  for (const record of parser.push(bytes)) written.push(encodeRecord(record))
  parser.end()
  expect(Buffer.compare(Buffer.concat(written), bytes)).toBe(0)
})

test('aarch64: the page size is in the configuration', () => {
  const parser = new MigrationParser()
  for (const record of parser.push(stream('aarch64'))) if (record.kind === 'ram-block') break
  expect(parser.configuration?.subsections).toContainEqual(expect.objectContaining({ name: 'configuration/target-page-bits', pageBits: 12 }))
  expect(parser.pageSize).toBe(4096)
})

test('s390x: a live section of a kind that is not known is refused by name and place', async () => {
  const vm = VmState.index(new MemoryDevice(stream('s390x')))
  await expect(vm).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', message: expect.stringMatching(/'s390-storage_attributes' .*at offset 87/) as string })
})

test('s390x: elements that QEMU 7.2 describes as structures without fields are missing ones', () => {
  const bytes = stream('s390x')
  const { start, length } = locateVmDescription(bytes)!
  const { devices } = parseVmDescription(bytes.subarray(start, start + length))
  const css = devices.find(({ name }) => name === 's390_css')!
  const name = Buffer.from(bytes).lastIndexOf('s390_css', start)
  // behind the name: instance and version
  const values = decodeStruct(css, bytes.subarray(name + 's390_css'.length + 8))
  expect(values).toMatchObject({ max_cssid: 0, max_ssid: 0, css: Array(256).fill(null) })
})
