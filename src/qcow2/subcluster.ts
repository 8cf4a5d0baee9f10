/**
 * The second word of an extended L2 entry (spec "Extended L2 Entries"): two bits for each of the 32
 * subclusters. Knows only these 64 bits and whether the first word holds a host offset.
 *
 *   63 ................ 32   31 ................ 0
 *   ZERO, subcluster 31..0   ALLOC, subcluster 31..0
 *
 *   host offset  ALLOC  ZERO    the subcluster is
 *   yes          1      0       data
 *   yes          0      1       zeroes, space kept
 *   yes          0      0       unallocated, space kept
 *   no           0      1       zeroes
 *   no           0      0       unallocated
 *   yes          1      1       invalid, and with it the whole cluster
 *   no           1      any     invalid, and with it the whole cluster
 */

/** How one subcluster reads. */
export type SubclusterKind = 'unallocated' | 'zero' | 'data'

/** A run of equal subclusters. */
export interface SubclusterRun {
  readonly kind: SubclusterKind
  /** Subclusters. */
  readonly count: number
}

/** True if the pair of bitmaps is one the specification allows. */
export function validSubclusters(hasOffset: boolean, zero: number, alloc: number): boolean {
  return (zero & alloc) === 0 && (hasOffset || alloc === 0)
}

/** How subcluster `index` of a valid entry reads. */
export function subclusterKind(zero: number, alloc: number, index: number): SubclusterKind {
  if (((alloc >>> index) & 1) !== 0) return 'data'
  return ((zero >>> index) & 1) !== 0 ? 'zero' : 'unallocated'
}

/** The kind of subcluster `index`, and how many from there on share it. */
export function subclusterRun(zero: number, alloc: number, index: number): SubclusterRun {
  const kind = subclusterKind(zero, alloc, index)
  let end = index + 1
  while (end < 32 && subclusterKind(zero, alloc, end) === kind) end++
  return { kind, count: end - index }
}

/** The bits of subclusters `[first, first + count)`, as an unsigned 32-bit number. */
export function subclusterMask(first: number, count: number): number {
  if (count === 0) return 0
  const ones = count === 32 ? 0xffff_ffff : (1 << count) - 1
  return (ones << first) >>> 0
}
