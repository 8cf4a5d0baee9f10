/** What a check found and a repair did, a line each, in the words of qemu-img 10.0 where it has words for it. */
import { isCounter, offsetText, type CheckFinding, type CheckProblem, type CheckReport } from '../../qcow2/check-report.ts'

/**
 * The lines of a report, in the order in which qemu-img comes to it: structures, then counters, which it tells before it
 * repairs them too, then COPIED flags. What cannot be repaired is told again whenever the image is gone through again.
 */
export function findingLines(report: CheckReport, clusterSize: number): string[] {
  const { repaired = [], findings, freedRefcountClusters } = report
  const lines = (list: readonly CheckFinding[], among: Rank, isRepaired: boolean): string[] =>
    list.filter((finding) => rankOf(finding) === among).map((finding) => findingLine(finding, clusterSize, isRepaired))
  const structures = lines(findings, 'structure', false)
  const left = [...structures, ...lines(findings, 'counter', false), ...lines(findings, 'flag', false)]
  if (report.corruptionsFixed + report.leaksFixed === 0) return left
  const rebuilt = freedRefcountClusters?.map((offset) => `Repairing cluster ${offset / clusterSize} refcount=1 reference=0`)
  return [
    ...lines(repaired, 'structure', true),
    ...structures,
    ...lines(repaired, 'counter', false),
    ...(rebuilt === undefined ? lines(repaired, 'counter', true) : ['Rebuilding refcount structure', ...structures, ...rebuilt]),
    ...lines(repaired, 'flag', true),
    ...left,
  ]
}

type Rank = 'structure' | 'counter' | 'flag'

function rankOf(finding: CheckFinding): Rank {
  if (isCounter(finding)) return 'counter'
  const { flag, found } = finding
  return flag === undefined || found === undefined ? 'structure' : 'flag'
}

function findingLine(finding: CheckFinding, clusterSize: number, repaired: boolean): string {
  const { kind, structure, offset, message, expected, found } = finding
  const word = repaired ? 'Repairing' : 'ERROR'
  if (isCounter(finding)) {
    return `${kind === 'leak' && !repaired ? 'Leaked' : word} cluster ${Math.floor(offset / clusterSize)} refcount=${found} reference=${expected}`
  }
  return flagLine(finding, word) ?? problemLine(finding, word) ?? `${word} ${structure} at offset ${offsetText(offset)}: ${message}`
}

function flagLine({ flag, entry, index, found }: CheckFinding, word: string): string | undefined {
  if (flag === undefined || entry === undefined || found === undefined) return undefined
  const what = index === undefined ? `data cluster: l2_entry=${digits(entry)}` : `L2 cluster: l1_index=${index} l1_entry=${digits(entry)}`
  return `${word} OFLAG_COPIED ${what} refcount=${found}`
}

function problemLine(finding: CheckFinding, word: 'ERROR' | 'Repairing'): string | undefined {
  const { structure, problem, value = 0, offset, index, entry = '' } = finding
  if (structure === 'refcount table') return refcountTableLine(problem, index, value, word)
  switch (problem) {
    case 'reserved bits':
      return `${word} found ${structure === 'L1 entry' ? 'L1' : 'l2'} entry with reserved bits set: ${digits(entry)}`
    case 'subclusters without cluster':
      return `${word}: Unallocated cluster has non-zero subcluster allocation map`
    case 'compressed with COPIED':
      return `${word}: coffset=0x${hex(value)}: copied flag must never be set for compressed clusters`
    case 'unaligned':
    case 'unaligned preallocation':
      if (structure === 'L1 entry') return `${word} l2_offset=${hex(value)}: Table is not cluster aligned; L1 entry corrupted`
      return `${word} offset=${hex(value)}: ${problem === 'unaligned' ? 'Data' : 'Preallocated'} cluster is not properly aligned; L2 entry corrupted.`
    case 'past end of file':
      return `ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x${hex(offset)} size 0x${hex(value)}`
    case 'too many references':
      return `ERROR: overflow cluster offset=0x${hex(offset)}\n${overflowAdvice}`
    case 'incomplete snapshot':
      return `${word} snapshot table entry ${index} is incomplete`
    default:
      return word === 'Repairing' ? discardLine(finding) : undefined
  }
}

/** What a repair cuts off the snapshot table. */
function discardLine({ problem, value, index }: CheckFinding): string | undefined {
  switch (problem) {
    case 'too much extra data':
      return `Discarding too much extra metadata in snapshot table entry ${index} (${value} > 1024)`
    case 'too many snapshots':
      return `Discarding ${value} overhanging snapshots`
    case 'snapshot table too large':
      return `Discarding ${value} overhanging snapshots (snapshot table is too big)`
    default:
      return undefined
  }
}

function refcountTableLine(problem: CheckProblem | undefined, index: number | undefined, value: number, word: string): string | undefined {
  switch (problem) {
    case 'reserved bits':
      return `${word} refcount table entry ${index} has reserved bits set`
    case 'unaligned':
      return `${word} refcount block ${index} is not cluster aligned; refcount table entry corrupted`
    case 'past end of file':
      return `${word} refcount block ${index} is outside image`
    case 'shared refcount block':
      return `${word} refcount block ${index} refcount=${value}`
    default:
      return undefined
  }
}

const overflowAdvice =
  'Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing'

/** Why qemu-img does not read the snapshot table of an image at all. */
export interface UnreadableSnapshots {
  readonly reason: string
  /** As a check says it. */
  readonly inCheck: string
  readonly advice: string
}

/**
 * What keeps qemu-img from the snapshot table; undefined if nothing does.
 * @param findings of a check, in the order of the file
 */
export function unreadableSnapshots(findings: readonly CheckFinding[]): UnreadableSnapshots | undefined {
  for (const { problem, index, value } of findings) {
    switch (problem) {
      case 'too many snapshots':
        return { reason: 'Snapshot table too large', inCheck: 'snapshot table too large', advice: removeAll(value) }
      case 'too much extra data':
        return unreadable(`Too much extra metadata in snapshot table entry ${index}`, 'You can force-remove this extra metadata with qemu-img check -r all')
      case 'snapshot table too large':
        return unreadable('Snapshot table is too big', removeAll(value))
    }
  }
  return undefined
}

function unreadable(reason: string, advice: string): UnreadableSnapshots {
  return { reason, inCheck: `failed to read the snapshot table: ${reason}`, advice }
}

function removeAll(count: number | undefined): string {
  return `You can force-remove all ${count} overhanging snapshots with qemu-img check -r all`
}

/** Of an entry, without leading zeroes. */
function digits(entry: string): string {
  return entry.replace(/^0+/, '')
}

function hex(value: number): string {
  return BigInt(value).toString(16)
}
