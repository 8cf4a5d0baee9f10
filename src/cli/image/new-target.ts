/** The file of a result that a command makes. Owns what is left of it when the command fails or is interrupted. */
import type { BlockDevice } from '../../block/device.ts'
import { newFile } from '../../block/file-new.ts'
import type { Context } from '../command.ts'
import { ExitError } from '../errors.ts'
import { openExport } from './open.ts'
import { syncLimit } from './open-settings.ts'
import { couldNotCreate } from './reasons.ts'
import { nbdUri } from './nbd-name.ts'
import type { Place } from './spec.ts'

type ExportPlace = Extract<Place, { kind: 'nbd' }>

/** Where a result can go: to a path, or onto an NBD export, whose size stays. */
export type TargetPlace = string | ExportPlace

/** The place, if a result can be made there. */
export function targetPlace(place: Place): TargetPlace | undefined {
  return place.kind === 'file' ? place.path : place.kind === 'nbd' ? place : undefined
}

/** How messages call it. */
export function targetName(place: TargetPlace): string {
  return typeof place === 'string' ? place : nbdUri(place)
}

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
export async function newTarget(context: TargetContext, path: TargetPlace, how: TargetHow = {}): Promise<NewTarget> {
  if (typeof path !== 'string') return ontoExport(context, path, how)
  const { direct = false, mode } = how
  const { wrapDevice, signal, leaves } = context
  const file = await newFile(path, { ...(direct ? { direct } : { syncLimit }), mode, signal }).catch((error: unknown) => {
    throw signal.aborted ? error : cannotBegin(path, how, error)
  })
  leaves(file.shows === 'at once' ? `${path} is incomplete` : `${path} is as it was`)
  const device = wrapDevice?.(file.device, path) ?? file.device
  return { device, keep: () => file.keep(), discard: () => file.discard() }
}

/** What is there is overwritten as far as the result needs it. */
async function ontoExport({ wrapDevice, signal, leaves }: TargetContext, place: ExportPlace, how: TargetHow): Promise<NewTarget> {
  const name = targetName(place)
  const client = await openExport(place, { readOnly: false, signal }).catch((error: unknown) => {
    throw signal.aborted ? error : cannotBegin(name, how, error)
  })
  leaves(`${name} is incomplete`)
  const device = wrapDevice?.(client, name) ?? client
  // the device that was given out may have been closed by what was made on it: then it was flushed too
  const keep = async (): Promise<void> => (client.closed ? undefined : client.flush({ signal }))
  return { device, keep, discard: () => device.close() }
}

function cannotBegin(name: string, { failed }: TargetHow, error: unknown): ExitError {
  const reason = couldNotCreate(name, error)
  return failed === undefined ? reason : new ExitError(1, `${failed}: ${reason.message}`, { cause: error })
}

/** Makes the file of a result by a task; if that fails, what had the name stays. */
export async function intoNewTarget<T>(context: TargetContext, path: TargetPlace, how: TargetHow, task: (device: BlockDevice) => Promise<T>): Promise<T> {
  const target = await newTarget(context, path, how)
  try {
    const result = await task(target.device)
    await target.keep()
    return result
  } finally {
    await target.discard()
  }
}
