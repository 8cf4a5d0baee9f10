/**
 * Which file a path or a descriptor means. Owns that a file is known by device and inode, and a block device by its
 * number, never by a name: links, hard links and `/proc/self/fd` lead to the same identity. A loop device is its file.
 */
import { stat as lookUp, type BigIntStats } from 'node:fs'
import { fileOfLoop } from './file-loop.ts'
import { systemPath } from './file-path.ts'

/** Identifies a file, whatever path leads to it. */
export function fileIdentity(stat: BigIntStats): string {
  if (!stat.isBlockDevice()) return `${stat.dev}:${stat.ino}`
  const file = fileOfLoop(stat.rdev)
  return file === undefined ? `device:${stat.rdev}` : fileIdentity(file)
}

/** What is known of the file at `path`; undefined if there is none. Other failures reject. */
export function statAt(path: string): Promise<BigIntStats | undefined> {
  return new Promise((found, fail) => {
    lookUp(systemPath(path), { bigint: true }, (error, stat) => {
      if (error === null) found(stat)
      else if (error.code === 'ENOENT' || error.code === 'ENOTDIR') found(undefined)
      else fail(error)
    })
  })
}

/** The identity of the file at `path`; undefined if there is none, or none that can be looked at. */
export async function identityAt(path: string): Promise<string | undefined> {
  const stat = await statAt(path).catch(() => undefined)
  return stat === undefined ? undefined : fileIdentity(stat)
}
