/** Names that depend on others: a backing file's on the image above it, a snapshot's on which files there are. */
import { existsSync } from 'node:fs'
import { isAbsolute } from 'node:path'
import { systemPath } from '../../block/file-path.ts'
import { parsePlace, protocolOf, type Place } from './spec.ts'

/**
 * A backing file's name, as the image at `place` means it: QEMU puts the image's folder before it,
 * letter by letter.
 */
export function resolveBacking(place: Place, name: string): string {
  if (place.kind === 'blkdebug') return resolveBacking(place.inner, name)
  if (isAbsolute(name) || /^[A-Za-z]:[\\/]/.test(name) || protocolOf(name) !== undefined || place.kind !== 'file') return name
  const folder = /^.*[/\\]/s.exec(onWindows ? place.path : place.path.replaceAll('\\', '_'))?.[0].length ?? 0
  return place.path.slice(0, folder) + name
}

const onWindows = process.platform === 'win32'

/** A name cut at an `@`. */
export interface SnapshotName {
  readonly file: string
  readonly snapshot: string
}

/** `FILE@SNAPSHOT`, where there is no file of the whole name but one of the first part. Addresses are not cut here. */
export function splitSnapshot(name: string): SnapshotName | undefined {
  const whole = localPath(name)
  if (whole === undefined || existsSync(systemPath(whole))) return undefined
  return cuts(name).find(({ file }) => {
    const path = localPath(file)
    return path !== undefined && existsSync(systemPath(path))
  })
}

/**
 * `ADDRESS@SNAPSHOT`: what to look for where nothing is found at the address as a whole. An `@` before the host, in a
 * folder or in a query belongs to the address.
 */
export function splitAddress(name: string): SnapshotName | undefined {
  const form = /^https?:/.test(name) ? webFile : /^nbd[:+]/.test(name) ? nbdExport : undefined
  return form === undefined ? undefined : cuts(name).find(({ file, snapshot }) => form.test(file) && !/[/?#]/.test(snapshot))
}

const webFile = /^https?:\/\/[^/?#]+\/(?:[^?#]*\/)?[^/?#]+$/
const nbdExport = /^nbd(?:\+\w+)?:\/\/[^/?#]*[/?]|^nbd:[^/]*:/

/** The parts before and after each `@`, the last first. */
function cuts(name: string): SnapshotName[] {
  const found: SnapshotName[] = []
  for (let at = name.lastIndexOf('@'); at > 0; at = name.lastIndexOf('@', at - 1)) found.push({ file: name.slice(0, at), snapshot: name.slice(at + 1) })
  return found
}

/** The path of a name that is one in the end. */
function localPath(name: string): string | undefined {
  if (name.startsWith('json:')) return undefined
  try {
    return pathIn(parsePlace(name))
  } catch {
    return undefined // no name at all: whoever opens it says why
  }
}

function pathIn(place: Place): string | undefined {
  if (place.kind === 'blkdebug') return pathIn(place.inner)
  return place.kind === 'file' ? place.path : undefined
}
