/**
 * What is beside a saved memory, by name. One manifest and one fault order belong to one saved VM: of an image with several
 * snapshots, each has its own.
 *
 * ```
 *  warm.qcow2        a RAM image or a stream      warm.qcow2.json         warm.qcow2.faults.json
 *  state.qcow2@one   a snapshot in an image       state.qcow2@one.json    state.qcow2@one.faults.json
 * ```
 */

/** Characters of a snapshot's name that stay as they are in a file name; others become `%` and the bytes in hex. */
const plain = /[^A-Za-z0-9_-]/gu

/** Longest part of a file name that stands for a snapshot, in bytes: file systems take 255 for all of it. */
const longest = 120

/** Path of the manifest beside a saved memory: `warm.qcow2.json`, of a snapshot `state.qcow2@one.json`. */
export function manifestPath(memory: string, snapshot?: string): string {
  return `${memory}${suffix(snapshot)}.json`
}

/** Path of the fault order beside a saved memory: `warm.qcow2.faults.json`, of a snapshot `state.qcow2@one.faults.json`. */
export function faultOrderPath(memory: string, snapshot?: string): string {
  return `${memory}${suffix(snapshot)}.faults.json`
}

function suffix(snapshot: string | undefined): string {
  if (snapshot === undefined) return ''
  const bytes = (text: string): string => Array.from(new TextEncoder().encode(text), (byte) => `%${byte.toString(16).padStart(2, '0')}`).join('')
  const name = snapshot.replace(plain, bytes)
  return `@${name.length <= longest ? name : `${name.slice(0, longest)}%${checksum(name)}`}`
}

/** FNV-1a of the characters, 32 bits: distinguishes long names with the same beginning. */
function checksum(text: string): string {
  let hash = 0x811c9dc5
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193)
  return (hash >>> 0).toString(16).padStart(8, '0')
}
