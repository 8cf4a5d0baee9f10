/** `-l`: which snapshot of a source is meant, as `NAME`, `ID`, `snapshot.id=ID` or `snapshot.name=NAME`. */
import { ExitError } from '../errors.ts'
import { keyValues } from './key-values.ts'
import type { OpenedImage } from './opened.ts'

/** A snapshot by id, by name, or by either. */
export interface SnapshotParameter {
  readonly id?: string | undefined
  readonly name?: string | undefined
  readonly either?: string | undefined
}

/** What `-l` says; `undefined` without it. */
export function snapshotParameter(text: string | undefined): SnapshotParameter | undefined {
  if (text === undefined) return undefined
  if (!text.startsWith('snapshot.')) return { either: text }
  const options = new Map(keyValues(text))
  return { id: options.get('snapshot.id'), name: options.get('snapshot.name') }
}

/**
 * The image at the snapshot; it is closed with it, also if there is no such snapshot.
 * @throws ExitError in qemu-img's words
 */
export async function openSnapshot(opened: OpenedImage, which: SnapshotParameter | undefined): Promise<OpenedImage> {
  if (which === undefined) return opened
  try {
    const snapshots = [...(opened.image?.snapshots ?? [])]
    const { id, name, either } = which
    const found =
      either === undefined
        ? snapshots.find((each) => (id === undefined || each.id === id) && (name === undefined || each.name === name))
        : (snapshots.find((each) => each.id === either) ?? snapshots.find((each) => each.name === either))
    if (found === undefined || opened.image === undefined) throw new ExitError(1, "Failed to load snapshot: Can't find snapshot")
    const snapshot = await opened.image.snapshots.open(found.id)
    const close = async (): Promise<void> => {
      await snapshot.close()
      await opened.close()
    }
    return { ...opened, device: snapshot, snapshot, close }
  } catch (error) {
    await opened.close()
    throw error
  }
}
