/**
 * What a writer owes to bitmaps before it changes guest data: those that track changes are marked as in
 * use, because this library does not keep them up to date. Later readers then do not trust them.
 */
import { bitmapLimits, decodeBitmapDirectory, encodeBitmapDirectory, type BitmapRecord } from './bitmaps-directory.ts'
import type { Engine } from './engine.ts'
import { decodeBitmapsExtension, extensionType, findExtension, type BitmapsExtension } from './extensions.ts'
import { autoclear } from './features.ts'

/** Runs once, before the first change of guest data. */
export async function prepareFirstWrite(engine: Engine): Promise<void> {
  if ((engine.header.autoclearFeatures & autoclear.bitmaps) !== 0n) await markBitmaps(engine, ({ auto }) => auto)
}

/** Runs before the disk changes its size: no bitmap fits it any more. */
export async function prepareResize(engine: Engine): Promise<void> {
  if ((engine.header.autoclearFeatures & autoclear.bitmaps) !== 0n) await markBitmaps(engine, () => true)
}

/**
 * Marks the bitmaps that become stale as in use, in an order in which a crash never leaves one that is trusted and
 * stale: the bitmaps bit is cleared, the directory rewritten in place, the bit set again, each durable.
 * A directory that cannot be understood stays behind a cleared bit.
 */
async function markBitmaps(engine: Engine, stale: (record: BitmapRecord) => boolean): Promise<void> {
  const data = findExtension(engine.content.extensions, extensionType.bitmaps)
  const { autoclearFeatures } = engine.header
  const without = autoclearFeatures & ~autoclear.bitmaps
  if (data === undefined) {
    await engine.writeHeader({ autoclearFeatures: without })
    return
  }
  let marked: Uint8Array | undefined
  const extension = decodeBitmapsExtension(data)
  try {
    marked = await markedDirectory(engine, extension, stale)
  } catch {
    await engine.writeHeader({ autoclearFeatures: without })
    return
  }
  if (marked === undefined) return
  await engine.writeHeader({ autoclearFeatures: without })
  await engine.host.write(extension.directoryOffset, marked)
  await engine.host.flush()
  await engine.writeHeader({ autoclearFeatures })
}

/** The directory with stale bitmaps in use; undefined if they all are. */
async function markedDirectory(
  engine: Engine,
  extension: BitmapsExtension,
  stale: (record: BitmapRecord) => boolean,
): Promise<Uint8Array | undefined> {
  if (extension.directorySize > bitmapLimits.directoryBytes) throw new RangeError('bitmap directory too large')
  const bytes = engine.host.allocate(extension.directorySize)
  await engine.host.readInto(extension.directoryOffset, bytes)
  const records = decodeBitmapDirectory(bytes, extension, engine.geometry.clusterSize)
  if (records.every((record) => record.inUse || !stale(record))) return undefined
  return encodeBitmapDirectory(records.map((record) => ({ ...record, inUse: record.inUse || stale(record) })))
}
