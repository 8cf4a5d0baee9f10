/** Giving the host space back that an image does not use at its end. */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { withSource, type Source } from '../block/source.ts'
import { Qcow2Error } from '../core/errors.ts'
import { runCheck } from './check.ts'

/**
 * Cuts an image file behind the last cluster that anything refers to or counts; the bytes given
 * back, none for a device of fixed size. The file is opened and closed again, a device given stays open; the image must not be open. Only what no
 * counter counts is cut, so a crash at any point leaves a sound image. Leaked clusters count: `repairImage` frees them first.
 *
 * Free clusters between used ones stay: converting the image leaves them behind.
 * @throws Qcow2Error `ERR_CORRUPT` if the image is damaged: then its end is not known for sure.
 */
export function compactImage(source: Source, options: CallOptions = {}): Promise<number> {
  return withSource(source, { signal: options.signal }, (host) => compactHost(host, options))
}

async function compactHost(host: BlockDevice, options: CallOptions): Promise<number> {
  const { report } = await runCheck(host, { signal: options.signal })
  if (report.corruptions > 0 || report.checkErrors > 0) {
    throw new Qcow2Error('ERR_CORRUPT', `compact: the image has ${report.corruptions} corruptions; repair it first`)
  }
  const excess = Math.max(0, host.size - report.imageEndOffset)
  if (excess === 0 || !host.growable) return 0
  await host.resize(report.imageEndOffset, options)
  await host.flush(options)
  return excess
}
