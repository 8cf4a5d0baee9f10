/** A block device over a file. */
import { execFileSync } from 'node:child_process'
import { truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { onTestFinished } from 'vitest'
import { tempFolder } from './temp.ts'

/** A loop device. */
export interface LoopDevice {
  readonly path: string
  /** The file whose bytes it shows. */
  readonly file: string
  /** Makes the device larger while it is in use. */
  readonly grow: (size: number) => void
  /** Ends it before the test ends. */
  readonly detach: () => void
}

/** A device of so many bytes, gone when the running test ends. Skips the test, loudly, where none may be made. */
export function loopDevice(size: number, skip: (why: string) => never): LoopDevice {
  const file = join(tempFolder(), 'loop')
  writeFileSync(file, '')
  truncateSync(file, size)
  return loopOver(file, [], skip)
}

/** A device over a file that is there. */
export function loopOver(file: string, options: readonly string[], skip: (why: string) => never): LoopDevice {
  let path: string
  try {
    path = execFileSync('losetup', ['--find', '--show', ...options, file], { encoding: 'utf8', stdio: 'pipe' }).trim()
  } catch (error) {
    console.warn(`\n*** A BLOCK DEVICE WAS NOT TESTED: ${(error as Error).message.trim()}. It takes root and losetup. ***\n`)
    return skip('needs a loop device')
  }
  let attached = true
  const detach = (): void => {
    if (attached) execFileSync('losetup', ['--detach', path])
    attached = false
  }
  onTestFinished(detach)
  return {
    path,
    file,
    detach,
    grow: (larger) => {
      truncateSync(file, larger)
      execFileSync('losetup', ['--set-capacity', path])
    },
  }
}
