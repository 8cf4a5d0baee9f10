/**
 * The body of the `dirty-bitmap` section: chunks until one with flag EOS.
 *
 * ```
 * flags (1, 2 or 4 bytes) [node name] [bitmap name]
 *   START: be32 granularity, u8 flags   BITS: be64 start sector, be32 sectors [, be64 length, bits]
 * ```
 */
import { hex, streamError } from './format.ts'
import type { ParserInput } from './input.ts'
import { passThrough, type Passage } from './pass-through.ts'
import type { DirtyBitmapRecord, MigrationRecord } from './records.ts'

const structure = 'dirty-bitmap section'

/** Flags of a chunk; the continuation bits of longer flag fields are removed. */
export const dirtyBitmapFlag = {
  eos: 0x01,
  zeroes: 0x02,
  bitmapName: 0x04,
  nodeName: 0x08,
  start: 0x10,
  complete: 0x20,
  bits: 0x40,
} as const

/** Reads the bodies of all `dirty-bitmap` sections of a stream. */
export class DirtyBitmapSection {
  #passages: Passage[] = []

  /** The next record of a body. A `dirty-bitmap` record with flag EOS is its last. */
  next(input: ParserInput): MigrationRecord {
    return passThrough(input, this.#passages) ?? this.#chunk(input)
  }

  #chunk(input: ParserInput): DirtyBitmapRecord {
    const offset = input.offset
    const flags = readFlags(input)
    const value = flags & 0x7f
    const has = (flag: number): boolean => (value & flag) !== 0
    const kinds = Number(has(dirtyBitmapFlag.start)) + Number(has(dirtyBitmapFlag.complete)) + Number(has(dirtyBitmapFlag.bits))
    if (kinds > 1) throw streamError(structure, 'flags', `flags ${hex(flags)} say more than one of START, COMPLETE, BITS`, offset)
    const node = has(dirtyBitmapFlag.nodeName) ? input.counted(structure, 'node name') : undefined
    const bitmap = has(dirtyBitmapFlag.bitmapName) ? input.counted(structure, 'bitmap name') : undefined
    const started = has(dirtyBitmapFlag.start) ? { granularity: input.u32(), bitmapFlags: input.u8() } : undefined
    const bits = has(dirtyBitmapFlag.bits) ? readBits(input, has(dirtyBitmapFlag.zeroes)) : undefined
    if (bits?.bitsLength !== undefined) this.#passages = [{ of: 'dirty-bitmap', length: bits.bitsLength }]
    return {
      kind: 'dirty-bitmap',
      offset,
      length: input.offset - offset,
      flags,
      ...(node !== undefined && { node }),
      ...(bitmap !== undefined && { bitmap }),
      ...started,
      ...bits,
    }
  }
}

/** Bit 7 of the first byte says a second follows; bit 7 of the second, two more. */
function readFlags(input: ParserInput): number {
  const first = input.u8()
  if ((first & 0x80) === 0) return first
  const offset = input.offset - 1
  const second = input.u8()
  const flags = (second & 0x80) === 0 ? first * 0x100 + second : (first * 0x100 + second) * 0x1_0000 + input.u16()
  throw streamError(structure, 'flags', `flags ${hex(flags)} are not known`, offset)
}

function readBits(input: ParserInput, zeroes: boolean): { startSector: number; sectorCount: number; bitsLength?: number } {
  const startSector = input.u64(structure, 'start sector')
  const sectorCount = input.u32()
  if (zeroes) return { startSector, sectorCount }
  return { startSector, sectorCount, bitsLength: input.u64(structure, 'buffer size') }
}
