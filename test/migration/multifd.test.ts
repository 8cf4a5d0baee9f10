import { deflateSync, constants } from 'node:zlib'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { MigrationParser } from '../../src/migration/parser.ts'
import { MultifdParser } from '../../src/migration/multifd.ts'
import type { RamBlock } from '../../src/migration/records.ts'
import { capture, captureNames, expected, guestProblems, sha256 } from './captures.ts'

/** RAM from the main connection and its channels, in the given chunks. */
function assemble(prefix: string, chunkSize: number): { ram: Map<string, Uint8Array>; totals: Record<string, number> } {
  const main = new MigrationParser()
  const ram = new Map<string, Uint8Array>()
  for (const record of main.push(capture(`${prefix}-main.bin`))) if (record.kind === 'ram-block') ram.set(record.block.name, new Uint8Array(record.block.length))
  const totals = { normal: 0, zero: 0, packets: 0, sync: 0 }
  for (const channel of ['ch0', 'ch1']) {
    const bytes = capture(`${prefix}-${channel}.bin`)
    const parser = new MultifdParser({ blocks: main.blocks })
    let end = 0
    for (let at = 0; at < bytes.length; at += chunkSize) {
      for (const record of parser.push(bytes.subarray(at, at + chunkSize))) {
        expect(record.offset).toBe(end)
        end += record.length
        if (record.kind === 'multifd-init') continue
        totals.packets++
        totals.sync += Number(record.sync)
        totals.normal += record.normal.length
        totals.zero += record.zero.length
        record.normal.forEach((offset, i) => ram.get(record.block)!.set(record.pages.subarray(i * 4096, (i + 1) * 4096), offset))
      }
    }
    parser.end()
    expect(end).toBe(bytes.length)
  }
  return { ram, totals }
}

const prefixes = captureNames(/multifd-.*-main\.bin$/).map((name) => name.slice(0, -'-main.bin'.length))

describe('captures', () => {
  test.each(prefixes)('%s: RAM is as expected', (prefix) => {
    const want = expected[`${prefix}-main.bin`] as (typeof expected)[string] & { totals?: object }
    for (const chunkSize of [1 << 20, 1000]) {
      const { ram, totals } = assemble(prefix, chunkSize)
      expect(guestProblems(ram.get('pc.ram')!)).toEqual([])
      if (want.totals !== undefined) expect(totals).toEqual(want.totals)
      for (const [name, hash] of Object.entries(want.ram_sha256 ?? {})) expect(sha256(ram.get(name)!)).toBe(hash)
    }
  })
})

function packet(fields: { flags?: number; normal?: number; zero?: number; size?: number; name?: string; offset?: number }, payload: Uint8Array = new Uint8Array(0)): Uint8Array {
  const head = new Uint8Array(1344)
  const view = new DataView(head.buffer)
  view.setUint32(0, 0x11223344)
  view.setUint32(4, 1)
  view.setUint32(8, fields.flags ?? 0)
  view.setUint32(16, fields.normal ?? 0)
  view.setUint32(20, fields.size ?? payload.length)
  view.setUint32(32, fields.zero ?? 0)
  head.set(Buffer.from(fields.name ?? 'pc.ram'), 64)
  view.setUint32(324, fields.offset ?? 0)
  return Buffer.concat([head, payload])
}

const init = Buffer.concat([Uint8Array.of(0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1), Buffer.alloc(56)])
const blocks: RamBlock[] = [{ index: 0, name: 'pc.ram', length: 8192 }]

describe('malformed channels', () => {
  test.each<[string, Uint8Array, RegExp]>([
    ['another magic', Uint8Array.of(1, 2, 3, 4), /magic is 0x1020304, expected 0x11223344 \(offset 64\)/],
    ['too many pages', packet({ normal: 100, zero: 29 }), /100 normal and 29 zero pages, allowed up to 128/],
    ['a payload of the wrong length', packet({ normal: 1, size: 4095 }), /4095 bytes of payload for 4096 bytes of pages/],
    ['an unknown block', packet({ zero: 1, name: 'x' }), /RAM block 'x' is not in the list/],
    ['an offset outside', packet({ zero: 1, offset: 8192 }), /page offset 0x2000 is not a page of RAM block 'pc.ram'/],
    ['an offset off the grid', packet({ zero: 1, offset: 1 }), /page offset 0x1 is not a page/],
    ['a compression of hardware', packet({ flags: 16 << 1 }), /compression QATzip at offset 64 is not supported/],
    ['device state', packet({ flags: 0x40 }), /device state packet/],
    ['damaged zlib', packet({ flags: 2, normal: 1 }, Buffer.alloc(100)), /zlib: no valid stream header/],
    ['damaged zstd', packet({ flags: 4, normal: 1 }, Buffer.alloc(100)), /zstd: /],
  ])('%s is refused', (_what, bytes, message) => {
    const parser = new MultifdParser({ blocks })
    expect(() => {
      for (const _ of parser.push(Buffer.concat([init, bytes, Buffer.alloc(2000)]))) continue
    }).toThrow(message)
  })

  test('a stale payload length in a packet without pages is ignored', () => {
    const parser = new MultifdParser({ blocks })
    const records = [...parser.push(Buffer.concat([init, packet({ flags: 1, size: 4096 }), packet({ zero: 2 })]))]
    parser.end()
    expect(records).toHaveLength(3)
  })

  test('random damage ends in a typed error or in records', () => {
    const page = Buffer.alloc(4096, 'abc')
    const good = Buffer.concat([init, packet({ flags: 2, normal: 1 }, deflateSync(page, { finishFlush: constants.Z_SYNC_FLUSH })), packet({ flags: 3, zero: 1 })])
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.nat(good.length - 1), fc.nat(255)), { maxLength: 5 }), (edits) => {
        const bytes = Uint8Array.from(good)
        for (const [at, value] of edits) bytes[at] = value
        try {
          for (const _ of new MultifdParser({ blocks }).push(bytes)) continue
        } catch (error) {
          expect(error).toMatchObject({ code: expect.stringMatching(/^ERR_(STREAM|UNSUPPORTED)$/) as string })
        }
      }),
      { numRuns: process.env['QCOW2_LONG'] === '1' ? 20_000 : 200 },
    )
  })
})
