/** A conversation with a right NBD server, and a client that hears any bytes in its place. */
import { Qcow2Error } from '../../../src/core/errors.ts'
import { NbdClient } from '../../../src/nbd/client.ts'
import * as protocol from '../../../src/nbd/protocol.ts'
import type { NbdTransport } from '../../../src/nbd/transport.ts'

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
/** Its bytes. */
export const valid = new Uint8Array(Buffer.concat(conversation))

/** Says `bytes`, whatever is asked, and then nothing more. */
export function saying(bytes: Uint8Array): NbdTransport {
  return {
    // eslint-disable-next-line @typescript-eslint/require-await -- the contract is asynchronous
    incoming: (async function* () {
      for (let at = 0; at < bytes.length; at += 61) yield bytes.subarray(at, at + 61)
    })(),
    send: () => Promise.resolve(),
    close: () => undefined,
  }
}

/** Opens, reads and maps an export of a server that says `bytes`. */
export async function converse(bytes: Uint8Array): Promise<'right' | Qcow2Error> {
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
