/** Clients that break the protocol, or lean on the server: refused, in bounded memory, and alone. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { NbdClient } from '../../src/nbd/client.ts'
import * as protocol from '../../src/nbd/protocol.ts'
import { NbdServer } from '../../src/nbd/server.ts'
import { ByteReader } from '../../src/nbd/transport.ts'
import { pipe } from './support/pipe.ts'
import { SparseDevice } from './support/sparse-device.ts'

const { commandFlags, commands, errors, optionReplies, optionTypes } = protocol

/** A client made of raw messages. */
class RawClient {
  readonly errors: unknown[] = []
  readonly device: SparseDevice
  readonly server: NbdServer
  readonly served: Promise<void>
  readonly reader: ByteReader
  readonly send: (...parts: Uint8Array[]) => Promise<void>
  readonly close: () => void
  #cookie = 0

  constructor(device = new SparseDevice(1 << 20), options = {}) {
    const [ours, theirs] = pipe()
    this.device = device
    this.server = new NbdServer([{ name: '', device }], { onConnectionError: (error) => this.errors.push(error), ...options })
    this.served = this.server.serve(theirs)
    this.reader = new ByteReader(ours.incoming)
    this.send = (...parts) => ours.send(parts).catch(() => undefined)
    this.close = () => ours.close()
  }

  async greet(flags = 3): Promise<void> {
    await this.reader.read(18)
    await this.send(new Uint8Array([0, 0, 0, flags]))
  }

  async option(type: number, data = new Uint8Array(0)): Promise<number> {
    await this.send(protocol.encodeOption(type, data))
    for (;;) {
      const reply = protocol.decodeOptionReply(await this.reader.read(20))
      await this.reader.skip(reply.length)
      if (reply.type === optionReplies.ack || reply.type >= 0x8000_0000) return reply.type
    }
  }

  /** Negotiates plain replies, so that each answer is 16 bytes. */
  async begin(): Promise<this> {
    await this.greet()
    expect(await this.option(optionTypes.go, new Uint8Array(6))).toBe(optionReplies.ack)
    return this
  }

