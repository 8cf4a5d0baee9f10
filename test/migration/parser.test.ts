import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Qcow2Error } from '../../src/core/errors.ts'
import type { ParserOptions } from '../../src/migration/framing.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import { readMigration } from '../../src/migration/read.ts'
import type { MigrationRecord } from '../../src/migration/records.ts'
import { commandNumber, ramFlag } from '../../src/migration/format.ts'
import { deviceLengths, locateVmDescription, parseVmDescription } from '../../src/migration/vm-description.ts'
import { encodeRecord } from '../../src/migration/writer.ts'
import { capture, captureNames, expected, sha256, wholeStreams } from './captures.ts'

const runs = process.env['QCOW2_LONG'] === '1' ? 2000 : 30

/** A record without what depends on how the input was cut: batches as pages, bytes joined by the caller. */
function* normalised(record: MigrationRecord): Generator {
  if (record.kind === 'bytes') {
    yield { kind: 'bytes', of: record.of, offset: record.offset, hex: Buffer.from(record.bytes).toString('hex') }
    return
  }
  if (record.kind !== 'ram-pages') {
    yield structuredClone(record)
    return
  }
  for (let i = 0; i < record.count; i++) {
    const position = record.positions[i]!
    yield {
      block: record.block.index,
      page: record.pageOffsets[i],
      flags: record.flags[i],
      at: record.bytesOffset + position,
      content: sha256(record.bytes.subarray(position, position + record.lengths[i]!)),
    }
  }
}

function joined(entries: unknown[]): unknown[] {
  const out: { kind?: string; of?: string; hex?: string }[] = []
  for (const entry of entries as typeof out) {
    const last = out.at(-1)
    if (entry.kind === 'bytes' && last?.kind === 'bytes' && last.of === entry.of) last.hex! += entry.hex!
    else out.push({ ...entry })
  }
  return out
}

function parse(chunks: Iterable<Uint8Array>, options: ParserOptions = {}): unknown[] {
  const parser = new MigrationParser(options)
  const entries: unknown[] = []
  for (const chunk of chunks) for (const record of parser.push(chunk)) entries.push(...normalised(record))
  parser.end()
  return joined(entries)
}

function rewrite(bytes: Uint8Array, options: ParserOptions = {}): Buffer {
  const parser = new MigrationParser(options)
  const pieces: Uint8Array[] = []
  let offset = 0
  for (const record of parser.push(bytes)) {
    expect(record.offset).toBe(offset)
    const piece = encodeRecord(record)
    expect(piece.length).toBe(record.length)
    offset += piece.length
    pieces.push(piece)
  }
  parser.end()
  return Buffer.concat(pieces)
}

function devicesOf(bytes: Uint8Array): ParserOptions {
  const { start, length } = locateVmDescription(bytes)!
  return { devices: deviceLengths(parseVmDescription(bytes.subarray(start, start + length))) }
}

function summary(bytes: Uint8Array, options: ParserOptions): Record<string, unknown> {
  const parser = new MigrationParser(options)
  const counts = { zero: 0, normal: 0, xbzrle: 0, compressed: 0, eos: 0, multifd_flush: 0, repeated: 0 }
  const seen = new Set<string>()
  const sections: unknown[] = []
  const result: Record<string, unknown> = { counts, sections, gpa: {} }
  let parts = 0
  for (const record of parser.push(bytes)) {
    if (record.kind === 'configuration') result['machine'] = record.machine
    if (record.kind === 'eof') result['eof'] = record.offset
    if (record.kind === 'vm-description') result['vmdesc'] = record.jsonLength
    if (record.kind === 'section' && record.type === 'part') parts++
    if (record.kind === 'section' && record.type !== 'part') {
      sections.push([record.type.toUpperCase(), record.id, record.idstr, record.type === 'end' ? record.offset : record.instanceId])
    }
    if (record.kind === 'command') sections.push(['COMMAND', commandNumber[record.command.name], '', record.offset])
    if (record.kind === 'ram-block' && record.block.gpa !== undefined) Object.assign(result['gpa'] as object, { [record.block.name]: record.block.gpa })
    if (record.kind === 'ram-mark') counts[record.mark === 'eos' ? 'eos' : 'multifd_flush']++
    if (record.kind !== 'ram-pages') continue
    for (let i = 0; i < record.count; i++) {
      const flag = record.flags[i]! & ~ramFlag.continue
      const kind = flag === ramFlag.zero ? 'zero' : flag === ramFlag.page ? 'normal' : flag === ramFlag.xbzrle ? 'xbzrle' : 'compressed'
      counts[kind]++
      const page = `${record.block.name}@${record.pageOffsets[i]}`
      if (seen.has(page)) counts.repeated++
      seen.add(page)
    }
  }
  parser.end()
  return { ...result, parts, blocks: Object.fromEntries(parser.blocks.map(({ name, length }) => [name, length])) }
}

