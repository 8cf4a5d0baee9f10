import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Qcow2Error } from '../../src/core/errors.ts'
import * as protocol from '../../src/nbd/protocol.ts'

const u16 = fc.nat(0xffff)
const u32 = fc.nat(0xffff_ffff)
const offset = fc.nat(Number.MAX_SAFE_INTEGER)
const cookie = fc.uint8Array({ minLength: 8, maxLength: 8 })
const name = fc.string({ maxLength: 200 })
const bytes = (...values: number[]): Uint8Array => new Uint8Array(values)

describe('round trips', () => {
  test('request', () => {
    fc.assert(
      fc.property(u16, u16, cookie, offset, u32, (flags, command, cookie, offset, length) => {
        const request = { flags, command, cookie, offset, length }
        expect(protocol.decodeRequest(protocol.encodeRequest(request))).toEqual(request)
      }),
    )
  })

  test('option and option reply', () => {
    fc.assert(
      fc.property(u32, u32, fc.uint8Array({ maxLength: 64 }), (type, option, data) => {
        const head = protocol.encodeOption(type, data)
        expect(protocol.decodeOption(head.subarray(0, 16))).toEqual({ type, length: data.length })
        expect(head.subarray(16)).toEqual(data)
        const reply = protocol.encodeOptionReply(option, type, data)
        expect(protocol.decodeOptionReply(reply.subarray(0, 20))).toEqual({ option, type, length: data.length })
      }),
    )
  })

  test('reply heads, simple and structured', () => {
    fc.assert(
      fc.property(cookie, u32, u16, u16, (cookie, number, flags, type) => {
        const simple = protocol.encodeSimpleReply(cookie, number)
        expect(protocol.replyHeadSize(simple)).toBe(16)
        expect(protocol.decodeReplyHead(simple)).toEqual({ structured: false, cookie, error: number })
        const chunk = protocol.encodeChunk({ flags, type, cookie, length: number })
        expect(protocol.replyHeadSize(chunk)).toBe(20)
        expect(protocol.decodeReplyHead(chunk)).toEqual({ structured: true, flags, type, cookie, length: number })
      }),
    )
  })

  test('info and metadata context requests', () => {
    const queries = fc.array(name, { maxLength: 8 })
    fc.assert(
      fc.property(name, queries, fc.array(u16, { maxLength: 8 }), (name, queries, requests) => {
        const count = new Uint8Array(4)
        new DataView(count.buffer).setUint32(0, queries.length)
        const data = Buffer.concat([protocol.encodeString(name), count, ...queries.map(protocol.encodeString)])
        expect(protocol.decodeMetaContextRequest(data)).toEqual({ name, queries })
        const list = Buffer.alloc(2 + requests.length * 2)
        list.writeUInt16BE(requests.length)
        requests.forEach((request, at) => list.writeUInt16BE(request, 2 + at * 2))
        expect(protocol.decodeInfoRequest(Buffer.concat([protocol.encodeString(name), list]))).toEqual({ name, requests })
      }),
    )
  })
})

test('known bytes', () => {
  expect(protocol.encodeGreeting(3)).toEqual(
    bytes(0x4e, 0x42, 0x44, 0x4d, 0x41, 0x47, 0x49, 0x43, 0x49, 0x48, 0x41, 0x56, 0x45, 0x4f, 0x50, 0x54, 0, 3),
  )
  expect(protocol.encodeExportName(0x1234, 5, true)).toHaveLength(134)
  expect(protocol.encodeExportName(0x1234, 5, false)).toEqual(bytes(0, 0, 0, 0, 0, 0, 0x12, 0x34, 0, 5))
  expect(protocol.encodeBlockSizeInfo(1, 4096, 65536)).toEqual(bytes(0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 0, 1, 0, 0))
})

test('an offset past 2^53 decodes to Infinity: that request fails, not the connection', () => {
  const request = protocol.encodeRequest({ flags: 0, command: 0, cookie: new Uint8Array(8), offset: 0, length: 1 })
  request[16] = 0xff
  expect(protocol.decodeRequest(request).offset).toBe(Infinity)
})

test('arbitrary bytes are decoded or refused with ERR_FORMAT', () => {
  const decoders: [number, (data: Uint8Array) => unknown][] = [
    [protocol.sizes.greeting, protocol.decodeGreeting],
    [protocol.sizes.option, protocol.decodeOption],
    [protocol.sizes.optionReply, protocol.decodeOptionReply],
    [protocol.sizes.request, protocol.decodeRequest],
    [0, protocol.decodeInfoRequest],
    [0, protocol.decodeMetaContextRequest],
    [0, protocol.decodeName],
    [4, protocol.replyHeadSize],
  ]
  fc.assert(
    fc.property(fc.constantFrom(...decoders), fc.uint8Array({ maxLength: 100 }), ([size, decode], tail) => {
      try {
        decode(Buffer.concat([new Uint8Array(size), tail]))
      } catch (error) {
        expect(Qcow2Error.is(error, 'ERR_FORMAT')).toBe(true)
      }
    }),
    { numRuns: 1000 },
  )
})

test('counts that do not fit are refused before anything is allocated', () => {
  const data = bytes(0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff)
  expect(() => protocol.decodeMetaContextRequest(data)).toThrow('4294967295 items do not fit in the 0 bytes left')
  expect(() => protocol.decodeInfoRequest(bytes(0xff, 0xff, 0xff, 0xff, 0, 0))).toThrow('at most 4096')
})
