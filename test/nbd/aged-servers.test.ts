/** Our client with servers of any age, made and real: without structured replies, options, limits or flags. */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { pad } from '../../src/block/pad.ts'
import { NbdClient, type NbdClientOptions } from '../../src/nbd/client.ts'
import { optionReplies, transmissionFlags } from '../../src/nbd/protocol.ts'
import { connectNbd } from '../../src/nbd/socket.ts'
import { tempFolder } from '../support/temp.ts'
import { AgedServer, type Age } from './support/aged-server.ts'
import { pipe } from './support/pipe.ts'

const KiB = 1024

async function connected(age: Age, options: NbdClientOptions = {}, bytes = new Uint8Array(256 * KiB), name = ''): Promise<{ client: NbdClient; server: AgedServer }> {
  const [ours, theirs] = pipe([1000, 7, 65536])
  const server = new AgedServer(age, bytes, name)
  void server.serve(theirs).catch(() => undefined)
  return { client: await NbdClient.open(ours, { timeout: 5000, ...options }), server }
}

const ages: readonly (readonly [string, Age])[] = [
  ['oldstyle', { style: 'oldstyle' }],
  ['oldstyle without flags', { style: 'oldstyle', flags: 0 }],
  ['newstyle', { style: 'newstyle' }],
  ['newstyle without zeroes', { style: 'newstyle', noZeroes: true }],
  ['fixed newstyle with nothing but names', { style: 'fixed' }],
  ['fixed newstyle without go', { style: 'fixed', noZeroes: true, structured: true, contexts: true }],
  ['fixed newstyle without structured replies', { style: 'fixed', noZeroes: true, go: true, blockSizes: [1, 65536] }],
  ['fixed newstyle without contexts', { style: 'fixed', noZeroes: true, go: true, structured: true }],
  ['fixed newstyle without limits', { style: 'fixed', go: true, structured: true, contexts: true }],
  ['everything, small requests only', { style: 'fixed', noZeroes: true, go: true, structured: true, contexts: true, blockSizes: [1, 4096] }],
  ['read and write only', { style: 'fixed', go: true, flags: transmissionFlags.hasFlags }],
  ['options are invalid, not unknown', { style: 'fixed', go: true, refusal: optionReplies.invalid }],
]

test.each(ages)('%s: read, write, zero, discard, flush and map', async (_name, age) => {
  const { client, server } = await connected(age)
  const model = new Uint8Array(256 * KiB)
  const fill = (value: number, from: number, to: number): Uint8Array => model.fill(value, from, to).slice(from, to)
  await client.write(0, fill(5, 0, 70 * KiB))
  await client.write(200 * KiB, fill(6, 200 * KiB, 256 * KiB))
  await client.writeZeroes(8 * KiB, 16 * KiB, { unmap: true })
  model.fill(0, 8 * KiB, 24 * KiB)
  await client.discard(128 * KiB, 4 * KiB)
  await client.flush()
  await client.write(4 * KiB, fill(7, 4 * KiB, 4 * KiB + 512), { fua: true })
  expect(Buffer.compare(server.bytes, model)).toBe(0)
  expect(Buffer.compare(await client.read(0, 256 * KiB), model)).toBe(0)
  expect(await client.read(4 * KiB, 513)).toEqual(model.slice(4 * KiB, 4 * KiB + 513))
  const seen = new Uint8Array(256 * KiB).fill(9)
  for await (const { start, length, zero } of client.map()) seen.set(zero ? new Uint8Array(length) : model.subarray(start, start + length), start)
  expect(Buffer.compare(seen, model)).toBe(0)
  if (age.contexts !== true) {
    const extents = []
    for await (const { start, length, kind } of client.map()) extents.push([start, length, kind])
    expect(extents).toEqual([[0, 256 * KiB, 'data']])
  }
  await client.close()
})

