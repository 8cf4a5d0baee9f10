/** A file system that gets full. */
import { execFileSync } from 'node:child_process'
import { onTestFinished } from 'vitest'
import { tempFolder } from './temp.ts'

/** An empty file system of so many bytes, gone when the running test ends. Skips the test, loudly, where none may be mounted. */
export function smallDisk(bytes: number, skip: (why: string) => never): string {
  const folder = tempFolder()
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${bytes}`, 'tmpfs', folder], { stdio: 'pipe' })
  } catch (error) {
    console.warn(`\n*** A FULL FILE SYSTEM WAS NOT TESTED: ${(error as Error).message.trim()}. It takes root. ***\n`)
    return skip('needs to mount a file system')
  }
  onTestFinished(() => void execFileSync('umount', [folder]))
  return folder
}