describe('every capture', () => {
  test.each(wholeStreams)('%s gives what is expected of it', (name) => {
    const bytes = capture(name)
    const want = expected[name]!
    const got = summary(bytes, devicesOf(bytes))
    const counts = name.includes('mappedram') ? { ...want.counts, normal: 0 } : want.counts
    expect(got).toEqual({
      counts, sections: want.sections, gpa: want.gpa, machine: want.machine, eof: want.eof_offset,
      vmdesc: want.vmdesc_length, parts: want.part_sections, blocks: want.blocks,
    })
  })

  test.each(wholeStreams)('%s is rebuilt byte for byte, with and without its VM description', (name) => {
    const bytes = capture(name)
    expect(rewrite(bytes, devicesOf(bytes)).equals(bytes)).toBe(true)
    expect(rewrite(bytes).equals(bytes)).toBe(true)
  })

  test.each(captureNames(/(src2dst|-main)\.bin$/).filter((name) => !name.includes('recover')))('%s is rebuilt byte for byte', (name) => {
    expect(rewrite(capture(name)).equals(capture(name))).toBe(true)
  })

  test('the second connection of a recovered postcopy continues the first', () => {
    const first = new MigrationParser()
    for (const _ of first.push(capture('qemu100-postcopy.src2dst.bin'))) continue
    const continues = { sections: [{ id: first.ramSectionId!, idstr: 'ram' }], blocks: first.blocks }
    const bytes = capture('qemu100-recover.src2dst.bin')
    expect(rewrite(bytes, { continues }).equals(bytes)).toBe(true)
  })

  test('a device section before RAM is found without a VM description', () => {
    const parser = new MigrationParser()
    const found: unknown[] = []
    for (const record of parser.push(capture('qemu100-virtio-mem.mig'))) {
      if (record.kind === 'section' && record.type === 'full') found.push(record.idstr)
      if (record.kind === 'bytes') found.push([record.of, record.length])
    }
    expect(found[0]).toBe('0000:00:02.0/virtio-mem-device-early')
    expect(found[1]).toEqual(['device', 44])
    expect(found).toHaveLength(3)
  })
})

describe('chunking', () => {
  const small = ['qemu100-bgsnap.mig', 'qemu100-virtio-mem.mig', 'qemu72-compress.mig', 'qemu100-ignore-shared-uuid.mig', 'qemu100-postcopy.src2dst.bin']

  test.each(small)('%s: any chunking gives the same records', (name) => {
    const bytes = capture(name)
    const whole = parse([bytes])
    const cuts = fc.array(fc.integer({ min: 0, max: bytes.length }), { maxLength: 40 })
    fc.assert(
      fc.property(cuts, (at) => {
        const edges = [0, ...at.sort((a, b) => a - b), bytes.length]
        const chunks = edges.slice(1).map((end, i) => bytes.slice(edges[i], end))
        expect(parse(chunks)).toEqual(whole)
      }),
      { numRuns: Math.ceil(runs / 5) },
    )
  })

  test.each([1, 7, 4096, 4104, 65_536])('chunks of %i bytes, with the VM description', (size) => {
    const bytes = capture('qemu100-ignore-shared-uuid.mig')
    const chunks = Array.from({ length: Math.ceil(bytes.length / size) }, (_, i) => bytes.slice(i * size, (i + 1) * size))
    expect(parse(chunks, devicesOf(bytes))).toEqual(parse([bytes], devicesOf(bytes)))
  })

  test('a chunk may be pushed only when the one before is used up', () => {
    const parser = new MigrationParser()
    parser.push(capture('qemu100-bgsnap.mig'))
    expect(() => parser.push(new Uint8Array(1))).toThrow(TypeError)
  })
})

