/** What a file system keeps its files in. Owns the numbers that Linux has for them; opens nothing. */
import { statfsSync } from 'node:fs'

/** `f_type` of tmpfs and ramfs: see `statfs(2)` of Linux. */
const inMemory: ReadonlySet<number> = new Set([0x0102_1994, 0x8584_58f6])

/** True for a path on a file system in memory, where no request waits for a disk. False where that cannot be told. */
export function isInMemory(path: string): boolean {
  try {
    return inMemory.has(statfsSync(path).type)
  } catch {
    return false
  }
}
