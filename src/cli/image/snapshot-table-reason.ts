/** Why a snapshot table keeps an image from being opened, and what to do about it. */
import type { BlockDevice } from '../../block/device.ts'
import { FormatError, Qcow2Error } from '../../core/errors.ts'
import { checkImage } from '../../qcow2/check.ts'
import { unreadableSnapshots } from '../print/findings.ts'

/** What to throw instead of `error`, which opening the image in `host` ended with: the same, unless the table is beyond its limits. */
export async function snapshotTableReason(host: BlockDevice, error: unknown): Promise<unknown> {
  if (!(error instanceof FormatError) || error.structure !== 'snapshot table') return error
  const report = await checkImage(host).catch(() => undefined)
  const unreadable = report && unreadableSnapshots(report.findings)
  return unreadable === undefined ? error : new Qcow2Error('ERR_FORMAT', `${unreadable.reason}\n${unreadable.advice}`, { cause: error })
}
