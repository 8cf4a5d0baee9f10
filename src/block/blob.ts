/** A `Blob` as a read-only device: works in Node and in browsers, where a `File` is a `Blob`. */
import { IoError } from '../core/errors.ts'
import { ReadOnlyDevice } from './read-only.ts'

/** The bytes of a `Blob`, which are read piece by piece. Read-only. */
export class BlobDevice extends ReadOnlyDevice {
  readonly #blob: Blob

  constructor(blob: Blob) {
    super()
    this.#blob = blob
  }

  get size(): number {
    return this.#blob.size
  }

  protected async onRead(offset: number, target: Uint8Array): Promise<void> {
    try {
      target.set(new Uint8Array(await this.#blob.slice(offset, offset + target.length).arrayBuffer()))
    } catch (cause) {
      throw new IoError('read', cause, { offset, length: target.length })
    }
  }
}
