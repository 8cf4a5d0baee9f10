/**
 * The compressed clusters that were read last, decompressed: small reads one after another would
 * otherwise decompress the same cluster again and again. Knows clusters by the place of their data.
 */

/** Bytes kept, but at least one cluster. */
const budget = 1 << 20

export class DecompressedClusters {
  readonly #clusters = new Map<number, Promise<Uint8Array>>()
  readonly #limit: number

  constructor(clusterSize: number) {
    this.#limit = Math.max(1, Math.min(8, Math.floor(budget / clusterSize)))
  }

  /** The cluster whose compressed data is at a host offset; `decompress` gets it if it is not here. */
  get(offset: number, decompress: () => Promise<Uint8Array>): Promise<Uint8Array> {
    const known = this.#clusters.get(offset)
    if (known !== undefined) return known
    const loading = decompress()
    this.#clusters.set(offset, loading)
    loading.catch(() => {
      if (this.#clusters.get(offset) === loading) this.#clusters.delete(offset)
    })
    for (const oldest of this.#clusters.keys()) {
      if (this.#clusters.size <= this.#limit) break
      this.#clusters.delete(oldest)
    }
    return loading
  }

  /** Forgets everything: new compressed data may come to lie where old data was. */
  clear(): void {
    this.#clusters.clear()
  }
}
