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

test.each<[string, Handler]>([
  ['the first half twice and the second never', (request, reply) => {
    const half = new Uint8Array(2048).fill(1)
    void reply(...data(request, half, 0), ...data(request, half))
  }],
  ['chunks that overlap by a byte', (request, reply) => {
    const { cookie, offset } = request
    void reply(...data(request, new Uint8Array(2048), 0), protocol.encodeDataChunk(cookie, 0, offset + 2047, 2048), new Uint8Array(2048), protocol.encodeDataChunk(cookie, chunkDone, offset + 4095, 1), nothing.slice(), new Uint8Array(1))
  }],
  ['a hole over its data', (request, reply) => void reply(...data(request, new Uint8Array(4095), 0), protocol.encodeHoleChunk(request.cookie, chunkDone, request.offset + 4094, 1))],
  ['pieces of one byte, every other one', ({ cookie, offset }, reply) => {
    for (let at = 0; at < 4096; at += 2) void reply(protocol.encodeDataChunk(cookie, 0, offset + at, 1), new Uint8Array(1))
    void reply(protocol.encodeChunk({ flags: chunkDone, type: chunkTypes.none, cookie, length: 0 }))
  }],
])('a read that is answered with %s never resolves with bytes that did not come', async (_name, handler) => {
  await using client = await connected(handler)
  await expect(client.readInto(0, new Uint8Array(4096).fill(7))).rejects.toMatchObject({ code: 'ERR_IO', cause: { code: 'ERR_FORMAT' } })
})

test('chunks in any order and of any size fill a read', async () => {
  const order = Array.from({ length: 512 }, (_, at) => (at * 205) % 512)
  await using client = await connected(({ cookie, offset }, reply) => {
    for (const at of order) void reply(protocol.encodeDataChunk(cookie, 0, offset + at * 8, 8), new Uint8Array(8).fill(at % 255))
    void reply(protocol.encodeChunk({ flags: chunkDone, type: chunkTypes.none, cookie, length: 0 }))
  })
  expect(await client.read(0, 4096)).toEqual(Uint8Array.from({ length: 4096 }, (_, at) => (at >> 3) % 255))
})

test('errors without an end are given up: at once where they are many, in time where they are slow', async () => {
  const error = (cookie: Uint8Array): Uint8Array => protocol.encodeChunk({ flags: 0, type: chunkTypes.error, cookie, length: 6 })
  await using many = await connected(({ cookie }, reply) => {
    for (let n = 0; n < 1000; n++) void reply(error(cookie), new Uint8Array([0, 0, 0, 5, 0, 0]))
  })
  await expect(many.read(0, 512)).rejects.toMatchObject({ code: 'ERR_IO', cause: { code: 'ERR_FORMAT' } })
  await using slow = await connected(({ cookie }, reply) => void setInterval(() => void reply(error(cookie), new Uint8Array([0, 0, 0, 5, 0, 0])), 10).unref(), { timeout: 200 })
  await expect(slow.read(0, 512)).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining('200 ms') as string })
})

test('a byte now and then is no sign of life', async () => {
  await using client = await connected(({ cookie }, reply) => {
    const bytes = protocol.encodeSimpleReply(cookie, 0)
    let at = 0
    setInterval(() => void reply(at < bytes.length ? bytes.subarray(at, ++at) : new Uint8Array(1)), 10).unref()
  }, { timeout: 200 })
  await expect(client.read(0, 512)).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining('200 ms') as string })
})

test('answers that come one after the other are signs of life, however slow they are together', async () => {
  await using client = await connected((request, reply) => void setTimeout(() => void reply(...data(request, new Uint8Array(request.length))), 60 * (1 + request.offset / 4096)), { timeout: 150 })
  const reads = [0, 1, 2, 3, 4].map((n) => client.read(n * 4096, 16))
  expect((await Promise.all(reads)).length).toBe(5)
})

test('the requests of others do not keep a silent server alive', async () => {
  await using client = await connected(() => undefined, { timeout: 100 })
  const first = client.read(0, 512).catch((error: unknown) => error)
  const more = setInterval(() => void client.read(512, 512).catch(() => undefined), 10)
  expect(await first).toMatchObject({ code: 'ERR_IO' })
  clearInterval(more)
})

test('four million status runs are refused before they are read', async () => {
  let sent = 0
  await using client = await connected(({ cookie }, reply) => {
    void reply(protocol.encodeChunk({ flags: chunkDone, type: chunkTypes.blockStatus, cookie, length: 4 + 8 * 4_000_000 })).then(() => sent++)
  })
  await expect(client.map()[Symbol.asyncIterator]().next()).rejects.toMatchObject({ cause: { code: 'ERR_FORMAT' } })
  expect(sent).toBe(1)
})

test('a million status runs in one reply cost their bytes and no objects', async () => {
  const runs = Array.from({ length: 1 << 20 }, (_, at) => ({ length: 512, flags: at & 1 }))
  await using client = await connected(({ cookie }, reply) => void reply(protocol.encodeStatusChunk(cookie, chunkDone, 1, runs)))
  let extents = 0
  for await (const extent of client.map()) {
    extents++
    expect(extent.length).toBe(512)
    if (extents === 5000) break
  }
  expect(extents).toBe(5000)
})

test('a map in steps of one byte ends in an error, not after a request for every byte', async () => {
  let requests = 0
  await using client = await connected(({ cookie }, reply) => {
    requests++
    void reply(protocol.encodeStatusChunk(cookie, chunkDone, 1, [{ length: 1, flags: 1 }]))
  })
  await expect(async () => {
    for await (const extent of client.map()) expect(extent.length).toBeGreaterThan(0)
  }).rejects.toMatchObject({ code: 'ERR_FORMAT' })
  expect(requests).toBeLessThan(5000)
})

test.each<[string, (type: number) => Uint8Array[]]>([
  ['answers another option', (type) => [protocol.encodeOptionReply(type + 1, optionReplies.ack)]],
  ['sends replies without end', (type) => Array.from({ length: 40 }, () => protocol.encodeOptionReply(type, optionReplies.info, new Uint8Array(60_000)))],
  ['sends a reply of 4 GiB', (type) => [protocol.encodeOptionReply(type, optionReplies.info).fill(0xff, 16)]],
])('a server that %s in the negotiation is refused', async (_name, replies) => {
  const [ours, theirs] = pipe()
  void (async () => {
    const reader = new ByteReader(theirs.incoming)
    await theirs.send([protocol.encodeGreeting(3)])
    await reader.read(4)
    for (;;) {
      const { type, length } = protocol.decodeOption(await reader.read(16))
      await reader.skip(length)
      for (const reply of replies(type)) await theirs.send([reply])
    }
  })().catch(() => undefined)
  await expect(NbdClient.open(ours, { timeout: 2000 })).rejects.toMatchObject({ code: 'ERR_FORMAT' })
})
