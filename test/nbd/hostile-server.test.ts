/** Servers that break the protocol, answer late or not at all: no wrong byte, no endless wait, bounded memory. */
import { createServer } from 'node:net'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { NbdClient } from '../../src/nbd/client.ts'
import * as protocol from '../../src/nbd/protocol.ts'
import { connectNbd } from '../../src/nbd/socket.ts'
import { ByteReader, type NbdTransport } from '../../src/nbd/transport.ts'
import { tempFolder } from '../support/temp.ts'
import { pipe } from './support/pipe.ts'

const { chunkDone, chunkTypes, commands, optionReplies, optionTypes } = protocol
const nothing = new Uint8Array(0)

type Reply = (...parts: Uint8Array[]) => Promise<void>
type Handler = (request: protocol.Request, reply: Reply) => void

/** A server that negotiates as it should and then answers as `handler` does. */
async function serve(transport: NbdTransport, handler: Handler): Promise<void> {
  const send = (parts: Uint8Array[]): Promise<void> => transport.send(parts)
  const reader = new ByteReader(transport.incoming)
  await send([protocol.encodeGreeting(3)])
  await reader.read(4)
  for (let type = 0; type !== optionTypes.go; ) {
    const head = await reader.read(16)
    const view = new DataView(head.buffer)
    type = view.getUint32(8)
    await reader.skip(view.getUint32(12))
    if (type === optionTypes.setMetaContext) {
      const context = new TextEncoder().encode('\0\0\0\u0001base:allocation')
      await send([protocol.encodeOptionReply(type, optionReplies.metaContext, context)])
    }
    if (type === optionTypes.go) await send([protocol.encodeOptionReply(type, optionReplies.info, protocol.encodeExportInfo(1 << 30, 1 | 4))])
    await send([protocol.encodeOptionReply(type, optionReplies.ack)])
  }
  for (let head = await reader.tryRead(28); head !== undefined; head = await reader.tryRead(28)) {
    const request = protocol.decodeRequest(head)
    if (request.command === commands.write) await reader.skip(request.length)
    handler(request, (...parts) => send(parts).catch(() => undefined))
  }
}

async function connected(handler: Handler, options = {}): Promise<NbdClient> {
  const [ours, theirs] = pipe()
  void serve(theirs, handler).catch(() => undefined)
  return NbdClient.open(ours, options)
}

const data = ({ cookie, offset }: protocol.Request, bytes: Uint8Array, flags: number = chunkDone): Uint8Array[] => [
  protocol.encodeDataChunk(cookie, flags, offset, bytes.length),
  bytes,
]

test('a read is over only when no part of it can reach the memory any more', async () => {
  const late: (() => Promise<void>)[] = []
  await using client = await connected((request, reply) => {
    if (request.offset === 0) void reply(protocol.encodeErrorChunk(request.cookie, 5, 'broken'))
    else late.push(() => reply(...data(request, new Uint8Array(request.length).fill(0xee))))
  })
  const target = new Uint8Array(protocol.maxPayload + 4096)
  let settled = false
  const reading = client.readInto(0, target).finally(() => (settled = true))
  const rejected = expect(reading).rejects.toThrow('broken')
  await expect.poll(() => late.length).toBe(1)
  await new Promise((resolve) => setTimeout(resolve, 20))
  expect(settled).toBe(false)
  await late[0]!()
  await rejected
  expect(target.at(-1)).toBe(0xee)
})

test('a write is over only when every part of it is', async () => {
  const late: (() => Promise<void>)[] = []
  await using client = await connected((request, reply) => {
    if (request.offset === 0) void reply(protocol.encodeErrorChunk(request.cookie, 28, 'full'))
    else late.push(() => reply(protocol.encodeChunk({ flags: chunkDone, type: chunkTypes.none, cookie: request.cookie, length: 0 })))
  })
  let settled = false
  const rejected = expect(client.write(0, new Uint8Array(protocol.maxPayload + 4096)).finally(() => (settled = true))).rejects.toMatchObject({ code: 'ERR_NO_SPACE' })
  await expect.poll(() => late.length).toBe(1)
  await new Promise((resolve) => setTimeout(resolve, 20))
  expect(settled).toBe(false)
  await late[0]!()
  await rejected
})

test.each<[string, Handler]>([
  ['without any data', ({ cookie }, reply) => void reply(protocol.encodeChunk({ flags: chunkDone, type: chunkTypes.none, cookie, length: 0 }))],
  ['with half of the data', (request, reply) => void reply(...data(request, new Uint8Array(2048)))],
  ['with the same data twice', (request, reply) => void reply(...data(request, new Uint8Array(4096), 0), ...data(request, new Uint8Array(4096)))],
  ['with no bytes over and over', (request, reply) => void reply(...data(request, nothing, 0))],
  ['with the status of a range', ({ cookie }, reply) => void reply(protocol.encodeStatusChunk(cookie, chunkDone, 1, [{ length: 4096, flags: 0 }]))],
])('a read that is answered %s is refused', async (_name, handler) => {
  await using client = await connected(handler)
  await expect(client.readInto(0, new Uint8Array(4096).fill(7))).rejects.toMatchObject({ code: 'ERR_IO', cause: { code: 'ERR_FORMAT' } })
})

