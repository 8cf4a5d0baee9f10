/** A device without a medium, to measure what stands above it. */
import { anyRequest, BaseDevice, type BlockLimits } from './device.ts'

/** Reads as zeroes and forgets what is written; every request completes at once. */
export class NullDevice extends BaseDevice {
  readonly size: number
  readonly readOnly: boolean = false
  readonly limits: BlockLimits = anyRequest

  /** @param size in bytes */
  constructor(size: number) {
    super()
    this.size = size
  }

  protected onRead(_offset: number, target: Uint8Array): Promise<void> {
    target.fill(0)
    return done
  }

  protected onWrite(): Promise<void> {
    return done
  }

  protected override onWriteZeroes(): Promise<void> {
    return done
  }

  protected onFlush(): Promise<void> {
    return done
  }

  protected onClose(): Promise<void> {
    return done
  }
}

const done: Promise<void> = Promise.resolve()
