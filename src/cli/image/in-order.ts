/** A target that takes bytes in their order only, as a device that is written from front to back. */
import { BaseDevice, anyRequest, type BlockLimits } from '../../block/device.ts'
import { Qcow2Error } from '../../core/errors.ts'

const zeroes = new Uint8Array(1 << 20)

/** Sends what is written, and zeroes for what is left out. `flush` sends those up to the size. */
export class InOrderDevice extends BaseDevice {
  readonly readOnly = false
  readonly limits: BlockLimits = anyRequest
  size = 0
  readonly #send: (bytes: Uint8Array) => Promise<void>
  #sent = 0

  constructor(send: (bytes: Uint8Array) => Promise<void>) {
    super()
    this.#send = send
  }

  override get growable(): boolean {
    return true
  }

  protected async onWrite(offset: number, bytes: Uint8Array): Promise<void> {
    if (offset < this.#sent) throw new Qcow2Error('ERR_UNSUPPORTED', `byte ${offset} comes after byte ${this.#sent} was sent`)
    await this.#zeroesTo(offset)
    await this.#send(bytes)
    this.#sent = offset + bytes.length
    this.size = Math.max(this.size, this.#sent)
  }

  protected override async onWriteZeroes(offset: number, length: number): Promise<void> {
    this.size = Math.max(this.size, offset + length)
    await Promise.resolve()
  }

  protected override async onResize(size: number): Promise<void> {
    this.size = size
    await Promise.resolve()
  }

  protected onFlush(): Promise<void> {
    return this.#zeroesTo(this.size)
  }

  protected onRead(): Promise<void> {
    return Promise.reject(new Qcow2Error('ERR_UNSUPPORTED', 'what was sent cannot be read again'))
  }

  protected onClose(): Promise<void> {
    return Promise.resolve()
  }

  async #zeroesTo(end: number): Promise<void> {
    for (; this.#sent < end; this.#sent += Math.min(zeroes.length, end - this.#sent)) {
      await this.#send(zeroes.subarray(0, Math.min(zeroes.length, end - this.#sent)))
    }
  }
}
