/**
 * The order in which a reverted guest asked for its memory. Recorded at the first revert and sent first
 * at later ones, it saves the guest most of its waiting: the same state takes nearly the same way.
 */
import { FormatError } from '../core/errors.ts'

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

/** Reads an order from JSON. @throws FormatError (`ERR_FORMAT`) for anything else. */
export function parseFaultOrder(json: string): FaultOrder {
  const fail = (detail: string, cause?: unknown): FormatError =>
    new FormatError(detail, { structure: 'fault order' }, 'ERR_FORMAT', cause === undefined ? undefined : { cause })
  let value: Partial<FaultOrder> | null
  try {
    value = JSON.parse(json) as Partial<FaultOrder> | null
  } catch (cause) {
    throw fail('not valid JSON', cause)
  }
  if (typeof value !== 'object' || value === null) throw fail('not an object')
  const { version, clusterSize, blocks, faults } = value
  if (version !== 1) throw fail(`version is ${String(version)}, expected 1`)
  if (!isPositive(clusterSize) || Math.log2(clusterSize) % 1 !== 0) throw fail(`clusterSize is ${String(clusterSize)}, expected a power of two`)
  if (!Array.isArray(blocks) || !blocks.every((block) => typeof block === 'string')) throw fail('blocks is not an array of names')
  if (!Array.isArray(faults) || faults.length % 2 !== 0 || !faults.every((fault) => isPositive(fault) || fault === 0)) {
    throw fail('faults is not an array of pairs of numbers')
  }
  return { version, clusterSize, blocks, faults }
}

function isPositive(value: unknown): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value > 0
}
