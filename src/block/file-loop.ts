/**
 * Loop devices of Linux: block devices whose bytes are those of a file, so that the file has a second name. Owns finding the one
 * by the other, in /sys. A device that begins somewhere inside its file, as for one of several partitions, is taken for
 * something else: two such devices on one file are usually not the same bytes.
 */
import { existsSync, readFileSync, readdirSync, statSync, type BigIntStats } from 'node:fs'
import { decodeName } from '../bytes/file-name.ts'
import { deviceNumbers } from './file-mount.ts'
import { systemPath } from './file-path.ts'

/** A loop device in use. */
interface Loop {
  readonly path: string
  readonly filePath: string
  readonly file: BigIntStats
}

/** The file that the block device with this number shows from its first byte on; undefined if it shows none, or none that is known. */
export function fileOfLoop(rdev: bigint): BigIntStats | undefined {
  const { major, minor } = deviceNumbers(rdev)
  return fileIn(`/sys/dev/block/${major}:${minor}/loop`)?.file
}

/** All loop devices in use. */
export function loopDevices(): Loop[] {
  let names: string[]
  try {
    names = readdirSync('/sys/block').filter((name) => name.startsWith('loop'))
  } catch {
    return []
  }
  return names.flatMap((name) => {
    const found = fileIn(`/sys/block/${name}/loop`)
    return found === undefined ? [] : [{ path: `/dev/${name}`, ...found }]
  })
}

function fileIn(folder: string): Omit<Loop, 'path'> | undefined {
  // nearly all devices are none, or not in use
  if (!existsSync(folder)) return undefined
  try {
    if (readFileSync(`${folder}/offset`, 'utf8').trim() !== '0') return undefined
    const filePath = decodeName(readFileSync(`${folder}/backing_file`)).replace(/\n$/, '')
    const file = statSync(systemPath(filePath), { bigint: true, throwIfNoEntry: false })
    return file === undefined ? undefined : { filePath, file }
  } catch {
    return undefined
  }
}