test('any mixture of what a server has and has not gives the same bytes', async () => {
  const age = fc.record({
    style: fc.constantFrom<Age['style']>('oldstyle', 'newstyle', 'fixed'),
    noZeroes: fc.boolean(), go: fc.boolean(), structured: fc.boolean(), contexts: fc.boolean(),
    refusal: fc.constantFrom(optionReplies.unsupported, optionReplies.invalid),
  })
  await fc.assert(fc.asyncProperty(age, fc.nat(5000), fc.integer({ min: 1, max: 9000 }), async (mixture, offset, length) => {
    const whole: Age = mixture.refusal === optionReplies.invalid ? { ...mixture, go: true } : mixture
    const bytes = Uint8Array.from({ length: 16 * KiB }, (_, at) => (at * 7) % 251)
    const { client } = await connected({ ...whole, contexts: whole.contexts === true && whole.structured === true }, {}, bytes)
    expect(await client.read(offset, length)).toEqual(bytes.slice(offset, offset + length))
    await client.close()
  }), { numRuns: 60 })
})

test.each(ages.filter(([, { style }]) => style !== 'oldstyle'))('%s: an export by its name, and none of another', async (_name, age) => {
  const { client } = await connected(age, { name: 'the disk' }, undefined, 'the disk')
  expect(client.size).toBe(256 * KiB)
  await client.close()
  await expect(connected(age, { name: 'another' }, undefined, 'the disk')).rejects.toMatchObject({ code: 'ERR_NOT_FOUND', message: expect.stringContaining("'another'") as string })
})

test('an oldstyle server has no names', async () => {
  await expect(connected({ style: 'oldstyle' }, { name: 'x' })).rejects.toMatchObject({ code: 'ERR_NOT_FOUND', message: expect.stringContaining('oldstyle') as string })
})

test('a server that insists on TLS is named as such', async () => {
  await expect(connected({ style: 'fixed', refusal: optionReplies.tlsRequired })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', message: expect.stringContaining('TLS') as string })
})

test('flags without hasFlags mean nothing', async () => {
  const { client } = await connected({ style: 'newstyle', flags: transmissionFlags.readOnly | transmissionFlags.sendFlush })
  expect(client.readOnly).toBe(false)
  await client.flush()
  await client.close()
})

test('towards a server that tells no block size, requests are as large as asked for', async () => {
  const demanding: Age = { style: 'fixed', go: true, demands: 512 }
  const { client, server } = await connected(demanding, { blockSize: 512 })
  expect(client.limits.requestAlignment).toBe(512)
  const padded = pad(client)
  await padded.write(1000, new Uint8Array(100).fill(3))
  expect([...(await padded.read(999, 3))]).toEqual([0, 3, 3])
  expect(server.bytes[1000]).toBe(3)
  await padded.close()
  const odd = await connected({ style: 'newstyle' }, { blockSize: 512 }, new Uint8Array(1000))
  expect(odd.client.limits.requestAlignment).toBe(1)
  expect(await odd.client.read(990, 10)).toEqual(new Uint8Array(10))
  await odd.client.close()
})

describe.skipIf(!existsSync('/usr/sbin/nbdkit') && !existsSync('/usr/bin/nbdkit'))('nbdkit as an old server', () => {
  test.each([[], ['--no-sr'], ['--mask-handshake=0'], ['--mask-handshake=1'], ['--mask-handshake=2'], ['-o']].map((options) => [options.join(' '), options] as const))('%s', async (_name, options) => {
    const path = join(tempFolder(), 'nbdkit')
    const kit = spawn('nbdkit', ['-f', '-U', path, ...options, 'data', '@0x1000 5*4096', 'size=1M'], { stdio: 'ignore' })
    onTestFinished(() => void kit.kill('SIGKILL'))
    for (let tries = 0; !existsSync(path) && tries < 200; tries++) await new Promise((resolve) => setTimeout(resolve, 25))
    await using client = await connectNbd({ path })
    expect(client.size).toBe(1 << 20)
    expect([...(await client.read(4095, 3))]).toEqual([0, 5, 5])
    let length = 0
    for await (const extent of client.map()) length += extent.length
    expect(length).toBe(1 << 20)
  })
})
