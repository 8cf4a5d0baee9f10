/**
 * The order in which a reverted guest asked for its memory. Recorded at the first revert and sent first
 * at later ones, it saves the guest most of its waiting: the same state takes nearly the same way.
 */
import { FormatError } from '../core/errors.ts'
import { parseJson } from '../core/json.ts'

/** Bytes of the smallest and the largest cluster: a page of any target, and what is still read for one fault. */
const clusterSizes = { least: 512, most: 2 << 20 }
/** Faults in one order: more than a guest of a terabyte could have, and few enough to be read in a moment. */
const mostFaults = 16 << 20

/** Clusters of RAM blocks in the order of their first faults; plain data, to be kept as JSON. */
export interface FaultOrder {
  readonly version: 1
  /** Bytes of a cluster, a power of two. */
  readonly clusterSize: number
  /** Names of RAM blocks. */
  readonly blocks: readonly string[]
  /** Pairs: index in `blocks`, index of the cluster within the block. */
  readonly faults: readonly number[]
}

/** Collects faults; a cluster counts once. */
export class FaultRecorder {
  readonly #clusterSize: number
  readonly #blocks: string[] = []
  readonly #faults: number[] = []
  readonly #seen = new Map<string, { index: number; clusters: Set<number> }>()

  /** `before`: an order to go on with, for example the one that was sent first. */
  constructor(clusterSize: number, before?: FaultOrder) {
    this.#clusterSize = clusterSize
    if (before !== undefined) for (const { block, offset } of faultsOf(before)) this.add(block, offset)
  }

  /** The guest waited for byte `offset` of `block`. */
  add(block: string, offset: number): void {
    let seen = this.#seen.get(block)
    if (seen === undefined) {
      seen = { index: this.#blocks.push(block) - 1, clusters: new Set() }
      this.#seen.set(block, seen)
    }
    const cluster = Math.floor(offset / this.#clusterSize)
    if (seen.clusters.has(cluster)) return
    seen.clusters.add(cluster)
    this.#faults.push(seen.index, cluster)
  }

  /** What was collected so far. */
  get order(): FaultOrder {
    return { version: 1, clusterSize: this.#clusterSize, blocks: [...this.#blocks], faults: [...this.#faults] }
  }
}

/** Block and byte offset of each cluster of an order. */
export function* faultsOf(order: FaultOrder): Generator<{ block: string; offset: number }, void, undefined> {
  for (let at = 0; at + 1 < order.faults.length; at += 2) {
    const block = order.blocks[order.faults[at]!]
    if (block !== undefined) yield { block, offset: order.faults[at + 1]! * order.clusterSize }
  }
}

/**
 * The part of an order that fits a saved VM; undefined if none does. An order only hints: one of another VM, or one that
 * somebody edited, must not get in the way.
 */
export function fittingOrder(order: FaultOrder, pageSize: number, blocks: Iterable<{ readonly name: string; readonly length: number }>): FaultOrder | undefined {
  if (problemOf(order) !== undefined || order.clusterSize < pageSize) return undefined
  const lengths = new Map(Array.from(blocks, ({ name, length }) => [name, length]))
  const faults: number[] = []
  for (let at = 0; at + 1 < order.faults.length; at += 2) {
    const [block, cluster] = [order.faults[at]!, order.faults[at + 1]!]
    const length = lengths.get(order.blocks[block] ?? '') ?? 0
    if (cluster * order.clusterSize < length) faults.push(block, cluster)
  }
  return faults.length === 0 ? undefined : { ...order, faults }
}

/** Reads an order from JSON. @throws FormatError (`ERR_FORMAT`) for anything else. */
export function parseFaultOrder(json: string): FaultOrder {
  const fail = (detail: string, cause?: unknown): FormatError =>
    new FormatError(detail, { structure: 'fault order' }, 'ERR_FORMAT', cause === undefined ? undefined : { cause })
  let value: unknown
  try {
    value = parseJson(json, 3 * mostFaults)
  } catch (cause) {
    throw fail('not valid JSON', cause)
  }
  const problem = problemOf(value)
  if (problem !== undefined) throw fail(problem)
  const { version, clusterSize, blocks, faults } = value as FaultOrder
  return { version, clusterSize, blocks, faults }
}

function problemOf(value: unknown): string | undefined {
  if (typeof value !== 'object' || value === null) return 'not an object'
  const { version, clusterSize, blocks, faults } = value as Partial<Record<keyof FaultOrder, unknown>>
  if (version !== 1) return `version is ${String(version)}, expected 1`
  const { least, most } = clusterSizes
  if (!isCount(clusterSize) || Math.log2(clusterSize) % 1 !== 0 || clusterSize < least || clusterSize > most) {
    return `clusterSize is ${String(clusterSize)}, expected a power of two from ${least} to ${most}`
  }
  if (!Array.isArray(blocks) || !blocks.every((block) => typeof block === 'string')) return 'blocks is not an array of names'
  if (!Array.isArray(faults) || faults.length % 2 !== 0 || !faults.every(isCount)) return 'faults is not an array of pairs of numbers'
  if (faults.length > 2 * mostFaults) return `${faults.length / 2} faults, allowed ${mostFaults}`
  return undefined
}

function isCount(value: unknown): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0
}
