/** A `Blob` as a read-only device: works in Node and in browsers, where a `File` is a `Blob`. */
import { IoError } from '../core/errors.ts'
import { anyRequest, BaseDevice, type BlockLimits } from './device.ts'

/** The bytes of a `Blob`, which are read piece by piece. Read-only. */
export class BlobDevice extends BaseDevice {
  readonly readOnly: boolean = true
  readonly limits: BlockLimits = anyRequest
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

  protected onWrite(): Promise<void> {
    return Promise.resolve() // never reached: read-only
  }

  protected onFlush(): Promise<void> {
    return Promise.resolve()
  }

  protected onClose(): Promise<void> {
    return Promise.resolve()
  }
}
