/** Streams made from nothing round-trip; streams damaged in any way end in a typed error or are read. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import type { Command } from '../../src/migration/commands.ts'
import type { DeviceLength } from '../../src/migration/framing.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import type { ConfigurationSubsection, RamBlock } from '../../src/migration/records.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { encodeRecord, type WritableRecord } from '../../src/migration/writer.ts'
import { damaged, edits, isTyped } from '../support/damage.ts'
import { capture } from './captures.ts'

const long = process.env['QCOW2_LONG'] === '1'
const pageSize = 4096

interface Stream {
  readonly bytes: Uint8Array
  readonly devices: DeviceLength[]
  readonly records: WritableRecord[]
}

const name = fc.stringMatching(/^[a-z0-9./:@-]{1,40}$/)
const subsections: fc.Arbitrary<ConfigurationSubsection[]> = fc.subarray<ConfigurationSubsection>([
  { name: 'configuration/target-page-bits', version: 1, pageBits: 12 },
  { name: 'configuration/capabilities', version: 1, capabilities: ['x-ignore-shared'] },
  { name: 'configuration/uuid', version: 1, uuid: Uint8Array.from({ length: 16 }, (_, i) => i) },
])
const blockShapes = fc.uniqueArray(fc.record({ name, pages: fc.integer({ min: 1, max: 40 }), huge: fc.boolean() }), { selector: (block) => block.name, minLength: 1, maxLength: 5 })
const page = fc.record({ block: fc.nat(), page: fc.nat(), kind: fc.constantFrom(2, 8, 8, 8, 0x40, 0x100), size: fc.nat(300), again: fc.boolean() })
const command: fc.Arbitrary<Command> = fc.oneof(
  fc.constantFrom<Command>({ name: 'openReturnPath' }, { name: 'switchoverStart' }, { name: 'postcopyAdvise' }),
  fc.nat().map((value) => ({ name: 'ping' as const, value })),
)
const shape = fc.record({
  machine: name,
  configured: fc.boolean(),
  subsections,
  blocks: blockShapes,
  parts: fc.array(fc.oneof(fc.array(page, { maxLength: 12 }), command), { maxLength: 6 }),
  devices: fc.array(fc.record({ name, instanceId: fc.nat(3), body: fc.uint8Array({ maxLength: 60 }) }), { maxLength: 4 }),
  footers: fc.boolean(),
  json: fc.json(),
})

function build(from: typeof shape extends fc.Arbitrary<infer T> ? T : never): Stream {
  const records: WritableRecord[] = [{ kind: 'header', version: 3 }]
  const footer = (id: number): WritableRecord[] => (from.footers ? [{ kind: 'footer', id }] : [])
  const eos: WritableRecord = { kind: 'ram-mark', mark: 'eos' }
  if (from.configured) records.push({ kind: 'configuration', machine: from.machine, subsections: from.subsections })
  const ignoreShared = from.configured && from.subsections.some((part) => part.name === 'configuration/capabilities')
  const blocks: RamBlock[] = from.blocks.map((block, index) => ({
    index,
    name: block.name,
    length: block.pages * pageSize,
    ...(block.huge && { hostPageSize: 2 << 20 }),
    ...(ignoreShared && { gpa: index * (1 << 30) }),
  }))
  records.push({ kind: 'section', type: 'start', id: 2, idstr: 'ram', instanceId: 0, versionId: 4 })
  records.push({ kind: 'ram-size', total: blocks.reduce((sum, { length }) => sum + length, 0) })
  for (const block of blocks) records.push({ kind: 'ram-block', block })
  records.push(eos, ...footer(2))
  let last: RamBlock | undefined
  for (const part of from.parts) {
    if (!Array.isArray(part)) {
      records.push({ kind: 'command', command: part })
      continue
    }
    records.push({ kind: 'section', type: 'part', id: 2, idstr: 'ram', instanceId: 0, versionId: 4 })
    for (const each of part) {
      const block = each.again && last !== undefined ? last : blocks[each.block % blocks.length]!
      const follows = each.again && last !== undefined
      last = block
      const length = each.kind === 2 ? 1 : each.kind === 8 ? pageSize : each.size + 1
      records.push({
        kind: 'ram-pages', block, pageSize, count: 1,
        flags: Uint16Array.of(each.kind | (follows ? 0x20 : 0)),
        pageOffsets: Float64Array.of((each.page % (block.length / pageSize)) * pageSize),
        positions: Uint32Array.of(0), lengths: Uint32Array.of(length),
        bytes: new Uint8Array(length).fill(each.kind === 2 ? 0 : each.size), bytesOffset: 0,
      })
    }
    records.push(eos, ...footer(2))
  }
  from.devices.forEach(({ name: idstr, instanceId, body }, i) => {
    records.push({ kind: 'section', type: 'full', id: 10 + i, idstr, instanceId, versionId: 1 })
    if (body.length > 0) records.push({ kind: 'bytes', of: 'device', bytes: body })
    records.push(...footer(10 + i))
  })
  const json = new TextEncoder().encode(from.json)
  records.push({ kind: 'eof' }, { kind: 'vm-description', jsonLength: json.length }, { kind: 'bytes', of: 'vm-description', bytes: json })
  const devices = from.devices.map((device) => ({ name: device.name, instanceId: device.instanceId, bodyLength: device.body.length }))
  return { bytes: new Uint8Array(Buffer.concat(records.map((record) => encodeRecord(record)))), devices, records }
}

/** All that a record says, as text; batches as single pages, pieces of bytes joined by the caller. */
function* told(record: WritableRecord): Generator<string> {
  if (record.kind === 'bytes') {
    for (const byte of record.bytes) yield `${record.of} ${byte}`
    return
  }
  if (record.kind !== 'ram-pages') {
    const { offset: _offset, length: _length, ...fields } = record as WritableRecord & { offset?: number; length?: number }
    yield JSON.stringify(fields, Object.keys(flatten(fields)).sort())
    return
  }
  for (let i = 0; i < record.count; i++) {
    const position = record.positions[i]!
    const content = Buffer.from(record.bytes.subarray(position, position + record.lengths[i]!)).toString('hex')
    yield `${record.block.name} ${record.pageOffsets[i]} ${record.flags[i]} ${content}`
  }
}

