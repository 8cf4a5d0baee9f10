/** Postcopy commands and the return path, against real transcripts. */
import { readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { gunzipSync } from 'node:zlib'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { openReturnPath, packaged, ping, postcopyAdvise, postcopyListen, postcopyRamDiscard, postcopyResume, postcopyRun, recvBitmap } from '../../src/migration/postcopy.ts'
import { encodeReturnPath, ReturnPathParser, type ReturnPathMessage } from '../../src/migration/return-path.ts'

const captures = resolve(import.meta.dirname, '../fixtures/captures')
const capture = (name: string): Uint8Array => new Uint8Array(gunzipSync(readFileSync(join(captures, `${name}.gz`))))
const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')
const from = (text: string): Uint8Array => new Uint8Array(Buffer.from(text.replaceAll(' ', ''), 'hex'))
const runs = process.env['QCOW2_LONG'] === '1' ? 2000 : 100

describe('commands', () => {
  test('have the bytes a real source sends', () => {
    expect(hex(openReturnPath())).toBe('0800010000')
    expect(hex(ping(1))).toBe('080002000400000001')
    expect(hex(postcopyAdvise([4096, 4096], 4096))).toBe('080003001000000000000010000000000000001000')
    expect(hex(postcopyAdvise([4096, 2 << 20], 4096))).toBe('080003001000000000002010000000000000001000')
    expect(hex(postcopyListen())).toBe('0800040000')
    expect(hex(postcopyRun())).toBe('0800050000')
    expect(hex(postcopyResume())).toBe('0800090000')
    expect(hex(recvBitmap('pc.ram'))).toBe('08000a00070670632e72616d')
    expect(packaged([from('01'), from('0203')]).map(hex)).toEqual(['080007000400000003', '01', '0203'])
  })

  test('a DISCARD found in a real transcript', () => {
    const [command, ...more] = postcopyRamDiscard('pc.ram', [
      { offset: 0x8000, length: 0x1000 },
      { offset: 0x100000, length: 0x1000 },
      { offset: 0x110000, length: 0x2f0000 },
    ])
    expect(more).toEqual([])
    const transcript = capture('qemu100-postcopy.src2dst.bin')
    expect(Buffer.from(transcript).indexOf(Buffer.from(command!))).toBeGreaterThan(0)
  })

  test('more ranges than one DISCARD holds become several', () => {
    const ranges = Array.from({ length: 10_000 }, (_, index) => ({ offset: index * 8192, length: 4096 }))
    const commands = postcopyRamDiscard('x'.repeat(255), ranges)
    expect(commands.map(({ length }) => length)).toEqual([5 + 258 + 4079 * 16, 5 + 258 + 4079 * 16, 5 + 258 + 1842 * 16])
    for (const command of commands) expect(command.length - 5).toBe((command[3]! << 8) | command[4]!)
  })

  test('what cannot be said is refused', () => {
    expect(() => recvBitmap('')).toThrow(RangeError)
    expect(() => recvBitmap('x'.repeat(256))).toThrow(RangeError)
  })
})

describe('return path', () => {
  test('requests, pongs and the end of a real postcopy', () => {
    const messages = new ReturnPathParser().push(capture('qemu100-postcopy.dst2src.bin'))
    expect(messages.filter(({ kind }) => kind === 'pong').map((message) => (message as { value: number }).value).sort()).toEqual([1, 2, 3, 4])
    expect(messages.filter(({ kind }) => kind === 'request-pages').length).toBeGreaterThan(0)
    expect(messages.at(-1)).toEqual({ kind: 'shut', value: 0 })
  })

  test('a real recovery: bitmaps, acknowledgement, repeated requests', () => {
    const parser = new ReturnPathParser()
    const messages = parser.push(capture('qemu100-recover.dst2src.bin'))
    parser.end()
    const bitmaps = messages.flatMap((message) => (message.kind === 'received-bitmap' ? [message] : []))
    expect(bitmaps.map(({ block }) => block)).toContain('pc.ram')
    expect(bitmaps.find(({ block }) => block === 'pc.ram')!.bitmap.length).toBe(128)
    expect(messages).toContainEqual({ kind: 'resume-ack', value: 1 })
  })

  test('a request without a name is for the block of the one before', () => {
    const parser = new ReturnPathParser()
    const first = from('0003 0014 000000000000f000 00001000 07 70632e62696f73')
    const second = from('0004 000c 0000000000316000 00001000')
    expect(parser.push(first)).toEqual([{ kind: 'request-pages', block: 'pc.bios', offset: 0xf000, length: 0x1000 }])
    expect(parser.push(second)).toEqual([{ kind: 'request-pages', block: 'pc.bios', offset: 0x316000, length: 0x1000 }])
    expect(() => new ReturnPathParser().push(second)).toThrow('before any block was named')
  })

  test.each([
    ['0000 0000', 'message type is 0, allowed 1 to 7'],
    ['0008 0000', 'message type is 8'],
    ['0001 0005', 'length of a message of type 1 is 5, allowed 4'],
    ['0003 0201', 'allowed 14 to 512'],
    ['0003 000e 0000000000000000 00001000 05 41', 'block name of 5 bytes does not fit'],
    ['0005 0002 01 41 0000000000000007', 'bitmap size of block A is 7'],
    ['0005 0002 01 41 0000000010000000', 'allowed multiples of 8 up to 67108864'],
    ['0005 0002 01 41 0000000000000000 0123456789abcdee', 'does not end with its end mark'],
    ['0005 0002 01 41 ffffffffffffffff', 'exceeds 2^53 - 1'],
  ])('%s is refused: %s', (bytes, message) => {
    const parser = new ReturnPathParser()
    expect(() => parser.push(from(bytes))).toThrow(message)
  })

  test('input that ends inside a message is an error', () => {
    const parser = new ReturnPathParser()
    expect(parser.push(from('0001 0004 00'))).toEqual([])
    expect(() => parser.end()).toThrow('input ends 5 bytes into a message')
  })

  const message: fc.Arbitrary<ReturnPathMessage> = fc.oneof(
    fc.record({ kind: fc.constantFrom('shut', 'pong', 'resume-ack'), value: fc.nat(0xffff_ffff) }),
    fc.constant({ kind: 'switchover-ack' } as const),
    fc.record({
      kind: fc.constant('request-pages' as const),
      block: fc.stringMatching(/^[a-z.]{1,30}$/),
      offset: fc.maxSafeNat(),
      length: fc.nat(0xffff_ffff),
    }),
    fc.record({
      kind: fc.constant('received-bitmap' as const),
      block: fc.stringMatching(/^[a-z.]{1,30}$/),
      bitmap: fc.nat(20).chain((words) => fc.uint8Array({ minLength: words * 8, maxLength: words * 8 })),
    }),
  )

  test('any messages, cut anywhere, come out as they went in', () => {
    fc.assert(
      fc.property(fc.array(message, { maxLength: 8 }), fc.array(fc.integer({ min: 1, max: 60 }), { minLength: 1 }), (messages, sizes) => {
        const bytes = Buffer.concat(messages.map(encodeReturnPath))
        const parser = new ReturnPathParser()
        const seen: ReturnPathMessage[] = []
        for (let at = 0, turn = 0; at < bytes.length; turn++) {
          const size = sizes[turn % sizes.length]!
          seen.push(...parser.push(bytes.subarray(at, at + size)))
          at += size
        }
        parser.end()
        expect(seen).toEqual(messages)
      }),
      { numRuns: runs },
    )
  })

  test('random bytes give messages or a typed error', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 600 }), (bytes) => {
        try {
          new ReturnPathParser().push(bytes)
        } catch (error) {
          expect(error).toMatchObject({ code: expect.stringMatching(/^ERR_(STREAM|FORMAT)$/) as string })
        }
      }),
      { numRuns: runs },
    )
  })
})
