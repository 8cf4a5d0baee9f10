/** The names that an image stores, as text. Owns what is no name. */
import { decodeName } from '../bytes/file-name.ts'
import { extensionType, findExtension } from './extensions.ts'
import type { HeaderCluster } from './header.ts'

/** Names of other files, and of a format. */
export interface StoredNames {
  readonly backingFile: string | undefined
  readonly backingFormat: string | undefined
  /** May be empty: there is a data file, and its name is not told. */
  readonly dataFile: string | undefined
}

/** The names in an image. They are C strings; an empty one of a backing file or its format is none. */
export function namesOf({ backingFile, extensions }: HeaderCluster): StoredNames {
  const text = (type: number): string | undefined => {
    const data = findExtension(extensions, type)
    return data === undefined ? undefined : decodeName(data)
  }
  const named = (name: string | undefined): string | undefined => (name === '' ? undefined : name)
  return {
    backingFile: backingFile === undefined ? undefined : named(decodeName(backingFile)),
    backingFormat: named(text(extensionType.backingFormat)),
    dataFile: text(extensionType.dataFile),
  }
}
