/**
 * The files that this process uses. One list for the whole process: the ESM and the CommonJS build, loaded together, share it.
 */

/** What this process does with files, by their identity. */
export interface ProcessFiles {
  /** How many devices are open on a file, read-only ones too. */
  readonly open: Map<string, number>
  /** Files that an open image writes to. */
  readonly written: Set<string>
  /** Names, by folder, under which a new file is being written. */
  readonly places: Set<string>
  /** What other processes of this library are kept from writing; see `file-claim.ts`. */
  readonly claims: Map<string, { holders: number; readonly bound: Promise<(() => void) | undefined> }>
}

const key = Symbol.for('qcow2.files')

/** The list of this process. */
export const processFiles: ProcessFiles = ((globalThis as { [key]?: ProcessFiles | undefined })[key] ??= {
  open: new Map(),
  written: new Set(),
  places: new Set(),
  claims: new Map(),
})

/** Notes that a device is open on a file until the function returned is called. */
export function noteOpen(identity: string): () => void {
  const { open } = processFiles
  open.set(identity, (open.get(identity) ?? 0) + 1)
  return () => {
    const left = open.get(identity)! - 1
    if (left === 0) open.delete(identity)
    else open.set(identity, left)
  }
}
