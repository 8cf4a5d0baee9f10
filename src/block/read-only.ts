/** The base of devices that can only be read. */
import { anyRequest, BaseDevice, type BlockLimits } from './device.ts'

/** A device that cannot be written, takes any read, and has nothing to close. A driver brings `size` and `onRead`. */
export abstract class ReadOnlyDevice extends BaseDevice {
  readonly readOnly: boolean = true
  readonly limits: BlockLimits = anyRequest

  /** `readOnly` refuses every write before it gets here. */
  protected onWrite(): Promise<void> {
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
