/** The pure decoders and encoders: round trips over arbitrary values, and worked examples as hex. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { viewOf } from '../../src/bytes/view.ts'
import { Qcow2Error } from '../../src/core/errors.ts'
import {
  decodeBitmapsExtension,
  decodeEncryptionPointer,
  decodeExtensions,
  encodeBitmapsExtension,
  encodeEncryptionPointer,
  encodeExtensions,
  extensionType,
} from '../../src/qcow2/extensions.ts'
import { decodeFeatureNames, encodeFeatureNames, featureNames } from '../../src/qcow2/features.ts'
import { geometryOf, l1Index, l2Index, refcountClusters, requiredL1Size, vmStateBase } from '../../src/qcow2/geometry.ts'
import { decodeHeaderCluster, encodeHeaderCluster, type HeaderCluster } from '../../src/qcow2/header.ts'
import {
  clusterKind,
  decodeCompressed,
  encodeCompressed,
  entryOffset,
  isCopied,
  offsetHigh,
  offsetLow,
} from '../../src/qcow2/l2-entry.ts'
import { refcountLayout } from '../../src/qcow2/refcount-layout.ts'
import { checkSnapshot, checkSnapshotL1, decodeSnapshot, encodeSnapshotTable, nextSnapshotId, type SnapshotRecord } from '../../src/qcow2/snapshot-table.ts'
import { subclusterKind, subclusterMask, subclusterRun, validSubclusters } from '../../src/qcow2/subcluster.ts'

const hex = (text: string): Uint8Array => Uint8Array.from(Buffer.from(text.replaceAll(/\s/g, ''), 'hex'))
const codeOf = (task: () => unknown): string => {
  try {
    task()
  } catch (error) {
    return Qcow2Error.is(error) ? error.code : (error as Error).name
  }
  return 'no error'
}

describe('geometry', () => {
  test('a guest offset is its indices put together again', () => {
    fc.assert(
      fc.property(fc.integer({ min: 9, max: 21 }), fc.boolean(), fc.nat({ max: 2 ** 50 }), (bits, wide, guest) => {
        const geometry = geometryOf({ clusterBits: bits, extendedL2: wide && bits >= 14, refcountOrder: 4 })
        const again =
          l1Index(geometry, guest) * geometry.bytesPerL1Entry +
          l2Index(geometry, guest) * geometry.clusterSize +
          (guest % geometry.clusterSize)
        expect(again).toBe(guest)
        expect(l2Index(geometry, guest)).toBeLessThan(geometry.l2Entries)
      }),
    )
  })

  test('VM state begins behind the last L1 entry of the disk', () => {
    const geometry = geometryOf({ clusterBits: 12, extendedL2: false, refcountOrder: 4 })
    expect(requiredL1Size(geometry, 8 << 20)).toBe(4)
    expect(vmStateBase(geometry, 8 << 20)).toBe(8 << 20)
    expect(vmStateBase(geometry, (8 << 20) + 512)).toBe(10 << 20)
  })

  test('refcount structures count themselves', () => {
    const geometry = geometryOf({ clusterBits: 9, extendedL2: false, refcountOrder: 6 })
    fc.assert(
      fc.property(fc.nat({ max: 1e7 }), (clusters) => {
        const { blocks, table } = refcountClusters(geometry, clusters)
        expect(blocks * geometry.refcountsPerBlock).toBeGreaterThanOrEqual(clusters + blocks + table)
        expect(table * 64).toBeGreaterThanOrEqual(blocks)
      }),
    )
  })

  test('shapes outside the format are refused', () => {
    expect(codeOf(() => geometryOf({ clusterBits: 8, extendedL2: false, refcountOrder: 4 }))).toBe('ERR_FORMAT')
    expect(codeOf(() => geometryOf({ clusterBits: 13, extendedL2: true, refcountOrder: 4 }))).toBe('ERR_FORMAT')
    expect(codeOf(() => geometryOf({ clusterBits: 16, extendedL2: true, refcountOrder: 7 }))).toBe('ERR_FORMAT')
  })
})

describe('L2 entries', () => {
  const standard = { extendedL2: false, dataFile: false }

  test('every kind of standard entry', () => {
    expect(clusterKind(0, 0, standard)).toBe('unallocated')
    expect(clusterKind(0, 1, standard)).toBe('zero-plain')
    expect(clusterKind(0x8000_0000, 0x60001, standard)).toBe('zero-allocated')
    expect(clusterKind(0x8000_0000, 0x50000, standard)).toBe('normal')
    expect(clusterKind(0x4000_0000, 0x50000, standard)).toBe('compressed')
    expect(clusterKind(0x8000_0000, 0, standard)).toBe('unallocated')
    expect(clusterKind(0x8000_0000, 0, { extendedL2: false, dataFile: true })).toBe('normal')
    expect(clusterKind(0, 1, { extendedL2: true, dataFile: false })).toBe('unallocated')
  })

  test('offsets survive, the COPIED flag beside them', () => {
    fc.assert(
      fc.property(fc.nat({ max: 2 ** 44 - 1 }), (sector) => {
        const offset = sector * 512
        const high = (offsetHigh(offset) | 0x8000_0000) >>> 0
        expect(entryOffset(high, offsetLow(offset))).toBe(offset)
        expect(isCopied(high)).toBe(true)
      }),
    )
    expect(entryOffset(0xffff_ffff, 0xffff_ffff)).toBe(2 ** 56 - 512)
  })

  test('compressed descriptors of worked examples', () => {
    const decoded = (high: number, low: number, bits: number): unknown => decodeCompressed(high, low, bits)
    expect(decoded(0x4000_0000, 0x5004f, 16)).toEqual({ offset: 0x5004f, length: 433 })
    expect(decoded(0x4000_0000, 0x5009e, 16)).toEqual({ offset: 0x5009e, length: 354 })
    expect(decoded(0x5400_0000, 0x5000, 12)).toEqual({ offset: 0x5000, length: 3072 })
    expect(decoded(0x5800_0000, 0x5bf4, 12)).toEqual({ offset: 0x5bf4, length: 0x6800 - 0x5bf4 })
    expect(decoded(0x4008_0000, 0xa00000, 21)).toEqual({ offset: 0xa00000, length: 5 * 512 })
    expect(decoded(0x4000_0000, 0x1008, 9)).toEqual({ offset: 0x1008, length: 504 })
  })

  test('compressed descriptors cover what was encoded, to the end of the sector', () => {
    fc.assert(
      fc.property(fc.integer({ min: 9, max: 21 }), fc.nat({ max: 2 ** 48 }), fc.double({ min: 0, max: 1, noNaN: true }), (bits, offset, part) => {
        const length = 1 + Math.floor(part * (2 ** bits - 2))
        const { high, low } = encodeCompressed(offset, length, bits)
        const again = decodeCompressed(high, low, bits)
        expect(again.offset).toBe(offset)
        expect(again.length).toBeGreaterThanOrEqual(length)
        expect((again.offset + again.length) % 512).toBe(0)
        expect(again.length - length).toBeLessThan(512)
        expect(clusterKind(high, low, standard)).toBe('compressed')
      }),
    )
  })

  test('an offset past the descriptor is refused', () => {
    expect(() => encodeCompressed(2 ** 49, 100, 21)).toThrow(RangeError)
  })
})

describe('subclusters', () => {
  test('worked examples', () => {
    expect(subclusterRun(0x300, 0x31, 0)).toEqual({ kind: 'data', count: 1 })
    expect(subclusterRun(0x300, 0x31, 1)).toEqual({ kind: 'unallocated', count: 3 })
    expect(subclusterRun(0x300, 0x31, 8)).toEqual({ kind: 'zero', count: 2 })
    expect(subclusterRun(0xffff_ffff, 0, 0)).toEqual({ kind: 'zero', count: 32 })
  })

  test('a pair of set bits, or data without a host cluster, makes the entry invalid', () => {
    fc.assert(
      fc.property(fc.boolean(), fc.integer({ min: 0, max: 2 ** 32 - 1 }), fc.integer({ min: 0, max: 2 ** 32 - 1 }), (has, zero, alloc) => {
        const pairs = Array.from({ length: 32 }, (_, i) => ((zero >>> i) & 1) + 2 * ((alloc >>> i) & 1))
        expect(validSubclusters(has, zero, alloc)).toBe(!pairs.includes(3) && (has || !pairs.some((pair) => pair >= 2)))
      }),
    )
  })

  test('a mask holds exactly its subclusters', () => {
    fc.assert(
      fc.property(fc.integer({ min: 0, max: 31 }), fc.integer({ min: 0, max: 32 }), (first, wanted) => {
        const count = Math.min(wanted, 32 - first)
        const mask = subclusterMask(first, count)
        for (let i = 0; i < 32; i++) {
          expect(subclusterKind(0, mask, i)).toBe(i >= first && i < first + count ? 'data' : 'unallocated')
        }
      }),
    )
  })
})

describe('refcount blocks', () => {
  test('seven clusters in use, and one snapshot, in every width', () => {
    const filled = (order: number, values: readonly number[]): string => {
      const block = new Uint8Array(512)
      values.forEach((value, index) => refcountLayout(order).set(block, index, value))
      return Buffer.from(block.subarray(0, Math.ceil((values.length * 2 ** order) / 8))).toString('hex')
    }
    const ones = [1, 1, 1, 1, 1, 1, 1]
    expect(filled(0, ones)).toBe('7f')
    expect(filled(1, ones)).toBe('5515')
    expect(filled(2, ones)).toBe('11111101')
    expect(filled(3, ones)).toBe('01010101010101')
    expect(filled(1, [1, 1, 1, 1, 2, 2, 2, 1, 1])).toBe('556a01')
    expect(filled(4, [1, 0x203])).toBe('00010203')
    expect(filled(6, [1, 2 ** 40])).toBe('00000000000000010000010000000000')
  })

  test('counters are independent of each other', () => {
    for (let order = 0; order <= 6; order++) {
      const layout = refcountLayout(order)
      const count = (512 * 8) / layout.bits
      const steps = fc.array(fc.tuple(fc.nat({ max: count - 1 }), fc.nat({ max: layout.max })), { maxLength: 60 })
      fc.assert(
        fc.property(steps, fc.nat({ max: count }), (sets, from) => {
          const block = new Uint8Array(512)
          const model = new Float64Array(count)
          for (const [index, value] of sets) {
            layout.set(block, index, value)
            model[index] = value
          }
          for (const [index] of sets) expect(layout.get(block, index)).toBe(model[index])
          const free = model.findIndex((value, index) => index >= from && value === 0)
          const used = model.findIndex((value, index) => index >= from && value !== 0)
          expect(layout.findFree(block, from, count)).toBe(free < 0 ? count : free)
          expect(layout.findUsed(block, from, count)).toBe(used < 0 ? count : used)
        }),
        { numRuns: 40 },
      )
    }
  })
})

const fresh = `
  51 46 49 fb 00 00 00 03  00 00 00 00 00 00 00 00   00 00 00 00 00 00 00 10  00 00 00 00 00 10 00 00
  00 00 00 00 00 00 00 01  00 00 00 00 00 03 00 00   00 00 00 00 00 01 00 00  00 00 00 01 00 00 00 00
  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00   00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
  00 00 00 04 00 00 00 70  00 00 00 00 00 00 00 00`

describe('header', () => {
  const clusterOf = (changes: (view: DataView) => void = () => undefined): Uint8Array => {
    const bytes = new Uint8Array(65536)
    bytes.set(hex(fresh))
    changes(new DataView(bytes.buffer))
    return bytes
  }

  test('a fresh image as QEMU makes it', () => {
    const content = decodeHeaderCluster(clusterOf())
    expect(content.header).toMatchObject({ version: 3, clusterBits: 16, size: 1 << 20, l1Size: 1, l1TableOffset: 0x30000, refcountOrder: 4 })
    const names = { type: extensionType.featureNames, data: encodeFeatureNames(featureNames) }
    const encoded = encodeHeaderCluster({ ...content, extensions: [names] })
    expect(Buffer.from(encoded.subarray(0, 112)).toString('hex')).toBe(Buffer.from(hex(fresh)).toString('hex'))
    expect(Buffer.from(encoded.subarray(112, 120)).toString('hex')).toBe('6803f85700000180')
    expect(decodeHeaderCluster(encoded).extensions).toEqual([names])
  })

  test('bytes behind a version 2 header are extensions, not features', () => {
    const bytes = clusterOf((view) => {
      view.setUint32(4, 2)
      view.setUint32(72, 0xe279_2aca)
      view.setUint32(76, 5)
    })
    bytes.set(Buffer.from('qcow2'), 80)
    bytes.fill(0, 96, 112)
    const { header, extensions } = decodeHeaderCluster(bytes)
    expect(header.incompatibleFeatures).toBe(0n)
    expect(extensions.map(({ data }) => Buffer.from(data).toString())).toEqual(['qcow2'])
  })

  test('header fields beyond the known ones are kept', () => {
    const bytes = clusterOf((view) => {
      view.setUint32(100, 128)
      view.setUint32(112, 0xdead_beef)
    })
    const again = encodeHeaderCluster(decodeHeaderCluster(bytes))
    expect(new DataView(again.buffer).getUint32(100)).toBe(128)
    expect(new DataView(again.buffer).getUint32(112)).toBe(0xdead_beef)
  })

  test('what is wrong is named, with its offset', () => {
    const message = (changes: (view: DataView) => void): string => {
      try {
        decodeHeaderCluster(clusterOf(changes))
      } catch (error) {
        return (error as Error).message
      }
      return 'no error'
    }
    expect(message((view) => view.setUint32(20, 33))).toBe('header: cluster_bits is 33, allowed 9 to 21 (offset 20)')
    expect(message((view) => view.setUint32(0, 0))).toContain('magic')
    expect(message((view) => view.setUint32(4, 4))).toContain('version is 4')
    expect(message((view) => view.setUint32(36, 0xffff_ffff))).toContain('l1_size is 4294967295, at most 4194304')
    expect(message((view) => view.setUint32(24, 1))).toContain('l1_size is 1, size')
    expect(message((view) => view.setUint32(44, 0x30001))).toContain('l1_table_offset')
    expect(message((view) => view.setUint32(56, 0))).toContain('refcount_table_clusters is 0')
    expect(message((view) => view.setUint32(60, 65537))).toContain('nb_snapshots is 65537')
    expect(message((view) => view.setUint32(32, 7))).toContain('crypt_method is 7')
    expect(message((view) => view.setUint8(104, 1))).toContain('compression type feature bit is clear')
    expect(message((view) => view.setUint32(100, 96))).toContain('header_length is 96')
    expect(message((view) => view.setUint32(8, 0x20_0000))).toContain('exceeds 2^53')
    expect(message((view) => view.setUint32(12, 65537))).toContain('backing_file_offset is 65537')
    expect(message((view) => view.setUint32(76, 1 << 20))).toContain('incompatible feature bit 20')
  })

  test('an unknown incompatible feature is named by the image itself', () => {
    const bytes = clusterOf((view) => {
      view.setUint32(76, 1 << 20)
      view.setUint32(112, 0x6803_f857)
      view.setUint32(116, 48)
      view.setUint8(121, 20)
    })
    bytes.set(Buffer.from('time travel'), 122)
    expect(() => decodeHeaderCluster(bytes)).toThrow('time travel')
    viewOf(bytes).setUint32(76, 5 << 20)
    const unknownFeatures = [{ bit: 20, name: 'time travel' }, { bit: 22 }]
    expect(() => decodeHeaderCluster(bytes)).toThrow(expect.objectContaining({ code: 'ERR_UNSUPPORTED', unknownFeatures }))
  })

  test('headers survive encoding', () => {
    fc.assert(
      fc.property(
        fc.constantFrom(2 as const, 3 as const),
        fc.integer({ min: 9, max: 21 }),
        fc.uint8Array({ minLength: 1, maxLength: 60 }),
        fc.array(fc.tuple(fc.integer({ min: 1, max: 2 ** 32 - 1 }), fc.uint8Array({ maxLength: 40 })), { maxLength: 3 }),
        fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
        (version, clusterBits, backingFile, list, word) => {
          const unique = list.filter(([type], index) => list.findIndex((other) => other[0] === type) === index)
          const extensions = decodeExtensions(encodeExtensions(unique.map(([type, data]) => ({ type, data }))), 0, 4096)
          const v3 = version === 3
          const content: HeaderCluster = {
            header: {
              version, clusterBits, size: 0, cryptMethod: 'none', l1Size: 3, l1TableOffset: 2 ** clusterBits * 3,
              refcountTableOffset: 2 ** clusterBits, refcountTableClusters: 1, snapshotCount: 0, snapshotsOffset: 0,
              incompatibleFeatures: v3 ? 8n : 0n, compatibleFeatures: v3 ? word : 0n, autoclearFeatures: v3 ? word : 0n,
              refcountOrder: v3 ? 5 : 4, headerLength: v3 ? 112 : 72, compressionType: v3 ? 'zstd' : 'zlib',
            },
            extensions, backingFile, unknownFields: new Uint8Array(0),
          }
          expect(decodeHeaderCluster(encodeHeaderCluster(content))).toEqual(content)
        },
      ),
    )
  })

  test('any bytes decode or are refused with a typed error', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), fc.nat({ max: 111 }), (noise, at) => {
        const bytes = hex(fresh)
        bytes.set(noise.subarray(0, Math.max(0, 112 - at)), at)
        const code = codeOf(() => decodeHeaderCluster(bytes))
        expect(['no error', 'ERR_FORMAT', 'ERR_UNSUPPORTED']).toContain(code)
      }),
      { numRuns: 500 },
    )
  })
})

describe('extensions', () => {
  test('an extension that overruns its area is refused', () => {
    expect(codeOf(() => decodeExtensions(hex('00000001 00000009 0102030405060708'), 0, 16))).toBe('ERR_FORMAT')
  })

  test('of a known type the last one counts, of others all are kept', () => {
    const format = (name: string): string => `e2792aca 00000003 ${Buffer.from(name).toString('hex')}0000000000`
    const found = decodeExtensions(hex(`${format('raw')} 00000001 00000000 ${format('foo')} 00000001 00000000`), 0, 48)
    expect(found.map(({ type, data }) => [type, Buffer.from(data).toString()])).toEqual([[0xe2792aca, 'foo'], [1, ''], [1, '']])
  })

  test('feature names, bitmaps and encryption pointers survive', () => {
    expect(decodeFeatureNames(encodeFeatureNames(featureNames))).toEqual(featureNames)
    expect(decodeFeatureNames(Buffer.from('\0\x3fshort', 'latin1'))).toEqual([{ word: 'incompatible', bit: 63, name: 'short' }])
    expect(decodeFeatureNames(Uint8Array.of(0, 1))).toEqual([])
    const bitmaps = { count: 2, directorySize: 0x40, directoryOffset: 0x1d0000 }
    expect(Buffer.from(encodeBitmapsExtension(bitmaps)).toString('hex')).toBe('0000000200000000000000000000004000000000001d0000')
    expect(decodeBitmapsExtension(encodeBitmapsExtension(bitmaps))).toEqual(bitmaps)
    const pointer = { offset: 0x40000, length: 0x1f9000 }
    expect(decodeEncryptionPointer(encodeEncryptionPointer(pointer))).toEqual(pointer)
  })
})

describe('snapshot table', () => {
  const worked = hex(`
    00 00 00 00 00 01 10 00  00 00 00 06 00 01 00 05  6b 04 3c 3d 2d 03 b2 68  00 00 00 00 70 5c c8 fd
    00 00 95 6d 00 00 00 18  00 00 00 00 00 00 95 6d  00 00 00 00 00 80 00 00  ff ff ff ff ff ff ff ff
    31 66 69 72 73 74 00 00`)

  test('a snapshot as savevm records it', () => {
    const { record, next } = decodeSnapshot(worked, 0, 0x12000)
    expect(record).toMatchObject({ id: '1', name: 'first', l1Size: 6, vmStateSize: 38253, diskSize: 8 << 20, icount: undefined })
    expect(next).toBe(72)
    expect(encodeSnapshotTable([record])).toEqual(worked)
    expect(decodeSnapshot(worked.subarray(0, 70), 0, 0x12000).record).toEqual(record)
    expect(codeOf(() => decodeSnapshot(worked.subarray(0, 69), 0, 0x12000))).toBe('ERR_FORMAT')
  })

  const records: fc.Arbitrary<SnapshotRecord> = fc
    .record({
      id: fc.string({ maxLength: 10, unit: 'grapheme' }),
      name: fc.string({ maxLength: 30, unit: 'grapheme' }),
      l1TableOffset: fc.nat({ max: 2 ** 40 }).map((n) => n * 512),
      l1Size: fc.nat({ max: 1000 }),
      dateSeconds: fc.nat({ max: 2 ** 32 - 1 }),
      dateNanoseconds: fc.nat({ max: 999_999_999 }),
      vmClockNanoseconds: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
      vmStateSize: fc.nat({ max: 2 ** 40 }),
      diskSize: fc.nat({ max: 2 ** 50 }),
      icount: fc.option(fc.bigInt({ min: 0n, max: 2n ** 64n - 2n }), { nil: undefined }),
      unknownExtraData: fc.uint8Array({ maxLength: 30 }),
    })
    .map((record) => ({ ...record, extraDataLength: 24 + record.unknownExtraData.length }))

  test('tables survive, records 8-byte aligned', () => {
    fc.assert(
      fc.property(fc.array(records, { maxLength: 5 }), (list) => {
        const table = encodeSnapshotTable(list)
        const again: SnapshotRecord[] = []
        for (let at = 0; at < table.length; ) {
          const { record, next } = decodeSnapshot(table, at, 0)
          again.push(record)
          at = next
        }
        expect(again).toEqual(list)
      }),
    )
  })

  test('a state of 4 GiB shows none to readers of the 32-bit field', () => {
    const { record } = decodeSnapshot(worked, 0, 0)
    const table = encodeSnapshotTable([{ ...record, vmStateSize: 2 ** 32 }])
    expect(new DataView(table.buffer).getUint32(32)).toBe(0)
    expect(decodeSnapshot(table, 0, 0).record.vmStateSize).toBe(2 ** 32)
  })

  test('a name that is not UTF-8 keeps its bytes', () => {
    const strange = worked.slice()
    strange[65] = 0xff
    expect(encodeSnapshotTable([decodeSnapshot(strange, 0, 0).record])).toEqual(strange)
  })

  test('limits and ids', () => {
    const { record } = decodeSnapshot(worked, 0, 0)
    expect(codeOf(() => checkSnapshotL1({ ...record, l1Size: 4194305 }, 4096))).toBe('ERR_FORMAT')
    expect(codeOf(() => checkSnapshot({ ...record, extraDataLength: 1025 }))).toBe('ERR_FORMAT')
    expect(codeOf(() => checkSnapshotL1({ ...record, l1TableOffset: 512 }, 4096))).toBe('ERR_FORMAT')
    expect(nextSnapshotId([])).toBe('1')
    expect(nextSnapshotId([{ ...record, id: '7' }, { ...record, id: 'x' }])).toBe('8')
    const next = (...ids: string[]): string => nextSnapshotId(ids.map((id) => ({ ...record, id })))
    expect(next('9007199254740992')).toBe('9007199254740993')
    expect(next('18446744073709551615', '18446744073709551616')).toBe('18446744073709551617')
    expect(next('99999999999999999999999', '1', '1e+23')).toBe('2')
    expect(next('4x', '5')).toBe('6')
  })
})
