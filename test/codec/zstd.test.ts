import fc from 'fast-check'
import { expect, test } from 'vitest'
import { compressCluster, decompressCluster } from '../../src/codec/cluster-codec.ts'
import { parseZstdFrame } from '../../src/codec/zstd-frame.ts'
import { canCompressZstd, zstdCompressCluster, zstdDecompressCluster } from '../../src/codec/zstd.ts'

/** 64 KiB of 'A' as qemu-img stored it. */
const fromQemu = Buffer.from('28b52ffd6000ff5500001041410100fb7f1d6001', 'hex')

type Block = { kind: 'raw'; bytes: Uint8Array } | { kind: 'run'; value: number; length: number }

interface FrameShape {
  blocks: Block[]
  sizeField: 'none' | 'single' | 'window'
  checksum: boolean
}

const contentOf = (blocks: Block[]): Buffer =>
  Buffer.concat(blocks.map((block) => (block.kind === 'raw' ? block.bytes : new Uint8Array(block.length).fill(block.value))))

/** Encodes a frame by hand: raw and run-length blocks are enough to exercise every header form. */
function encode({ blocks, sizeField }: FrameShape, windowDescriptor = 10 << 3): Buffer {
  const size = contentOf(blocks).length
  const header = [0x28, 0xb5, 0x2f, 0xfd]
  if (sizeField === 'none') header.push(0, windowDescriptor)
  else if (sizeField === 'single') header.push(0xa0, size & 255, (size >>> 8) & 255, (size >>> 16) & 255, size >>> 24)
  else header.push(0xc0, windowDescriptor, size & 255, (size >>> 8) & 255, (size >>> 16) & 255, size >>> 24, 0, 0, 0, 0)
  const body = blocks.flatMap((block, i) => {
    const length = block.kind === 'raw' ? block.bytes.length : block.length
    const head = (length << 3) | (block.kind === 'raw' ? 0 : 2) | (i === blocks.length - 1 ? 1 : 0)
    return [head & 255, (head >>> 8) & 255, head >>> 16, ...(block.kind === 'raw' ? block.bytes : [block.value])]
  })
  return Buffer.from([...header, ...body])
}

const block: fc.Arbitrary<Block> = fc.oneof(
  fc.uint8Array({ minLength: 1, maxLength: 100 }).map((bytes): Block => ({ kind: 'raw', bytes })),
  fc.record({ value: fc.nat(255), length: fc.integer({ min: 1, max: 300 }) }).map((run): Block => ({ kind: 'run', ...run })),
)
const frame: fc.Arbitrary<FrameShape> = fc.record({
  blocks: fc.array(block, { minLength: 1, maxLength: 6 }),
  sizeField: fc.constantFrom('none', 'single', 'window'),
  checksum: fc.constant(false),
})

test('a frame made by qemu-img, with padding behind it', () => {
  const target = new Uint8Array(65536)
  expect(zstdDecompressCluster(Buffer.concat([fromQemu, new Uint8Array(492)]), target)).toBeUndefined()
  expect(Buffer.compare(target, Buffer.alloc(65536, 'A'))).toBe(0)
  expect(parseZstdFrame(fromQemu)).toMatchObject({ length: 20, contentSize: 65536, skippable: false })
})

test('any run of frames is cut exactly and fills the cluster, whatever follows', () => {
  const skippable = Buffer.from([0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 9, 9, 9])
  fc.assert(
    fc.property(fc.array(frame, { minLength: 1, maxLength: 3 }), fc.uint8Array({ maxLength: 40 }), fc.boolean(), (frames, tail, skip) => {
      const content = contentOf(frames.flatMap(({ blocks }) => blocks))
      const target = new Uint8Array(content.length)
      const stream = [...(skip ? [skippable] : []), ...frames.map((shape) => encode(shape)), tail]
      expect(zstdDecompressCluster(Buffer.concat(stream), target)).toBeUndefined()
      expect(Buffer.compare(target, content)).toBe(0)
      const whole = encode(frames[0]!)
      expect(parseZstdFrame(Buffer.concat([whole, tail]))).toMatchObject({ length: whole.length })
    }),
  )
})

test('a frame that overruns the cluster, ends early or is damaged is refused with a reason', () => {
  const target = new Uint8Array(65535)
  expect(zstdDecompressCluster(fromQemu, target)).toMatch('holds more than the cluster')
  expect(zstdDecompressCluster(fromQemu, new Uint8Array(65537))).toMatch('cut short (byte 20')
  expect(zstdDecompressCluster(fromQemu.subarray(0, 15), new Uint8Array(65536))).toMatch('cut short')
  expect(zstdDecompressCluster(new Uint8Array(512), target)).toMatch('the frame magic is 0')
  const short = encode({ blocks: [{ kind: 'run', value: 1, length: 10 }], sizeField: 'single', checksum: false })
  short[5] = 20
  expect(zstdDecompressCluster(short, new Uint8Array(20))).toBeTypeOf('string')
  const bomb = encode({ blocks: Array.from({ length: 50 }, () => ({ kind: 'run', value: 1, length: 131072 })), sizeField: 'none', checksum: false })
  expect(zstdDecompressCluster(bomb, target)).toBeTypeOf('string')
})

test('a window declared far beyond the cluster costs no memory', () => {
  // 2^31 bytes: the largest the bundled decoder would allocate is just below
  const huge = encode({ blocks: [{ kind: 'run', value: 7, length: 4096 }], sizeField: 'none', checksum: false }, (20 << 3) | 7)
  const target = new Uint8Array(4096)
  const before = process.memoryUsage().arrayBuffers
  const problem = zstdDecompressCluster(huge, target)
  expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(64 << 20)
  // native decoders refuse such windows, the bundled one reads it
  if (!canCompressZstd) expect([problem, target[4095]]).toEqual([undefined, 7])
})

test('random bytes behind a valid magic never make it throw', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 80 }), fc.nat(255), (bytes, at) => {
      const damaged = Buffer.from(fromQemu)
      damaged[4 + (at % 16)] = bytes[0] ?? 0
      for (const source of [Buffer.concat([fromQemu.subarray(0, 4), bytes]), damaged]) {
        const problem = zstdDecompressCluster(source, new Uint8Array(65536))
        expect(problem === undefined || problem.startsWith('zstd: ')).toBe(true)
      }
    }),
  )
})

test('writing zstd works where Node has it, and says which Node is needed where it has not', () => {
  const cluster = new Uint8Array(65536).fill(5)
  if (canCompressZstd) {
    const target = new Uint8Array(65536)
    const compressed = zstdCompressCluster(cluster)!
    expect(parseZstdFrame(compressed)).toMatchObject({ contentSize: 65536, length: compressed.length })
    expect(zstdDecompressCluster(compressed, target)).toBeUndefined()
    expect(target).toEqual(cluster)
  } else {
    expect(() => zstdCompressCluster(cluster)).toThrow(/Node 22\.15/)
  }
})

test('a damaged cluster is a FormatError with its host offset', () => {
  expect(() => decompressCluster('zstd', new Uint8Array(512), new Uint8Array(512), 4096)).toThrow(/compressed cluster: zstd: .* \(offset 4096\)/)
  expect(() => decompressCluster('zlib', new Uint8Array(0), new Uint8Array(512), 4096)).toThrow(/compressed cluster: deflate: .* \(offset 4096\)/)
  expect(compressCluster('zlib', new Uint8Array(512))).toHaveLength(compressCluster('zlib', new Uint8Array(512))!.length)
})