  async command(command: number, fields: { flags?: number; offset?: number; length?: number } = {}, payload?: Uint8Array): Promise<number> {
    const { flags = 0, offset = 0, length = 0 } = fields
    const cookie = new Uint8Array(8).fill(++this.#cookie)
    await this.send(protocol.encodeRequest({ flags, command, cookie, offset, length }), ...(payload === undefined ? [] : [payload]))
    const head = protocol.decodeReplyHead(await this.reader.read(16))
    expect(head.cookie).toEqual(cookie)
    return head.structured ? -1 : head.error
  }
}

describe('negotiation', () => {
  test('unknown options are refused and the conversation goes on', async () => {
    const client = new RawClient()
    await client.greet()
    expect(await client.option(99)).toBe(optionReplies.unsupported)
    expect(await client.option(optionTypes.startTls)).toBe(optionReplies.unsupported)
    expect(await client.option(optionTypes.list)).toBe(optionReplies.ack)
    expect(await client.option(optionTypes.list, new Uint8Array(1))).toBe(optionReplies.invalid)
    expect(await client.option(optionTypes.go, new Uint8Array(5))).toBe(optionReplies.invalid)
    expect(await client.option(optionTypes.setMetaContext, new Uint8Array(8))).toBe(optionReplies.invalid)
    expect(await client.option(optionTypes.structuredReply)).toBe(optionReplies.ack)
    expect(await client.option(optionTypes.setMetaContext, new Uint8Array(8))).toBe(optionReplies.ack)
    expect(await client.option(optionTypes.abort)).toBe(optionReplies.ack)
    await client.served
    expect(client.errors).toEqual([])
  })

  test.each([
    ['unknown client flags', (client: RawClient) => client.greet(7), 'unknown handshake flags'],
    ['an option without its magic', async (client: RawClient) => {
      await client.greet()
      await client.send(new Uint8Array(16))
    }, 'magic is not IHAVEOPT'],
    ['four gigabytes of option data', async (client: RawClient) => {
      await client.greet()
      const option = protocol.encodeOption(optionTypes.go, new Uint8Array(0))
      option.fill(0xff, 12)
      await client.send(option)
    }, 'data of 4294967295 bytes, at most 65536'],
    ['an unknown export in the old option', async (client: RawClient) => {
      await client.greet()
      await client.send(protocol.encodeOption(optionTypes.exportName, new TextEncoder().encode('nope')))
    }, "no export named 'nope'"],
    ['options without end', async (client: RawClient) => {
      await client.greet()
      for (let count = 0; count < 1000; count++) await client.option(99)
    }, 'more than 1000 options'],
  ])('%s ends the connection with a typed error', async (_name, act, message) => {
    const client = new RawClient()
    await act(client)
    await client.served
    expect(client.errors).toHaveLength(1)
    expect(client.errors[0]).toMatchObject({ code: 'ERR_FORMAT', message: expect.stringContaining(message) as string })
    expect(client.server.connections).toBe(0)
  })

  test('a client that never speaks is let go', async () => {
    const client = new RawClient(undefined, { handshakeTimeout: 20 })
    await client.served
    expect(client.server.connections).toBe(0)
  })
})

describe('transmission', () => {
  test('requests that cannot be are refused one by one', async () => {
    const client = await new RawClient().begin()
    expect(await client.command(42)).toBe(errors.invalid)
    expect(await client.command(commands.read, { flags: commandFlags.noHole, length: 1 })).toBe(errors.invalid)
    expect(await client.command(commands.read, { offset: 1 << 20, length: 1 })).toBe(errors.invalid)
    expect(await client.command(commands.read, { length: 0xffff_ffff })).toBe(errors.overflow)
    expect(await client.command(commands.write, { offset: 1 << 20, length: 1 }, new Uint8Array(1))).toBe(errors.noSpace)
    expect(await client.command(commands.trim, { offset: 1, length: 1 << 20 })).toBe(errors.noSpace)
    expect(await client.command(commands.blockStatus, { length: 1 })).toBe(errors.invalid)
    expect(await client.command(commands.writeZeroes, { flags: commandFlags.fastZero, offset: 1, length: 1 })).toBe(errors.notSupported)
    expect(await client.command(commands.writeZeroes, { flags: commandFlags.fastZero, length: 4096 })).toBe(0)
    expect(await client.command(commands.writeZeroes, { flags: commandFlags.noHole, length: 4096 })).toBe(0)
    expect(await client.command(commands.flush)).toBe(0)
    expect(client.device.log).toEqual(['zero 0 4096 unmap', 'zero 0 4096'])
    expect(client.device.flushes).toBe(1)
    client.close()
    await client.served
  })

  test('FUA on a write, a trim and zeroes makes them durable before the reply', async () => {
    const client = await new RawClient().begin()
    const fua = { flags: commandFlags.fua, length: 4096 }
    expect(await client.command(commands.write, fua, new Uint8Array(4096))).toBe(0)
    expect(client.device.flushes).toBe(1)
    expect(await client.command(commands.trim, fua)).toBe(0)
    expect(client.device.flushes).toBe(2)
    expect(await client.command(commands.writeZeroes, fua)).toBe(0)
    expect(client.device.flushes).toBe(3)
    client.close()
    await client.served
  })

  test('a write longer than any payload is skipped and refused', async () => {
    const client = await new RawClient().begin()
    const length = protocol.maxPayload + 1
    expect(await client.command(commands.write, { length }, new Uint8Array(length))).toBe(errors.overflow)
    expect(await client.command(commands.flush)).toBe(0)
    client.close()
    await client.served
    expect(client.device.log).toEqual([])
  })

  test('a request without its magic ends the connection; others go on', async () => {
    const client = await new RawClient().begin()
    const [ours, theirs] = pipe()
    void client.server.serve(theirs)
    await using other = await NbdClient.open(ours)
    await client.send(new Uint8Array(28))
    await client.served
    expect(client.errors).toMatchObject([{ code: 'ERR_FORMAT', message: expect.stringContaining('magic is 0x0') as string }])
    expect(await other.read(0, 1)).toEqual(new Uint8Array(1))
  })

  test('a client that asks and never listens holds the device to its budget', async () => {
    const client = await new RawClient(new SparseDevice(8 << 20), { maxRequests: 64 }).begin()
    const request = { flags: 0, command: commands.read, cookie: new Uint8Array(8), offset: 0, length: 8 << 20 }
    for (let count = 0; count < 50; count++) void client.send(protocol.encodeRequest(request))
    await new Promise((resolve) => setTimeout(resolve, 50))
    expect(client.device.log).toHaveLength(4) // 4 times 8 MiB is the budget of 32 MiB
    client.close()
    await client.served
  })
})

test('arbitrary bytes at any point end in a typed error or a clean end', async () => {
  await fc.assert(
    fc.asyncProperty(fc.boolean(), fc.uint8Array({ minLength: 1, maxLength: 200 }), async (begun, bytes) => {
      const client = new RawClient()
      if (begun) await client.begin()
      else await client.reader.read(18)
      await Promise.race([client.send(bytes), client.served])
      client.close()
      await client.served
      for (const error of client.errors) expect(error).toMatchObject({ code: 'ERR_FORMAT' })
      expect(client.device.log).toEqual([])
    }),
    { numRuns: 200 },
  )
})

test('a server that breaks the protocol fails the client with a typed error', async () => {
  await fc.assert(
    fc.asyncProperty(fc.uint8Array({ minLength: 1, maxLength: 200 }), fc.nat(3), async (bytes, part) => {
      const [ours, theirs] = pipe()
      const prefixes = [
        [],
        [protocol.encodeGreeting(3)],
        [protocol.encodeGreeting(3), protocol.encodeOptionReply(optionTypes.structuredReply, optionReplies.ack)],
        [
          protocol.encodeGreeting(3),
          protocol.encodeOptionReply(optionTypes.structuredReply, optionReplies.ack),
          protocol.encodeOptionReply(optionTypes.setMetaContext, optionReplies.ack),
          protocol.encodeOptionReply(optionTypes.go, optionReplies.info, protocol.encodeExportInfo(4096, 1)),
          protocol.encodeOptionReply(optionTypes.go, optionReplies.ack),
        ],
      ]
      void theirs.send([...prefixes[part]!, bytes]).catch(() => undefined)
      setTimeout(() => theirs.close(), 5)
      const outcome = NbdClient.open(ours).then(async (client) => {
        await client.read(0, 4096).finally(() => client.close())
      })
      await expect(outcome).rejects.toMatchObject({ code: expect.stringMatching(/^ERR_(FORMAT|UNSUPPORTED|IO|NOT_FOUND)$/) as string })
    }),
    { numRuns: 60 },
  )
})
