/** Operations on an image, chosen by fast-check. They fit every image: offsets and names are taken modulo what is there. */
import fc from 'fast-check'

/** One operation. Ranges wrap into the disk as it is then; snapshots are counted among those that exist. */
export type ImageOperation =
  | { readonly kind: 'write' | 'write compressed'; readonly offset: number; readonly length: number; readonly seed: number }
  | { readonly kind: 'write concurrently'; readonly parts: readonly WritePart[] }
  | { readonly kind: 'write zeroes'; readonly offset: number; readonly length: number; readonly unmap: boolean }
  | { readonly kind: 'discard' | 'read'; readonly offset: number; readonly length: number }
  | { readonly kind: 'snapshot create'; readonly vmState?: { readonly length: number; readonly seed: number } | undefined }
  | { readonly kind: 'snapshot apply' | 'snapshot delete'; readonly index: number }
  | { readonly kind: 'resize'; readonly size: number }
  | { readonly kind: 'flush' | 'reopen' }

/** One of several writes at once. */
export interface WritePart {
  /** First byte on the guest's disk. */
  readonly offset: number
  /** Bytes. */
  readonly length: number
  /** Of the content; see `seededBytes`. */
  readonly seed: number
}

/** A range of the disk in bytes. */
export interface GuestRange {
  /** First byte on the guest's disk. */
  readonly offset: number
  /** Bytes. */
  readonly length: number
}

/**
 * The ranges that an operation touches on a disk of `size` bytes: whole clusters where it compresses, disjoint ones
 * where it writes several. None for operations on the whole image.
 */
export function touchedRanges(operation: ImageOperation, size: number, clusterSize: number): GuestRange[] {
  if (operation.kind === 'write concurrently') return disjoint(operation.parts.map((part) => wrapped(part, size)))
  if (!('offset' in operation)) return []
  const { offset, length } = wrapped(operation, size)
  if (operation.kind !== 'write compressed') return [{ offset, length }]
  const start = offset - (offset % clusterSize)
  return [{ offset: start, length: Math.min(size, Math.ceil((offset + length) / clusterSize) * clusterSize) - start }]
}

function wrapped(range: GuestRange, size: number): GuestRange {
  const offset = size === 0 ? 0 : range.offset % size
  return { offset, length: Math.min(range.length, size - offset) }
}

/** Each range loses what ranges before it have; the order stays. */
function disjoint(ranges: readonly GuestRange[]): GuestRange[] {
  return ranges.map(({ offset, length }, index) => {
    let [start, end] = [offset, offset + length]
    for (const other of ranges.slice(0, index)) {
      const otherEnd = other.offset + other.length
      if (other.offset >= end || otherEnd <= start || other.length === 0) continue
      if (other.offset <= start) start = Math.min(end, otherEnd)
      else end = other.offset
    }
    return { offset: start, length: end - start }
  })
}

/** Options of {@link imageOperations}. */
export interface OperationConstraints {
  /** Most operations; default 12. */
  readonly maxLength?: number
  /** Largest size a resize asks for, in bytes; default 2 MiB. */
  readonly maxSize?: number
  /** Kinds to choose from; default all. */
  readonly kinds?: readonly ImageOperation['kind'][]
}

/** A sequence of operations, shrinking to fewer and smaller ones. */
export function imageOperations(constraints: OperationConstraints = {}): fc.Arbitrary<ImageOperation[]> {
  const { kinds } = constraints
  const maxSize = constraints.maxSize ?? 2 << 20
  const choices = weighted(maxSize).filter(({ kind }) => kinds === undefined || kinds.includes(kind))
  return fc.array(fc.oneof(...choices), { maxLength: constraints.maxLength ?? 12, size: 'max' })
}

interface Choice {
  readonly kind: ImageOperation['kind']
  readonly weight: number
  readonly arbitrary: fc.Arbitrary<ImageOperation>
}

function weighted(maxSize: number): Choice[] {
  const range = { offset: positions(maxSize), length: positions(256 << 10) }
  const seed = fc.integer({ min: 1, max: 1000 })
  const index = fc.nat(10)
  const choice = (kind: ImageOperation['kind'], weight: number, rest: Record<string, fc.Arbitrary<unknown>>): Choice => ({
    kind,
    weight,
    arbitrary: fc.record({ kind: fc.constant(kind), ...rest }) as unknown as fc.Arbitrary<ImageOperation>,
  })
  return [
    choice('write', 12, { ...range, seed }),
    choice('write compressed', 2, { ...range, seed }),
    choice('write concurrently', 3, { parts: fc.array(fc.record({ ...range, seed }), { minLength: 2, maxLength: 6 }) }),
    choice('write zeroes', 4, { ...range, unmap: fc.boolean() }),
    choice('discard', 4, range),
    choice('read', 2, range),
    choice('flush', 2, {}),
    choice('snapshot create', 3, { vmState: fc.option(fc.record({ length: positions(256 << 10), seed }), { nil: undefined }) }),
    choice('snapshot apply', 2, { index }),
    choice('snapshot delete', 2, { index }),
    choice('resize', 2, { size: fc.nat(Math.floor(maxSize / 512)).map((sectors) => sectors * 512) }),
    choice('reopen', 2, {}),
  ]
}

/** Numbers up to `max` that often fall on the borders of sectors, pages and clusters. */
function positions(max: number): fc.Arbitrary<number> {
  const multiples = (unit: number): fc.Arbitrary<number> => fc.nat(Math.floor(max / unit)).map((count) => count * unit)
  return fc.oneof(fc.nat(max), multiples(512), multiples(4096), multiples(65_536))
}
