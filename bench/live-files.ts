/** The page cache of measured files. */
import { execFileSync } from 'node:child_process'
import * as fs from 'node:fs'

/** Writes a file back and asks the kernel to forget its pages; where it cannot (no `dd` of GNU), nothing happens. */
export function dropFromCache(file: string): void {
  const descriptor = fs.openSync(file, 'r')
  fs.fsyncSync(descriptor)
  fs.closeSync(descriptor)
  try {
    execFileSync('dd', [`if=${file}`, 'iflag=nocache', 'count=0'], { stdio: 'ignore' })
  } catch {
    // measured warm then; a wrong figure would be worse than none, so scenarios say which tool they need
  }
}
