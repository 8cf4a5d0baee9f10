/** Bringing an image to rest: everything written back, every counter as low as it can be. */
import { InFlight } from '../core/in-flight.ts'
import type { Engine } from './engine.ts'

/**
 * Makes everything durable, and lowers the counters of all freed clusters, which takes a second round:
 * a counter may fall only when the reference it counted is gone from the disk. Callers see to it that
 * no request is in flight.
 */
export async function settle(engine: Engine): Promise<void> {
  do {
    await engine.packer.finish()
    await engine.flush()
    await engine.allocator.released()
  } while (engine.hasUnwritten)
}

/** Settles a writable image, unless it was found damaged or nothing was written, and closes its files; throws the first error then. */
export async function closeEngine(engine: Engine): Promise<void> {
  await engine.marked()
  const ending = new InFlight()
  if (engine.readOnly) await engine.requests.drained()
  else {
    const settled = engine.requests.exclusive(() => settleSound(engine))
    ending.add(settled)
    await settled.catch(() => undefined) // the files are closed all the same
  }
  ending.add(engine.host.device.close())
  if (engine.hasDataFile) ending.add(engine.data.device.close())
  if (engine.backing !== undefined) ending.add(engine.backing.close())
  await ending.settle()
}

async function settleSound(engine: Engine): Promise<void> {
  if (engine.damage === undefined && !engine.unchanged) await settle(engine)
}
