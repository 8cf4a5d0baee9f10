/** Why a snapshot table keeps an image from being opened, and what to do about it. */
import type { BlockDevice, CallOptions } from '../../block/device.ts'
import { FormatError, Qcow2Error } from '../../core/errors.ts'
import { findSnapshotTableDamage } from '../../qcow2/check.ts'
import { unreadableSnapshots } from '../print/findings.ts'

/** What to throw instead of `error`, which opening the image in `host` ended with: the same, unless the table is beyond its limits. */
export async function snapshotTableReason(host: BlockDevice, error: unknown, options: CallOptions = {}): Promise<unknown> {
  if (!(error instanceof FormatError) || error.structure !== 'snapshot table') return error
  const findings = await findSnapshotTableDamage(host, options).catch(() => undefined)
  const unreadable = findings && unreadableSnapshots(findings)
  return unreadable === undefined ? error : new Qcow2Error('ERR_FORMAT', `${unreadable.reason}\n${unreadable.advice}`, { cause: error })
}
