/** The server against our own client: a model of the disk, arbitrary cuts of the stream, several connections. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import type { BlockDevice } from '../../src/block/device.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import type { NbdExport } from '../../src/nbd/export.ts'
import { NbdServer, type NbdServerOptions } from '../../src/nbd/server.ts'
import { pipe } from './support/pipe.ts'
import { blockSize, SparseDevice } from './support/sparse-device.ts'

const size = 16 * blockSize + 100

async function connectTo(server: NbdServer, lengths?: readonly number[], name = ''): Promise<NbdClient> {
  const [ours, theirs] = pipe(lengths)
  void server.serve(theirs)
  return NbdClient.open(ours, { name })
}

function serverOf(device: BlockDevice, options?: NbdServerOptions & Partial<NbdExport>): NbdServer {
  const errors: unknown[] = []
  return new NbdServer([{ name: '', device, ...options }], { onConnectionError: (error) => errors.push(error), ...options })
}

type Step =
  | { op: 'write'; offset: number; length: number; fill: number }
  | { op: 'zero' | 'discard' | 'read' | 'map'; offset: number; length: number }
  | { op: 'flush' }

const range = fc.tuple(fc.nat(size), fc.nat(size)).map(([a, b]) => ({ offset: Math.min(a, b), length: Math.abs(a - b) }))
const step: fc.Arbitrary<Step> = fc.oneof(
  fc.record({ op: fc.constant('write' as const), range, fill: fc.integer({ min: 1, max: 255 }) }).map(({ op, range, fill }) => ({ op, ...range, fill })),
  fc.record({ op: fc.constantFrom('zero' as const, 'discard' as const, 'read' as const, 'map' as const), range }).map(({ op, range }) => ({ op, ...range })),
  fc.constant({ op: 'flush' as const }),
)
const lengths = fc.array(fc.integer({ min: 1, max: 5000 }), { minLength: 1, maxLength: 5 })

async function apply(client: NbdClient, model: SparseDevice, step: Step): Promise<void> {
  switch (step.op) {
    case 'write': {
      const bytes = new Uint8Array(step.length).fill(step.fill)
      await client.write(step.offset, bytes)
      return model.write(step.offset, bytes)
    }
    case 'zero':
      await client.writeZeroes(step.offset, step.length)
      return model.writeZeroes(step.offset, step.length)
    case 'discard':
      await client.discard(step.offset, step.length)
      return model.discard(step.offset, step.length)
    case 'read': {
      const bytes = await client.read(step.offset, step.length)
      expect(Buffer.compare(bytes, model.bytes.subarray(step.offset, step.offset + step.length))).toBe(0)
      return
    }
    case 'map':
      return expectSameMap(client, model, step)
    case 'flush':
      return client.flush()
  }
}

async function expectSameMap(client: BlockDevice, model: BlockDevice, range: { offset: number; length: number }): Promise<void> {
  const seen = []
  for await (const extent of client.map(range)) seen.push(extent)
  const expected = []
  for await (const extent of model.map(range)) expected.push(extent)
  expect(seen).toEqual(expected)
}

test('any sequence of requests over any cut of the stream equals the same on a plain device', async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(step, { maxLength: 20 }), lengths, async (steps, lengths) => {
      const device = new SparseDevice(size)
      const model = new SparseDevice(size)
      await using server = serverOf(device)
      await using client = await connectTo(server, lengths)
      expect(client.size).toBe(size)
      for (const step of steps) await apply(client, model, step)
      expect(Buffer.compare(device.bytes, model.bytes)).toBe(0)
      expect(device.states).toEqual(model.states)
    }),
    { numRuns: process.env['QCOW2_LONG'] === '1' ? 2000 : 60 },
  )
})

test('many requests under way on several connections are each answered', async () => {
  const device = new SparseDevice(size)
  await using server = serverOf(device)
  const clients = await Promise.all([1, 2, 3, 4].map(() => connectTo(server, [700, 3])))
  await Promise.all(
    Array.from({ length: 16 }, (_, block) => clients[block % 4]!.write(block * blockSize, new Uint8Array(blockSize).fill(block + 1))),
  )
  const blocks = await Promise.all(Array.from({ length: 16 }, (_, block) => clients[(block + 1) % 4]!.read(block * blockSize, blockSize)))
  blocks.forEach((bytes, block) => expect(bytes.every((byte) => byte === block + 1)).toBe(true))
  expect(server.connections).toBe(4)
  await Promise.all(clients.map((client) => client.close()))
})

test('depth of a backing file', async () => {
  const device = new SparseDevice(4 * blockSize)
  device.states.splice(0, 4, 'data', 'backing', 'zero', 'unallocated')
  await using server = serverOf(device)
  await using client = await connectTo(server)
  await expectSameMap(client, device, { offset: 100, length: 3 * blockSize })
})

describe('exports', () => {
  test('are found by name; an unknown one is ERR_NOT_FOUND', async () => {
    const a = new SparseDevice(1000)
    const b = new SparseDevice(2000)
    await using server = new NbdServer([{ name: 'a', device: a }, { name: 'b', device: b }])
    await using client = await connectTo(server, undefined, 'b')
    expect(client.size).toBe(2000)
    await expect(connectTo(server, undefined, 'c')).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    await expect(connectTo(server)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  })

  test('two of one name are refused', () => {
    const device = new SparseDevice(10)
    expect(() => new NbdServer([{ name: 'a', device }, { name: 'a', device }])).toThrow(TypeError)
  })

  test('a read-only one takes no change and says so', async () => {
    const device = new SparseDevice(blockSize)
    await using server = serverOf(device, { readOnly: true })
    await using client = await connectTo(server)
    expect(client.readOnly).toBe(true)
    await expect(client.write(0, new Uint8Array(1))).rejects.toMatchObject({ code: 'ERR_READ_ONLY' })
    expect(device.log).toEqual([])
  })
})

test('the server closes: clients fail, writable devices are flushed, devices stay open', async () => {
  const device = new SparseDevice(size)
  const server = serverOf(device)
  const client = await connectTo(server)
  await client.write(0, new Uint8Array(10))
  await server.close()
  expect(device.flushes).toBe(1)
  expect(device.closed).toBe(false)
  await expect(client.read(0, 1)).rejects.toMatchObject({ code: 'ERR_IO' })
  await client.close()
})

test('connections beyond the limit are closed at once', async () => {
  const device = new SparseDevice(size)
  const errors: unknown[] = []
  await using server = serverOf(device, { maxConnections: 1, onConnectionError: (error) => errors.push(error) })
  await using first = await connectTo(server)
  await expect(connectTo(server)).rejects.toMatchObject({ code: 'ERR_FORMAT' })
  expect(errors).toMatchObject([{ code: 'ERR_BUSY' }])
  expect(await first.read(0, 1)).toEqual(new Uint8Array(1))
})
