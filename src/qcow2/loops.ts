/**
 * The files a chain of names leads to, read by their headers alone. Owns the refusal of names that would make an image stand
 * on itself, before such a name is written.
 */
import { fileKey } from '../block/file-tree.ts'
import { isPlainPath, resolveReference } from '../block/file-path.ts'
import { openFile } from '../block/file.ts'
import { FormatError } from '../core/errors.ts'
import { maxBackingChain } from './limits.ts'
import { namesOf, type StoredNames } from './names.ts'
import { hostFile, readHeaderCluster } from './open.ts'

/** A file that exists, or would. */
interface NamedFile {
  readonly path: string
  /** As `fileKey` has it: the same whatever path leads to the file. */
  readonly key: string
}

/** Names that are to be written into an image. */
export interface NewNames {
  readonly backing?: { readonly file: string; readonly format?: string | undefined } | undefined
  readonly dataFile?: string | undefined
}

/**
 * Refuses names that lead back to the image at `path`, over links, other backing files and data files. A file that is missing,
 * or cannot be read, ends the search: a name may be written before its file is there.
 * @throws FormatError
 */
export async function refuseLoop(path: string, { backing, dataFile }: NewNames): Promise<void> {
  const image = { path, key: await fileKey(path) }
  const way = [path]
  const below = new Set<string>()
  for await (const { file, kind } of backing === undefined ? [] : filesBelow(path, backing.file, backing.format)) {
    below.add(file.key)
    if (kind === 'backing file') way.push(file.path)
    if (file.key !== image.key) continue
    if (kind === 'data file') throw new FormatError(`${path} is the data file of ${way.at(-1)!}, which would be below it`, { structure: 'header', field: 'backing_file_name' })
    throw new FormatError(`the backing chain would loop: ${way.join(' -> ')}`, { structure: 'header', field: 'backing_file_name' })
  }
  if (dataFile === undefined || dataFile === '') return
  const key = await fileKey(dataFile)
  if (key === image.key || below.has(key)) {
    throw new FormatError(`the data file ${dataFile} is the image itself, or a file below it`, { structure: 'header', field: 'data_file_name' })
  }
}

interface Found {
  readonly file: NamedFile
  readonly kind: 'backing file' | 'data file'
}

/** The files below an image at `from` that names `name`; each backing file, then its data file. */
async function* filesBelow(from: string, name: string, format: string | undefined): AsyncGenerator<Found, void, undefined> {
  const seen = new Set<string>()
  let next: Pick<StoredNames, 'backingFile' | 'backingFormat'> = { backingFile: name, backingFormat: format }
  for (let above = from; next.backingFile !== undefined && isPlainPath(next.backingFile) && seen.size < maxBackingChain; ) {
    const path = resolveReference(above, next.backingFile)
    const key = await fileKey(path)
    yield { file: { path, key }, kind: 'backing file' }
    const isRead = !seen.has(key) && (next.backingFormat === undefined || next.backingFormat === 'qcow2')
    seen.add(key)
    const names = isRead ? await readNames(path) : undefined
    if (names === undefined) return
    const { dataFile } = names
    if (dataFile !== undefined && dataFile !== '') yield { file: { path: dataFile, key: await fileKey(dataFile) }, kind: 'data file' }
    next = names
    above = path
  }
}

/** The names in the image at `path`; undefined if there is none that can be read. */
export async function readNames(path: string): Promise<StoredNames | undefined> {
  try {
    await using device = await openFile(path, { readOnly: true })
    return namesOf(await readHeaderCluster(hostFile(device)))
  } catch {
    return undefined
  }
}
