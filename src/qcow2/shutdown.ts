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
  const closers: (() => Promise<void>)[] = [() => engine.host.device.close()]
  if (engine.hasDataFile) closers.push(() => engine.data.device.close())
  const { backing } = engine
  if (backing !== undefined) closers.push(() => backing.close())
  let failure: { readonly error: unknown } | undefined
  if (!engine.readOnly) {
    closers.unshift(() => engine.requests.exclusive(async () => {
      if (engine.damage === undefined && !engine.unchanged) await settle(engine)
    }))
  }
  await engine.marked()
  for (const close of closers) {
    try {
      await close()
    } catch (error) {
      failure ??= { error }
    }
  }
  if (failure !== undefined) throw failure.error
}
