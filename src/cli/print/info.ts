/** `info` for people, line for line as qemu-img 10.0 prints it. */
import { formatSize } from '../size.ts'
import type { ImageEntry, Json } from './shapes.ts'
import { snapshotTable } from './snapshots.ts'

/** How a name is shown. */
type Shown = (name: string) => string

/** The lines of one image, with names as `shown`. */
export function infoText(image: ImageEntry, shown: Shown = (name) => name): string {
  return [...imageLines(image, shown), ...childLines(image, shown)].join('\n')
}

function imageLines(image: ImageEntry, shown: Shown): string[] {
  const lines = [
    `image: ${shown(image.filename)}`,
    `file format: ${image.format}`,
    `virtual size: ${both(image['virtual-size'])}`,
    `disk size: ${diskSize(image)}`,
  ]
  if (image.encrypted === true) lines.push('encrypted: yes')
  if (image['cluster-size'] !== undefined) lines.push(`cluster_size: ${image['cluster-size']}`)
  if (image['dirty-flag']) lines.push('cleanly shut down: no')
  if (image['backing-filename'] !== undefined) lines.push(shown(backingLine(image['backing-filename'], image['full-backing-filename'])))
  if (image['backing-filename-format'] !== undefined) lines.push(`backing file format: ${shown(image['backing-filename-format'])}`)
  if (image.snapshots !== undefined && image.snapshots.length > 0) lines.push(...snapshotTable(image.snapshots, shown))
  const specific = image['format-specific']?.data
  if (specific !== undefined && Object.keys(specific).length > 0) lines.push('Format specific information:', ...dictionary(specific, 1, shown))
  return lines
}

function childLines(image: ImageEntry, shown: Shown): string[] {
  return (image.children ?? []).flatMap(({ name, info }) => [
    `Child node '/${name}':`,
    `    filename: ${shown(info.filename)}`,
    `    protocol type: ${info.format}`,
    `    file length: ${both(info['virtual-size'])}`,
    `    disk size: ${diskSize(info)}`,
  ])
}

function backingLine(name: string, resolved: string | undefined): string {
  if (resolved === undefined) return `backing file: ${name} (cannot determine actual path)`
  return `backing file: ${name}${resolved === name ? '' : ` (actual path: ${resolved})`}`
}

function diskSize(image: ImageEntry): string {
  return image['actual-size'] === undefined ? 'unavailable' : formatSize(image['actual-size'])
}

function both(bytes: number): string {
  return `${formatSize(bytes)} (${bytes} bytes)`
}

/** `key: value` with dashes as spaces, nested values four columns further in. */
function dictionary(values: { readonly [key: string]: Json | undefined }, depth: number, shown: Shown): string[] {
  return Object.entries(values).flatMap(([key, value]) => (value === undefined ? [] : entry(key.replaceAll('-', ' '), value, depth, shown)))
}

function entry(key: string, value: Json, depth: number, shown: Shown): string[] {
  const indent = '    '.repeat(depth)
  if (Array.isArray(value)) {
    return [`${indent}${key}:`, ...(value as readonly Json[]).flatMap((item, at) => entry(`[${at}]`, item, depth + 1, shown))]
  }
  if (typeof value === 'object' && value !== null) {
    return [`${indent}${key}:`, ...dictionary(value as { readonly [key: string]: Json | undefined }, depth + 1, shown)]
  }
  return [`${indent}${key}: ${shown(String(value))}`]
}
