/** What the host says of a file: the space it takes. */
import { stat } from 'node:fs/promises'
import { systemPath } from '../../block/file-path.ts'
import type { Place } from './spec.ts'

/** Bytes that the file behind a place takes on its host; `undefined` where that cannot be known. */
export async function spaceTaken(place: Place): Promise<number | undefined> {
  if (place.kind !== 'file') return undefined
  const stats = await stat(systemPath(place.path))
  // what st_blocks counts, whatever st_blksize says
  return stats.isFile() ? stats.blocks * 512 : 0
}
