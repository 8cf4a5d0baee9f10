/** The file of a result that a command makes. Owns what is left of it when the command fails or is interrupted. */
import type { BlockDevice } from '../../block/device.ts'
import { newFile } from '../../block/file-new.ts'
import type { Context } from '../command.ts'
import { ExitError } from '../errors.ts'
import { syncLimit } from './open.ts'
import { couldNotCreate } from './reasons.ts'

/** What a command has for its result's file. */
export type TargetContext = Pick<Context, 'wrapDevice' | 'leaves' | 'signal'>

/** How the file is made. */
export interface TargetHow {
  readonly direct?: boolean | undefined
  /** Permissions. */
  readonly mode?: number | undefined
  /** Begins the message if it cannot be made. */
  readonly failed?: string | undefined
}

/** The file of a result. */
export interface NewTarget {
  /** Empty, but for a block device; the command may watch it. */
  readonly device: BlockDevice
  /** The result is whole and flushed: it gets its name. */
  keep(): Promise<void>
  /** Closes it; if it was not kept, what had the name stays. */
  discard(): Promise<void>
}

/**
 * Begins the file of a result.
 * @throws ExitError
 */
export async function newTarget(context: TargetContext, path: string, { direct = false, mode, failed }: TargetHow = {}): Promise<NewTarget> {
  const { wrapDevice, signal, leaves } = context
  const file = await newFile(path, { ...(direct ? { direct } : { syncLimit }), mode, signal }).catch((error: unknown) => {
    if (signal.aborted) throw error
    const reason = couldNotCreate(path, error)
    throw failed === undefined ? reason : new ExitError(1, `${failed}: ${reason.message}`, { cause: error })
  })
  leaves(file.shows === 'at once' ? `${path} is incomplete` : `${path} is as it was`)
  const device = wrapDevice?.(file.device, path) ?? file.device
  return { device, keep: () => file.keep(), discard: () => file.discard() }
}

/** Makes the file of a result by a task; if that fails, what had the name stays. */
export async function intoNewTarget<T>(context: TargetContext, path: string, how: TargetHow, task: (device: BlockDevice) => Promise<T>): Promise<T> {
  const target = await newTarget(context, path, how)
  try {
    const result = await task(target.device)
    await target.keep()
    return result
  } finally {
    await target.discard()
  }
}
