/** Bringing an image to rest: everything written back, every counter as low as it can be. */
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

/** Settles a writable image, unless it was found damaged or nothing was written, and closes its files. */
export async function closeEngine(engine: Engine): Promise<void> {
  const { backing } = engine
  await engine.marked()
  const settled = engine.readOnly ? undefined : await outcome(engine.requests.exclusive(() => settleSound(engine)))
  const devices = [engine.host.device, ...(engine.hasDataFile ? [engine.data.device] : []), ...(backing === undefined ? [] : [backing])]
  const closed = await Promise.all(devices.map((device) => outcome(device.close())))
  const failure = [settled, ...closed].find((each) => each !== undefined)
  if (failure !== undefined) throw failure.error
}

async function settleSound(engine: Engine): Promise<void> {
  if (engine.damage === undefined && !engine.unchanged) await settle(engine)
}

/** What a promise failed with; undefined if it did not. */
function outcome(ending: Promise<unknown>): Promise<{ readonly error: unknown } | undefined> {
  return ending.then(() => undefined, (error: unknown) => ({ error }))
}
