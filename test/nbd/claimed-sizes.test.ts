/** Every length, count and offset that an NBD server states, at its extremes, and valid conversations with bytes changed: a typed error in bounded time and memory. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { Qcow2Error } from '../../src/core/errors.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import * as protocol from '../../src/nbd/protocol.ts'
import type { NbdTransport } from '../../src/nbd/transport.ts'

const { chunkDone, optionReplies, optionTypes } = protocol
const cookie = (n: number): Uint8Array => new Uint8Array([0, 0, 0, 0, 0, 0, 0, n])

/** What a right server says to a client that opens an export of 64 KiB, reads 4 KiB and maps it all. */
const conversation: readonly Uint8Array[] = [
  protocol.encodeGreeting(3),
  protocol.encodeOptionReply(optionTypes.structuredReply, optionReplies.ack),
  protocol.encodeOptionReply(optionTypes.setMetaContext, optionReplies.metaContext, Buffer.concat([new Uint8Array([0, 0, 0, 1]), new TextEncoder().encode('base:allocation')])),
  protocol.encodeOptionReply(optionTypes.setMetaContext, optionReplies.ack),
  protocol.encodeOptionReply(optionTypes.go, optionReplies.info, protocol.encodeBlockSizeInfo(1, 4096, 1 << 20)),
  protocol.encodeOptionReply(optionTypes.go, optionReplies.info, protocol.encodeExportInfo(65536, 1 | 4)),
  protocol.encodeOptionReply(optionTypes.go, optionReplies.ack),
  protocol.encodeHoleChunk(cookie(1), 0, 0, 1024),
  protocol.encodeDataChunk(cookie(1), chunkDone, 1024, 3072),
  new Uint8Array(3072),
  protocol.encodeStatusChunk(cookie(2), chunkDone, 1, [{ length: 4096, flags: 0 }, { length: 61_440, flags: 3 }]),
]
const valid = new Uint8Array(Buffer.concat(conversation))

/** Says `bytes`, whatever is asked, and then nothing more. */
function saying(bytes: Uint8Array): NbdTransport {
  return {
    // eslint-disable-next-line @typescript-eslint/require-await -- the contract is asynchronous
    incoming: (async function* () {
      for (let at = 0; at < bytes.length; at += 61) yield bytes.subarray(at, at + 61)
    })(),
    send: () => Promise.resolve(),
    close: () => undefined,
  }
}

async function converse(bytes: Uint8Array): Promise<'right' | Qcow2Error> {
  try {
    const client = await NbdClient.open(saying(bytes), { timeout: 1000 })
    const reading = client.read(0, 4096)
    const mapping = (async () => {
      const extents = []
      for await (const extent of client.map({ length: 65536 })) extents.push(extent)
      return extents
    })()
    const outcomes = await Promise.allSettled([reading, mapping])
    await client.close()
    for (const outcome of outcomes) if (outcome.status === 'rejected') throw outcome.reason
    return 'right'
  } catch (error) {
    if (Qcow2Error.is(error)) return error
    // the claimed size is smaller than what is asked: the caller's mistake
    if (error instanceof RangeError && error.message.includes('past the end')) return new Qcow2Error('ERR_RANGE', error.message)
    throw error
  }
}

test('the conversation itself is right', async () => {
  expect(await converse(valid)).toBe('right')
})

test('any field of one, two, four or eight bytes at its extremes', async () => {
  const before = process.memoryUsage().arrayBuffers
  const extremes: readonly (readonly number[])[] = [[0xff], [0], [0x80], [0xff, 0xff], [0x7f, 0xff, 0xff, 0xff], [0xff, 0xff, 0xff, 0xff], [0, 0, 0, 0], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], [0, 0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]]
  const interesting = valid.length - 3072 - (20 + 4 + 16)
  for (let at = 0; at < valid.length; at++) {
    if (at > interesting && at < interesting + 3072) continue
    for (const extreme of extremes) {
      const bytes = valid.slice()
      bytes.set(extreme.slice(0, valid.length - at), at)
      await converse(bytes)
    }
  }
  expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(150 << 20)
}, 120_000)

test('bytes changed, left out and repeated anywhere', async () => {
  const change = fc.record({ at: fc.nat(valid.length - 1), kind: fc.constantFrom('set', 'cut', 'repeat'), bytes: fc.uint8Array({ minLength: 1, maxLength: 12 }) })
  await fc.assert(fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 4 }), async (changes) => {
    let bytes: Uint8Array = valid.slice()
    for (const { at, kind, bytes: other } of changes) {
      if (kind === 'set') bytes.set(other.subarray(0, Math.max(0, bytes.length - at)), Math.min(at, bytes.length))
      else if (kind === 'cut') bytes = new Uint8Array(Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + other.length)]))
      else bytes = new Uint8Array(Buffer.concat([bytes.subarray(0, at), bytes.subarray(Math.max(0, at - other.length * 4), at), bytes.subarray(at)]))
    }
    const start = performance.now()
    await converse(bytes)
    expect(performance.now() - start).toBeLessThan(2000)
  }), { numRuns: process.env['QCOW2_LONG'] === '1' ? 100_000 : 1500 })
}, 120_000)
