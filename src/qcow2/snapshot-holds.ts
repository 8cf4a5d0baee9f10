/**
 * What a program holds of the snapshots of an open image, beside what the file says: those it is writing,
 * and those it reads. The engine owns it, so that every operation on the whole image sees it.
 */
import { Qcow2Error } from '../core/errors.ts'

/** Host space that is counted although nothing in the file refers to it. Offsets and lengths in bytes. */
export interface HeldSpace {
  /** L1 entries of a disk, in memory. */
  readonly l1: Uint8Array
  /** Offsets of L2 tables that no L1 table names. */
  readonly tables: readonly number[]
  /** Data that no L2 table maps. */
  readonly data: readonly { readonly offset: number; readonly length: number }[]
}

/** A snapshot that is being written. */
export interface UnfinishedSnapshot {
  readonly name: string
  /** What it holds now; asked for while no request is in flight. */
  held(): HeldSpace
  /** Waits for a `finish` that has begun; without one gives the snapshot up. */
  close(): Promise<void>
}

export class SnapshotHolds {
  /** Changes only together with what is held: while no request is in flight, or before anything is. */
  readonly unfinished: Set<UnfinishedSnapshot> = new Set<UnfinishedSnapshot>()
  /** How often each snapshot is open, by id. */
  readonly #open = new Map<string, number>()

  /** Counts an opening; the function it gives takes it back. */
  open(id: string): () => void {
    this.#open.set(id, (this.#open.get(id) ?? 0) + 1)
    return () => {
      const count = this.#open.get(id)! - 1
      if (count > 0) this.#open.set(id, count)
      else this.#open.delete(id)
    }
  }

  isOpen(id: string): boolean {
    return this.#open.has(id)
  }

  /** Refuses what would pull the ground from under a snapshot that is being written or read. */
  assertNone(operation: string): void {
    for (const { name } of this.unfinished) {
      throw new Qcow2Error('ERR_BUSY', `${operation}: snapshot ${name} is being written; finish or close it first`)
    }
    for (const id of this.#open.keys()) throw new Qcow2Error('ERR_BUSY', `${operation}: the snapshot with id ${id} is open; close it first`)
  }
}
