/**
 * Where a RAM image keeps what: guest memory is the disk of a qcow2 image, the rest of the migration
 * stream is the VM state of an internal snapshot of it. Owns the description of this layout, which
 * ends the VM state area.
 *
 * ```
 * disk            | block 0 | … | block 1 | …       each at a multiple of 2 MiB, in stream order
 * VM state area   | the stream without its pages | layout (JSON) | trailer |
 * trailer         | be32 length of the JSON | be32 version 1 | "RAMIMAGE" |
 * ```
 * Zero pages are unallocated where no backing file shows through; pages that the stream did not have
 * at all are listed as absent.
 */
import { FormatError } from '../core/errors.ts'
import { parseJson } from '../core/json.ts'
import { viewOf } from '../bytes/view.ts'

/** A run of pages, in bytes: offset and length. */
export type AbsentRange = readonly [offset: number, length: number]

/** Where one RAM block is. */
export interface RamImageBlock {
  readonly name: string
  /** Bytes, a multiple of the page size. */
  readonly length: number
  /** Offset in the disk, a multiple of 2 MiB. */
  readonly position: number
  /** Guest physical address, where the stream told it. */
  readonly gpa?: number
  /** What the stream had no page for, in ascending order. */
  readonly absent: readonly AbsentRange[]
}

/** Version 1 of the layout. */
export interface RamImageLayout {
  /** Target page size in bytes. */
  readonly pageSize: number
  /** Bytes of the stream without its pages. */
  readonly restLength: number
  /** Where in it the pages belong. */
  readonly pagesAt: number
  readonly blocks: readonly RamImageBlock[]
}

/** RAM blocks begin at multiples of this: the largest cluster size, and the usual huge page. */
const blockAlignment: number = 2 << 20
/** Bytes of the trailer. */
export const trailerLength = 16

/** Values in the JSON: some millions of absent ranges, three a range. */
const mostValues = 8 << 20

const version = 1
const magic = 'RAMIMAGE'
const structure = 'RAM image layout'

/** The next position at which a RAM block may begin. */
export function alignBlock(position: number): number {
  return Math.ceil(position / blockAlignment) * blockAlignment
}

/** The layout with its trailer. */
export function encodeLayout(layout: RamImageLayout): Uint8Array {
  const json = new TextEncoder().encode(JSON.stringify(layout))
  const bytes = new Uint8Array(json.length + trailerLength)
  const view = viewOf(bytes)
  bytes.set(json)
  view.setUint32(json.length, json.length)
  view.setUint32(json.length + 4, version)
  bytes.set(new TextEncoder().encode(magic), json.length + 8)
  return bytes
}

/**
 * Length of the JSON before a trailer; undefined if the 16 bytes are none.
 * @throws FormatError if the trailer is of another version
 */
export function decodeTrailer(trailer: Uint8Array): number | undefined {
  if (new TextDecoder().decode(trailer.subarray(8)) !== magic) return undefined
  const view = viewOf(trailer)
  const found = view.getUint32(4)
  if (found !== version) throw new FormatError(`version is ${found}, known is ${version}`, { structure, field: 'version' })
  return view.getUint32(0)
}

/**
 * The layout of a RAM image whose disk has `diskSize` bytes.
 * @throws FormatError if it is not one
 */
export function decodeLayout(json: Uint8Array, diskSize: number): RamImageLayout {
  let parsed: unknown
  try {
    parsed = parseJson(new TextDecoder('utf-8', { fatal: true }).decode(json), mostValues)
  } catch (cause) {
    throw new FormatError(`not valid JSON: ${(cause as Error).message}`, { structure }, 'ERR_FORMAT', { cause })
  }
  const problem = layoutProblem(parsed as Partial<RamImageLayout> | null, diskSize)
  if (problem !== undefined) throw new FormatError(problem, { structure })
  return parsed as RamImageLayout
}

function layoutProblem(layout: Partial<RamImageLayout> | null, diskSize: number): string | undefined {
  if (layout === null || typeof layout !== 'object') return 'not an object'
  const { pageSize, restLength, pagesAt, blocks } = layout
  if (!isCount(pageSize) || Math.log2(pageSize) % 1 !== 0 || pageSize < 256 || pageSize > 1 << 20) return `pageSize is ${String(pageSize)}`
  if (!isCount(restLength) || !isCount(pagesAt) || pagesAt > restLength) return `pagesAt is ${String(pagesAt)}, restLength ${String(restLength)}`
  if (!Array.isArray(blocks)) return 'blocks is not an array'
  let end = 0
  for (const block of blocks as (Partial<RamImageBlock> | null)[]) {
    if (typeof block !== 'object' || block === null) return 'a block is not an object'
    const { name, length, position, absent } = block
    if (typeof name !== 'string' || !isCount(length) || !isCount(position) || !Array.isArray(absent)) return 'a block lacks name, length, position or absent'
    if (length % pageSize !== 0 || position % blockAlignment !== 0 || position < end || position + length > diskSize) {
      return `block '${name}' of ${length} bytes at ${position} does not fit a disk of ${diskSize} bytes`
    }
    if (!rangesFit(absent as unknown[], length, pageSize)) return `block '${name}' has absent ranges that do not fit`
    end = position + length
  }
  return undefined
}

function rangesFit(ranges: unknown[], length: number, pageSize: number): boolean {
  let end = 0
  return ranges.every((range) => {
    if (!Array.isArray(range) || range.length !== 2) return false
    const [offset, size] = range as unknown[]
    if (!isCount(offset) || !isCount(size) || offset % pageSize !== 0 || size % pageSize !== 0 || offset < end || offset + size > length) return false
    end = offset + size
    return true
  })
}

function isCount(value: unknown): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0
}
