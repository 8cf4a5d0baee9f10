/** Checking and repairing an image that is open: its engine rests meanwhile, and reads the outcome anew. */
import { Qcow2Error } from '../core/errors.ts'
import type { CheckReport } from './check-report.ts'
import { checkImage, runCheck, type CheckOptions } from './check.ts'
import type { Engine } from './engine.ts'
import { readHeaderCluster, readState } from './open.ts'
import { repairImage } from './repair.ts'
import { settle } from './shutdown.ts'

/**
 * Checks the file of an open image, with `repair` repairs it, while no request is in flight. What snapshots
 * under construction hold is no leak; a repair, which sees the file alone, is refused while there are any.
 */
export function checkOpenImage(engine: Engine, options: CheckOptions & { readonly repair?: 'leaks' | 'all' | undefined }): Promise<CheckReport> {
  const { repair } = options
  if (engine.readOnly) {
    if (repair === undefined) return checkImage(engine.host.device, options)
    return Promise.reject(new Qcow2Error('ERR_READ_ONLY', 'the image is open read-only; open it for writing to repair it'))
  }
  return engine.requests.exclusive(async () => {
    if (engine.damage === undefined) await settle(engine)
    if (repair === undefined) {
      const held = [...engine.snapshotHolds.unfinished].map((snapshot) => snapshot.held())
      return (await runCheck(engine.host.device, { ...options, held })).report
    }
    engine.snapshotHolds.assertNone('repair')
    const report = await repairImage(engine.host.device, { ...options, repair })
    engine.reload(await readState(engine.host, await readHeaderCluster(engine.host), false))
    return report
  })
}
