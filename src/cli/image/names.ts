/** Names that depend on others: a backing file's on the image above it, a snapshot's on which files there are. */
import { existsSync } from 'node:fs'
import { dirname, isAbsolute } from 'node:path'
import type { Place } from './spec.ts'

/**
 * A backing file's name, as the image at `place` means it: QEMU puts the image's folder before it,
 * letter by letter.
 */
export function resolveBacking(place: Place, name: string): string {
  if (place.kind === 'blkdebug') return resolveBacking(place.inner, name)
  if (isAbsolute(name) || parsePlaceKind(name) !== 'path' || place.kind !== 'file') return name
  const folder = dirname(place.path)
  const above = place.path.includes('/') ? `${folder === '/' ? '' : folder}/` : ''
  return above + name
}

function parsePlaceKind(name: string): 'path' | 'protocol' {
  const colon = name.indexOf(':')
  const slash = name.indexOf('/')
  return colon > 0 && (slash < 0 || colon < slash) ? 'protocol' : 'path'
}

/** `FILE@SNAPSHOT`, where there is no file of the whole name but one of the first part. */
export function splitSnapshot(name: string): { file: string; snapshot: string } | undefined {
  if (name.startsWith('json:') || existsSync(name)) return undefined
  for (let at = name.lastIndexOf('@'); at > 0; at = name.lastIndexOf('@', at - 1)) {
    const file = name.slice(0, at)
    if (existsSync(file) || parsePlaceKind(file) === 'protocol') return { file, snapshot: name.slice(at + 1) }
  }
  return undefined
}