describe('readMigration', () => {
  test('reads iterables, web streams and bytes alike', async () => {
    const bytes = capture('qemu72-compress.mig')
    const sources = [bytes, [bytes.subarray(0, 1000), bytes.subarray(1000)], new Blob([bytes.slice()]).stream()]
    const want = parse([bytes])
    for (const source of sources) {
      const got: unknown[] = []
      for await (const record of readMigration(source as Uint8Array)) got.push(...normalised(record))
      expect(joined(got)).toEqual(want)
    }
  })

  test('an aborted signal ends the reading with its reason', async () => {
    const reading = readMigration(capture('qemu72-compress.mig'), { signal: AbortSignal.abort(new Error('enough')) })
    await expect(reading.next()).rejects.toThrow('enough')
  })
})

describe('malformed streams', () => {
  const patched = (edit: (bytes: Uint8Array) => void): Uint8Array => {
    const bytes = capture('qemu100-bgsnap.mig').slice()
    edit(bytes)
    return bytes
  }
  const failure = (bytes: Uint8Array, options?: ParserOptions): Qcow2Error => {
    try {
      parse([bytes], options)
    } catch (error) {
      if (Qcow2Error.is(error)) return error
      throw error
    }
    throw new Error('no error')
  }

  test.each<[string, (bytes: Uint8Array) => void, RegExp]>([
    ['another file', (b) => b.set([0x7f, 0x45, 0x4c, 0x46]), /header: not a QEMU migration stream.*an ELF core \(offset 0\)/],
    ['version 2', (b) => b.set([2], 7), /header: version is 2, expected 3 \(offset 4\)/],
    ['a machine name too long', (b) => b.set([1], 9), /configuration section: machine type of 16777230 bytes, allowed 1 to 1024 \(offset 9\)/],
    ['an unknown section type', (b) => b.set([9], 0xc5), /section type is 0x9/],
    ['a PART without START', (b) => b.set([9], 0xc9), /section id 9, which no START introduced \(offset 198\)/],
    ['RAM version 3', (b) => b.set([3], 0x2b), /section 'ram': version is 3, expected 4/],
    ['a block list beyond its total', (b) => b.set([1], 0x3d), /makes the sum of lengths exceed the total/],
    ['a wrong footer id', (b) => b.set([7], 0xc4), /section 'ram' \(id 1\): footer has section id 7, expected 1 \(offset 193\)/],
    ['a missing footer in a stream with footers', (b) => b.set([0], 0x2e9528), /section 'ram' \(id 1\): footer expected, found 0x0 \(offset 3052840\)/],
    ['CONTINUE before any name', (b) => b.set([0x22], 0xd1), /CONTINUE before any RAM block was named \(offset 202\)/],
    ['a page outside its block', (b) => b.set([0x7f], 0xdc), /outside RAM block .pc\.ram. of 4194304 bytes/],
    ['an unknown RAM block', (b) => b.set([0x78], 0xd3), /RAM block 'xc.ram' is not in the list of blocks \(offset 210\)/],
    ['flags that exclude each other', (b) => b.set([0x2a], 0xe1), /with flags 0x2a is not one of/],
    ['a fill byte', (b) => b.set([1], 0xd9), /zero page with fill byte 0x1, expected 0x0 \(offset 217\)/],
    ['RDMA', (b) => b.set([0x80], 0xd1), /HOOK record \(RDMA transport\) at offset 202/],
  ])('%s', (_what, edit, message) => {
    const error = failure(patched(edit))
    expect(error.message).toMatch(message)
    expect(error.code).toMatch(/^ERR_(STREAM|UNSUPPORTED)$/)
  })

  test('every truncation is reported with its position', () => {
    const bytes = capture('qemu100-bgsnap.mig')
    fc.assert(
      fc.property(fc.oneof(fc.integer({ min: 0, max: 400 }), fc.integer({ min: 0, max: 0x2e952c })), (length) => {
        const error = failure(bytes.subarray(0, length))
        expect(error.code).toBe('ERR_STREAM')
        expect(error).toMatchObject({ offset: length })
      }),
      { numRuns: runs * 3 },
    )
  })

  test('a section that the VM description does not list', () => {
    const bytes = capture('qemu100-bgsnap.mig')
    const { devices } = devicesOf(bytes)
    expect(failure(bytes, { devices: devices!.slice(1) }).message).toMatch(
      /section 'timer' \(id 0\): instance 0 is not what the VM description lists here: 'cpu_common' instance 0/,
    )
  })

  test('after an error every call throws it again', () => {
    const parser = new MigrationParser()
    expect(() => [...parser.push(new Uint8Array(8))]).toThrow('not a QEMU migration stream')
    expect(() => [...parser.push(new Uint8Array(8))]).toThrow('not a QEMU migration stream')
    expect(() => parser.end()).toThrow('not a QEMU migration stream')
  })
})
