/** What a check found, and the collector that the parts of a check report to. */

/** What is wrong, where it has a name that programs may go by. */
export type CheckProblem =
  /** Bits of an entry are set that have no meaning. */
  | 'reserved bits'
  /** An offset is not a multiple of the cluster size. */
  | 'unaligned'
  /** The same, of a cluster that holds nothing yet but zeroes: a repair takes the offset away. */
  | 'unaligned preallocation'
  /** What is referred to ends a cluster or more past the end of the file. */
  | 'past end of file'
  /** A subcluster has a place in a cluster that has none. */
  | 'subclusters without cluster'
  /** COPIED is set on a compressed cluster. */
  | 'compressed with COPIED'
  /** A refcount block that something else refers to as well. */
  | 'shared refcount block'
  /** More references than the refcounts can count. */
  | 'too many references'
  /** A snapshot without the extra data that version 3 demands. */
  | 'incomplete snapshot'
  /** A snapshot with more extra data than QEMU allows. */
  | 'too much extra data'
  /** More snapshots than QEMU allows. */
  | 'too many snapshots'
  /** Snapshots past the largest size of their table. */
  | 'snapshot table too large'

/** One thing that is wrong with an image. */
export interface CheckFinding {
  /** A corruption endangers data; a leak only wastes space. */
  readonly kind: 'corruption' | 'leak'
  /** What is wrong, by the specification's name: `refcount`, `L1 entry`, `L2 entry`, `snapshot table`, ... */
  readonly structure: string
  /** Byte offset in the image file of the entry, or of the cluster for a refcount. */
  readonly offset: number
  /** For people; the wording may change. */
  readonly message: string
  readonly problem?: CheckProblem
  /** The offset or the number of bytes or of things that is wrong. */
  readonly value?: number
  /** The flag of an entry that is wrong, by the specification's name. */
  readonly flag?: 'COPIED'
  /** The L1 or L2 entry as the file has it: 16 hexadecimal digits, of which the first is the most significant. */
  readonly entry?: string
  /** Which entry of its table, counted from 0. */
  readonly index?: number
  /** The refcount that was expected, where the finding is about one. */
  readonly expected?: number
  /** The refcount that was found: of the cluster, or of the cluster that the entry refers to. */
  readonly found?: number
}

/** The result of a check. The counts are those of `qemu-img check`. */
export interface CheckReport {
  /** End of the last host cluster in use, in bytes. */
  readonly imageEndOffset: number
  /** Problems that prevented a part of the check. */
  readonly checkErrors: number
  /** Corruptions that are left. */
  readonly corruptions: number
  /** Leaked clusters that are left. */
  readonly leaks: number
  /** Corruptions that a repair set right. */
  readonly corruptionsFixed: number
  /** Leaked clusters that a repair freed. */
  readonly leaksFixed: number
  /** Guest clusters of the disk. */
  readonly totalClusters: number
  /** Guest clusters of the active layer that own host space, VM state included. */
  readonly allocatedClusters: number
  /** Allocated clusters that do not follow the one before in the host file; every compressed one counts. */
  readonly fragmentedClusters: number
  /** Guest clusters that are stored compressed. */
  readonly compressedClusters: number
  /**
   * Clusters that data and metadata, or two kinds of metadata, claim at once. `qemu-img check` does not
   * look for them: an image whose counters were "repaired" around one passes, though its content is damaged.
   */
  readonly overlaps: number
  /** What is wrong, in file order, at most {@link CheckOptions.maxFindings}; the counts are complete. */
  readonly findings: readonly CheckFinding[]
  /** After a repair: of what the first check listed, what is no longer wrong. */
  readonly repaired?: readonly CheckFinding[]
  /** After a repair that built the refcount structures anew: byte offsets of the clusters of the old ones that it freed, ascending. */
  readonly freedRefcountClusters?: readonly number[]
}

/** The finding is about a stored counter. */
export function isCounter({ structure, expected }: CheckFinding): boolean {
  return structure === 'refcount' && expected !== undefined
}

/** An offset in a message: a damaged one may be past 2^53, where the digits of a number are rounded. */
export function offsetText(offset: number): string {
  return Number.isSafeInteger(offset) ? `${offset}` : `0x${BigInt(offset).toString(16)}`
}

/** What a part of a check found. */
type Found = Omit<CheckFinding, 'kind'> | (() => Omit<CheckFinding, 'kind'>)

/** Collects findings and counts. */
export class CheckCollector {
  checkErrors = 0
  corruptions = 0
  leaks = 0
  allocatedClusters = 0
  fragmentedClusters = 0
  compressedClusters = 0
  overlaps = 0
  readonly findings: CheckFinding[] = []
  readonly #maxFindings: number

  constructor(maxFindings: number) {
    this.#maxFindings = maxFindings
  }

  /**
   * `times`: through how many tables the same damage is reached; each counts, as QEMU counts. A finding given as a
   * function is made only if it is listed: a damaged image may have millions.
   */
  corruption(finding: Found, times = 1): void {
    this.corruptions += times
    this.#keep('corruption', finding)
  }

  leak(finding: Found): void {
    this.leaks++
    this.#keep('leak', finding)
  }

  overlap(finding: Found): void {
    this.overlaps++
    this.#keep('corruption', finding)
  }

  /** How many findings would still be listed. */
  get room(): number {
    return Math.max(0, this.#maxFindings - this.findings.length)
  }

  #keep(kind: CheckFinding['kind'], finding: Found): void {
    if (this.room > 0) this.findings.push({ kind, ...(typeof finding === 'function' ? finding() : finding) })
  }
}
