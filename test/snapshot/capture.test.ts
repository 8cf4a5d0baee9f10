/** Receiving migration streams: what is whole is kept, what is not leaves nothing. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { capture } from '../../src/snapshot/capture.ts'
import { deviceStreamSink } from '../../src/snapshot/save-sink.ts'
import { StreamCheck } from '../../src/snapshot/stream-check.ts'
import { capture as bytesOf, expected } from '../migration/captures.ts'

/** Streams whose pages the parser of a whole stream reads; mapped-ram needs a seekable file. */
const names = Object.keys(expected).filter((name) => /\.(mig|vmstate)$/.test(name) && !name.includes('mappedram') && !name.includes('ignore-shared'))

describe.each(names)('%s', (name) => {
  const bytes = bytesOf(name)

  test('is whole', async () => {
    const device = new MemoryDevice(0, { growable: true })
    const summary = await capture(bytes, deviceStreamSink(device))
    expect(Buffer.compare(device.bytes, bytes)).toBe(0)
    const { machine, blocks, counts, device_sections: devices } = expected[name]!
    expect(summary.machine).toBe(machine)
    expect(Object.fromEntries(summary.blocks.map((block) => [block.name, block.length]))).toEqual(blocks)
    expect(summary.devices).toBe(devices)
    expect(summary.pages).toEqual({ zero: counts!.zero, data: counts!.normal + counts!.xbzrle + counts!.compressed })
    expect(summary.length).toBe(bytes.length)
  })

  test('cut anywhere is refused and leaves nothing', async () => {
    await fc.assert(
      fc.asyncProperty(fc.integer({ min: 0, max: bytes.length - 1 }), async (length) => {
        const device = new MemoryDevice(0, { growable: true })
        await expect(capture(bytes.subarray(0, length), deviceStreamSink(device))).rejects.toMatchObject({ code: 'ERR_STREAM' })
        expect(device.size).toBe(0)
      }),
      { numRuns: 10 },
    )
  })
})

test('a stream that lacks the memory of a RAM block is refused, with the block and the reason', async () => {
  const device = new MemoryDevice(0, { growable: true })
  await expect(capture(bytesOf('qemu100-ignore-shared-uuid.mig'), deviceStreamSink(device))).rejects.toMatchObject({
    code: 'ERR_STREAM',
    message: expect.stringMatching(/RAM block pc\.ram \(4194304 bytes\).*x-ignore-shared/) as string,
  })
  expect(device.size).toBe(0)
})

test.each([
  ['TLS', [0x16, 0x03, 0x01, 0x02, 0x00], /encrypted \(TLS\).*tls-creds/],
  ['a channel of multifd', [0x11, 0x22, 0x33, 0x44, 0x00], /multifd/],
])('%s is recognised by its first bytes, however they come', async (_what, bytes, message) => {
  for (const chunks of [[bytes], bytes.map((byte) => [byte])]) {
    const source = chunks.map((chunk) => Uint8Array.from(chunk))
    await expect(capture(source, deviceStreamSink(new MemoryDevice(0, { growable: true })))).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', message: expect.stringMatching(message) as string })
  }
})

test('any chunking gives the same summary', () => {
  const bytes = bytesOf('qemu100-bgsnap.mig')
  const whole = new StreamCheck()
  whole.push(bytes)
  const summary = whole.end()
  fc.assert(
    fc.property(fc.array(fc.integer({ min: 1, max: 100_000 }), { minLength: 1, maxLength: 20 }), (sizes) => {
      const check = new StreamCheck()
      for (let at = 0, turn = 0; at < bytes.length; turn++) {
        const size = sizes[turn % sizes.length]! + (turn > 200 ? 10_000 : 0)
        check.push(bytes.subarray(at, at + size))
        at += size
      }
      expect(check.end()).toEqual(summary)
    }),
    { numRuns: 20 },
  )
})

test('a stream whose device sections are not those of its description is refused', async () => {
  const bytes = bytesOf('qemu100-bgsnap.mig').slice()
  const at = Buffer.from(bytes).indexOf('"instance_id": 0')
  bytes[at + 15] = '1'.charCodeAt(0)
  await expect(capture(bytes, deviceStreamSink(new MemoryDevice(0, { growable: true })))).rejects.toThrow(
    /is not what the VM description lists here/,
  )
})

test('the first page section is told once, and a refusal at the end leaves nothing', async () => {
  const device = new MemoryDevice(0, { growable: true })
  let told = 0
  const captured = capture(bytesOf('qemu72-bgsnap.mig'), deviceStreamSink(device), {
    onFirstPages: () => {
      told++
    },
    accept: () => Promise.reject(new Error('the count is wrong')),
  })
  await expect(captured).rejects.toThrow('the count is wrong')
  expect(told).toBe(1)
  expect(device.size).toBe(0)
})

test('an aborted capture rejects with the reason', async () => {
  const device = new MemoryDevice(0, { growable: true })
  const abort = new AbortController()
  const captured = capture(bytesOf('qemu72-bgsnap.mig'), deviceStreamSink(device), {
    signal: abort.signal,
    onFirstPages: () => abort.abort(new Error('enough')),
  })
  await expect(captured).rejects.toThrow('enough')
  expect(device.size).toBe(0)
})