test.each<[string, number[]]>([
  ['a context nobody agreed to', [100]],
  ['the same context twice', [1, 1]],
])('the status of %s ends the connection', async (_name, ids) => {
  let sent = 0
  await using client = await connected(({ cookie }, reply) => {
    for (const id of ids) void reply(protocol.encodeStatusChunk(cookie, 0, id, [{ length: 4096, flags: 0 }])).then(() => sent++)
  })
  await expect(client.map()[Symbol.asyncIterator]().next()).rejects.toMatchObject({ cause: { code: 'ERR_FORMAT' } })
  expect(sent).toBe(ids.length)
})

test('a server that stays silent is given up: in the negotiation and while an answer is due', async () => {
  const [ours] = pipe()
  await expect(NbdClient.open(ours, { timeout: 20 })).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining('nothing for 20 ms') as string })
  await using client = await connected(() => undefined, { timeout: 20 })
  for (const call of [client.read(0, 4096), client.write(0, new Uint8Array(4096)), client.flush()]) {
    await expect(call).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining('nothing for 20 ms') as string })
  }
})

test('no answer being due, a server may be silent', async () => {
  await using client = await connected((request, reply) => void reply(...data(request, new Uint8Array(request.length).fill(3))), { timeout: 20 })
  expect(await client.read(0, 2)).toEqual(new Uint8Array([3, 3]))
  await new Promise((resolve) => setTimeout(resolve, 60))
  expect(await client.read(0, 2)).toEqual(new Uint8Array([3, 3]))
})

test('connecting ends when it is aborted, and when nobody answers', async () => {
  const path = join(tempFolder(), 'silent.sock')
  const listener = createServer((socket) => socket.on('error', () => undefined))
  await new Promise<void>((resolve) => listener.listen(path, resolve))
  const enough = new Error('enough')
  await expect(connectNbd({ path }, { signal: AbortSignal.abort(enough) })).rejects.toBe(enough)
  const abort = new AbortController()
  const connecting = connectNbd({ path }, { signal: abort.signal })
  setTimeout(() => abort.abort(enough), 10)
  await expect(connecting).rejects.toBe(enough)
  await expect(connectNbd({ path }, { timeout: 20 })).rejects.toMatchObject({ code: 'ERR_IO' })
  await new Promise((resolve) => listener.close(resolve))
})

test('an aborted read ends at once, and its late bytes go nowhere', async () => {
  const late: (() => Promise<void>)[] = []
  await using client = await connected((request, reply) => {
    late.push(() => reply(...data(request, new Uint8Array(request.length).fill(0xee))))
  })
  const abort = new AbortController()
  const target = new Uint8Array(4096)
  const reading = client.readInto(0, target, { signal: abort.signal })
  const mapping = client.map({ signal: abort.signal })[Symbol.asyncIterator]().next()
  const ended = Promise.all([reading, mapping].map((call) => expect(call).rejects.toThrow('enough')))
  await expect.poll(() => late.length).toBe(2)
  abort.abort(new Error('enough'))
  await ended
  await late[0]!()
  const next = client.read(8192, 4096)
  await expect.poll(() => late.length).toBe(3)
  await late[2]!()
  expect(await next).toEqual(new Uint8Array(4096).fill(0xee))
  expect(target).toEqual(new Uint8Array(4096))
})

test('an aborted write sends no further part and ends when those sent are answered', async () => {
  const late: (() => Promise<void>)[] = []
  await using client = await connected(({ cookie }, reply) => {
    late.push(() => reply(protocol.encodeChunk({ flags: chunkDone, type: chunkTypes.none, cookie, length: 0 })))
  })
  const abort = new AbortController()
  let settled = false
  const writing = client.write(0, new Uint8Array(4096), { signal: abort.signal }).finally(() => (settled = true))
  const rejected = expect(writing).rejects.toThrow('enough')
  await expect.poll(() => late.length).toBe(1)
  abort.abort(new Error('enough'))
  await new Promise((resolve) => setTimeout(resolve, 20))
  expect(settled).toBe(false)
  await late[0]!()
  await rejected
})

test('close does not wait for room at a server that reads nothing', async () => {
  const [ours, theirs] = pipe()
  void serve(theirs, () => undefined).catch(() => undefined)
  let full = false
  const transport: NbdTransport = { ...ours, send: (parts) => (full ? new Promise(() => undefined) : ours.send(parts)) }
  const client = await NbdClient.open(transport)
  full = true
  const writing = expect(client.write(0, new Uint8Array(4096))).rejects.toMatchObject({ code: 'ERR_IO' })
  await client.close()
  await writing
})
