import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { encodeCommand, readPackage, type Command } from '../../src/migration/commands.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import { packaged } from '../../src/migration/postcopy.ts'
import type { MigrationRecord, RamBlock } from '../../src/migration/records.ts'
import { capture } from './captures.ts'

const block: RamBlock = { index: 0, name: 'pc.ram', length: 4 << 20 }
const continues = { sections: [{ id: 1, idstr: 'ram' }], blocks: [block] }

function records(bytes: Uint8Array, options = { continues }): MigrationRecord[] {
  const parser = new MigrationParser(options)
  return [...parser.push(bytes)]
}

const offsets = fc.integer({ min: 0, max: 2 ** 40 })
const name = fc.string({ minLength: 1, maxLength: 60 })
const u32 = fc.integer({ min: 0, max: 0xffff_ffff })
const command: fc.Arbitrary<Command> = fc.oneof(
  fc.constantFrom('openReturnPath', 'postcopyListen', 'postcopyRun', 'enableColo', 'postcopyResume', 'switchoverStart').map((name) => ({ name })),
  fc.record({ name: fc.constant('ping' as const), value: u32 }),
  fc.constant<Command>({ name: 'postcopyAdvise' }),
  fc.record({ name: fc.constant('postcopyAdvise' as const), hostPageSizes: offsets, pageSize: offsets }),
  fc.record({
    name: fc.constant('postcopyRamDiscard' as const),
    block: name,
    ranges: fc.array(fc.record({ offset: offsets, length: offsets }), { minLength: 1, maxLength: 20 }),
  }),
  fc.record({ name: fc.constant('recvBitmap' as const), block: name }),
)

describe('commands', () => {
  test('every command is read as it was written', () => {
    fc.assert(
      fc.property(command, (written) => {
        const [record] = records(encodeCommand(written))
        expect(record).toMatchObject({ kind: 'command', offset: 0, length: encodeCommand(written).length })
        expect((record as { command: Command }).command).toEqual(written)
      }),
    )
  })

  test.each<[string, number[], RegExp]>([
    ['an unknown number', [8, 0, 12, 0, 0], /command is 12, allowed 1 to 11 \(offset 1\)/],
    ['PING of 3 bytes', [8, 0, 2, 0, 3, 0, 0, 0], /command ping: payload of 3 bytes is not of the right length \(offset 3\)/],
    ['a discard without ranges', [8, 0, 6, 0, 5, 0, 2, 0x61, 0x62, 0], /command postcopyRamDiscard: payload of 5 bytes/],
    ['a discard whose name reaches past the payload', [8, 0, 6, 0, 6, 0, 200, 0x61, 0x62, 0, 0], /payload of 6 bytes/],
    ['RECV_BITMAP with a shorter name', [8, 0, 10, 0, 4, 1, 0x61, 0x62, 0x63], /payload of 4 bytes/],
  ])('%s is refused', (_what, bytes, message) => {
    expect(() => records(Uint8Array.from(bytes))).toThrow(message)
  })

  test('a real package is taken apart and put together', () => {
    const bytes = capture('qemu100-postcopy.src2dst.bin')
    const parser = new MigrationParser()
    const pieces: Uint8Array[] = []
    for (const record of parser.push(bytes)) if (record.kind === 'bytes' && record.of === 'package') pieces.push(record.bytes)
    const whole = Buffer.concat(pieces)
    const { before, devices, after } = readPackage(whole)
    expect(before).toEqual([{ name: 'postcopyListen' }])
    expect(after).toEqual([{ name: 'ping', value: 3 }, { name: 'postcopyRun' }])
    expect(devices[0]).toBe(4)
    const again = Buffer.concat(packaged([...before.map(encodeCommand), devices, ...after.map(encodeCommand)]))
    expect(Buffer.from(again.subarray(9)).equals(whole)).toBe(true)
  })

  test('a package within a package is refused', () => {
    expect(() => readPackage(packaged([new Uint8Array(3)])[0]!)).toThrow('package: a package within a package (offset 0)')
  })
})
