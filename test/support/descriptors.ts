/** The descriptors of this process, as Linux lists them. */
import { readdirSync, readFileSync, readlinkSync } from 'node:fs'

/** The flags of every descriptor for `path`, as the system has them. */
export function systemFlags(path: string): number[] {
  const descriptors = readdirSync('/proc/self/fd').filter((name) => linkTarget(`/proc/self/fd/${name}`) === path)
  return descriptors.map((name) => Number.parseInt(/flags:\s*(\d+)/.exec(readFileSync(`/proc/self/fdinfo/${name}`, 'utf8'))![1]!, 8))
}

/** What the descriptors of this process that have a path stand for, sorted. */
export function openPaths(): string[] {
  return readdirSync('/proc/self/fd').flatMap((name) => linkTarget(`/proc/self/fd/${name}`)?.replace(/^[^/].*/, '') || []).sort()
}

function linkTarget(link: string): string | undefined {
  try {
    return readlinkSync(link)
  } catch {
    return undefined // the descriptor that listed the folder is closed by now
  }
}

/** What the descriptors of this process are open on. */
export function openDescriptors(): string[] {
  return readdirSync('/proc/self/fd').flatMap((name) => linkTarget(`/proc/self/fd/${name}`) ?? [])
}
