/** Direct I/O where it can be had. Owns telling a file system that has none from any other failure. */
import { UnsupportedError } from '../core/errors.ts'

/**
 * Opens with `direct` as wanted; where nothing is said, with direct I/O, or without it where the system or the file system
 * refuses it. For what is written once in large requests: memory that the page cache would first have to get is not
 * needed, and a flush at the end has next to nothing left to do.
 */
export async function preferDirect<T>(wanted: boolean | undefined, open: (direct: boolean) => Promise<T>): Promise<T> {
  if (wanted !== undefined) return open(wanted)
  try {
    return await open(true)
  } catch (error) {
    if (!(error instanceof UnsupportedError) || !error.features.includes('O_DIRECT')) throw error
    return open(false)
  }
}
