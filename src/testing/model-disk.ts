/** The model that an image is compared with: a plain array of bytes, and copies of it as snapshots. */

/** A snapshot of a {@link ModelDisk}. */
export interface ModelSnapshot {
  /** What a guest read. */
  readonly disk: Uint8Array
  /** Empty without. */
  readonly vmState: Uint8Array
}

/** A disk that is nothing but its bytes. */
export class ModelDisk {
  /** What a guest reads. */
  bytes: Uint8Array
  /** Something was ever written compressed: many guest clusters may then share one host cluster and its counter. */
  compressed = false
  readonly #snapshots = new Map<string, ModelSnapshot>()
  #created = 0

  /** @param content size in bytes, or the bytes, which are copied */
  constructor(content: number | Uint8Array) {
    this.bytes = typeof content === 'number' ? new Uint8Array(content) : content.slice()
  }

  /** Size in bytes. */
  get size(): number {
    return this.bytes.length
  }

  /** Names of the snapshots, oldest first. */
  get snapshots(): string[] {
    return [...this.#snapshots.keys()]
  }

  /** What the snapshot holds. */
  snapshot(name: string): ModelSnapshot {
    const snapshot = this.#snapshots.get(name)
    if (snapshot === undefined) throw new RangeError(`the model has no snapshot ${name}`)
    return snapshot
  }

  /** Stores bytes. */
  write(offset: number, bytes: Uint8Array): void {
    this.bytes.set(bytes, offset)
  }

  /** Zeroes a range. */
  writeZeroes(offset: number, length: number): void {
    this.bytes.fill(0, offset, offset + length)
  }

  /** Cuts the disk, or lengthens it by zeroes. */
  resize(size: number): void {
    const bytes = new Uint8Array(size)
    bytes.set(this.bytes.subarray(0, Math.min(size, this.size)))
    this.bytes = bytes
  }

  /** A name that no snapshot had before. */
  get newName(): string {
    return `snapshot ${this.#created}`
  }

  /** Keeps a copy of the disk under a name, with a VM state. */
  createSnapshot(name: string, vmState: Uint8Array = new Uint8Array(0)): void {
    this.#created++
    this.#snapshots.set(name, { disk: this.bytes.slice(), vmState })
  }

  /** Makes the disk what it was at the snapshot, its size too. */
  applySnapshot(name: string): void {
    this.bytes = this.snapshot(name).disk.slice()
  }

  /** Forgets a snapshot. */
  deleteSnapshot(name: string): void {
    this.#snapshots.delete(name)
  }
}