/** Every key at any depth, so that JSON comes out in one order. */
function flatten(value: unknown, keys: Record<string, true> = {}): Record<string, true> {
  if (typeof value !== 'object' || value === null) return keys
  for (const [key, inner] of Object.entries(value)) {
    keys[key] = true
    flatten(inner, keys)
  }
  return keys
}

describe('generated streams', () => {
  test('are read as they were written, in any chunking, and written again as they were', () => {
    fc.assert(
      fc.property(shape, fc.integer({ min: 1, max: 9000 }), (from, size) => {
        const { bytes, devices, records } = build(from)
        const parser = new MigrationParser({ devices })
        const got: string[] = []
        const again: Uint8Array[] = []
        for (let at = 0; at < bytes.length; at += size) {
          for (const record of parser.push(bytes.subarray(at, at + size))) {
            got.push(...told(record))
            again.push(encodeRecord(record).slice())
          }
        }
        parser.end()
        expect(got).toEqual(records.flatMap((record) => [...told(record)]))
        expect(Buffer.concat(again).equals(bytes)).toBe(true)
      }),
      { numRuns: long ? 5000 : 100 },
    )
  })
})

describe('damaged streams', () => {
  const sources = ['qemu100-ignore-shared-uuid.mig', 'qemu72-compress.mig', 'qemu100-multifd-none-main.bin'].map(capture)
  const small = build({
    machine: 'pc', configured: true, subsections: [], footers: true, json: '{}',
    blocks: [{ name: 'pc.ram', pages: 20, huge: false }],
    parts: [([2, 8, 0x40, 0x100] as const).map((kind, i) => ({ block: 0, page: i, kind, size: 20, again: i > 0 })), { name: 'ping', value: 1 }],
    devices: [{ name: 'timer', instanceId: 0, body: new Uint8Array(24) }],
  })
  const which = fc.nat(sources.length)

  test('the parser reads them or names what is wrong and where', () => {
    let read = 0
    let refused = 0
    fc.assert(
      fc.property(which, edits, fc.integer({ min: 1000, max: 200_000 }), (index, list, size) => {
        const bytes = damaged(sources[index] ?? small.bytes, list)
        const parser = new MigrationParser(index === sources.length ? { devices: small.devices } : {})
        const again: Uint8Array[] = []
        try {
          for (let at = 0; at < bytes.length; at += size) for (const record of parser.push(bytes.subarray(at, at + size))) again.push(encodeRecord(record).slice())
          parser.end()
        } catch (error) {
          if (!isTyped(error)) throw error
          refused++
          return
        }
        read++
        expect(Buffer.concat(again).equals(bytes)).toBe(true)
      }),
      { numRuns: long ? 100_000 : 400 },
    )
    expect(read).toBeGreaterThan(0)
    expect(refused).toBeGreaterThan(0)
  })

  test('the index opens them or names what is wrong, and reads every page it knows', async () => {
    await fc.assert(
      fc.asyncProperty(which, edits, async (index, list) => {
        try {
          await using vm = await VmState.index(new MemoryDevice(damaged(sources[index] ?? small.bytes, list)))
          for (const { name: block, length } of vm.ram.blocks) {
            if (length > 16 << 20) continue
            await vm.ram.read(block, 0, length)
          }
          if (vm.description !== undefined) await vm.decodeDevices()
        } catch (error) {
          if (!isTyped(error)) throw error
        }
      }),
      { numRuns: long ? 20_000 : 150 },
    )
  })

  test('a RAM block of 256 TiB without pages is indexed at once', async () => {
    const hex = '5145564d00000003 01 00000001 03 72616d 00000000 00000004 0001000000000004 01 61 0001000000000000 0000000000000010 7e00000001 00'
    await using vm = await VmState.index(new MemoryDevice(Buffer.from(hex.replaceAll(' ', ''), 'hex')))
    expect(vm.ram.blocks[0]!.length).toBe(2 ** 48)
    expect(await vm.ram.read(0, 2 ** 47, 4096)).toEqual(new Uint8Array(4096))
    expect(vm.ram.pageKind(0, 2 ** 48 - 1)).toBe('absent')
  })

  test('absurd lengths cost neither time nor memory', () => {
    const absurd = [
      '5145564d0000000307ffffffff',
      '5145564d000000030100000001037261' + '6d0000000000000004' + '000ffffffffff004' + '0161' + '000ffffffffff000' + '0162',
      '5145564d00000003080007' + '0004ffffffff',
      '5145564d000000030006ffffffff',
    ]
    for (const hex of absurd) {
      const parser = new MigrationParser()
      const before = process.memoryUsage().arrayBuffers
      expect(() => {
        for (const _ of parser.push(Buffer.from(hex, 'hex'))) continue
        parser.end()
      }).toThrow(expect.objectContaining({ code: 'ERR_STREAM' }) as Error)
      expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(16 << 20)
    }
  })
})
