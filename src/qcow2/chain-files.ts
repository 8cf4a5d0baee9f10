/**
 * The files a chain of names leads to, read by their headers alone. Owns following the names that are stored in images as far as
 * they lead to files here, and the refusal of what would make an image stand on itself; opens no disk.
 */
import { isPlainPath, resolveReference } from '../block/file-path.ts'
import { fileKey } from '../block/file-tree.ts'
import { openFile } from '../block/file.ts'
import { FormatError, Qcow2Error } from '../core/errors.ts'
import { maxBackingChain } from './limits.ts'
import { namesOf, type StoredNames } from './names.ts'
import { hostFile, readHeaderCluster } from './open.ts'

/** A backing file that is to be named. */
interface NamedBacking {
  readonly file: string
  readonly format?: string | undefined
}

/** Names that are to be written into an image. */
export interface NewNames {
  readonly backing?: NamedBacking | undefined
  readonly dataFile?: string | undefined
}

/**
 * Refuses names that lead back to the image at `path`, over links, other backing files and data files. A file that is missing,
 * or cannot be read, ends the search: a name may be written before its file is there.
 * @throws FormatError
 */
export async function refuseLoop(path: string, { backing, dataFile }: NewNames): Promise<void> {
  const image = await fileKey(path)
  const way = [path]
  const below = new Set<string>()
  for await (const file of backing === undefined ? [] : filesBelow(path, backing)) {
    below.add(file.key)
    if (file.kind === 'backing file') way.push(file.path)
    if (file.key !== image) continue
    if (file.kind === 'data file') throw new FormatError(`${path} is the data file of ${way.at(-1)!}, which would be below it`, { structure: 'header', field: 'backing_file_name' })
    throw new FormatError(`the backing chain would loop: ${way.join(' -> ')}`, { structure: 'header', field: 'backing_file_name' })
  }
  if (dataFile === undefined || dataFile === '') return
  const key = await fileKey(dataFile)
  if (key === image || below.has(key)) {
    throw new FormatError(`the data file ${dataFile} is the image itself, or a file below it`, { structure: 'header', field: 'data_file_name' })
  }
}

/**
 * Refuses to make a file at `target` if the backing file that the image at `path` is to have reads it: at whatever depth, and by
 * whatever name.
 * @throws Qcow2Error `ERR_BUSY`
 */
export async function assertNotBelow(target: string, path: string, backing: NamedBacking): Promise<void> {
  const key = await fileKey(target)
  for await (const file of filesBelow(path, backing)) {
    if (file.key !== key) continue
    throw new Qcow2Error('ERR_BUSY', `${target}: the backing chain loops: the new image would replace a file that it is to stand on (backing file ${backing.file}); choose another name`)
  }
}

interface Found {
  readonly path: string
  /** As `fileKey` has it: the same whatever path leads to the file. */
  readonly key: string
  readonly kind: 'backing file' | 'data file'
}

/** The files below an image at `from`, whether they exist or not; each backing file, then its data file. */
async function* filesBelow(from: string, { file, format }: NamedBacking): AsyncGenerator<Found, void, undefined> {
  const seen = new Set<string>()
  let next: Pick<StoredNames, 'backingFile' | 'backingFormat'> = { backingFile: file, backingFormat: format }
  for (let above = from; next.backingFile !== undefined && seen.size < maxBackingChain; ) {
    const path = backingPath(above, next.backingFile)
    if (path === undefined) return
    const key = await fileKey(path)
    yield { path, key, kind: 'backing file' }
    const isRead = !seen.has(key) && (next.backingFormat === undefined || next.backingFormat === 'qcow2')
    seen.add(key)
    const names = isRead ? await readNames(path) : undefined
    if (names === undefined) return
    const { dataFile } = names
    // QEMU takes it for a path whatever it looks like
    if (dataFile !== undefined && dataFile !== '') yield { path: dataFile, key: await fileKey(dataFile), kind: 'data file' }
    next = names
    above = path
  }
}

/** The file that the image at `from` names as its backing file, as QEMU follows names; undefined if it is none of this machine. */
function backingPath(from: string, name: string): string | undefined {
  if (isPlainPath(name)) return resolveReference(from, name)
  // what has a protocol depends on the working directory, not on the image
  if (name.startsWith('file:')) return name.slice(5)
  return name.startsWith('json:') ? fileOfJson(name.slice(5)) : undefined
}

/** The file under a description of nodes: the name is in the node itself, or in those below it. */
function fileOfJson(text: string): string | undefined {
  let node: unknown
  try {
    node = JSON.parse(text)
  } catch {
    return undefined
  }
  while (typeof node === 'object' && node !== null) {
    const { filename, file, 'file.filename': nested }: { filename?: unknown; file?: unknown; 'file.filename'?: unknown } = node
    const name = filename ?? nested
    if (typeof name === 'string') return name
    node = file
  }
  return undefined
}

/** The names in the image at `path`, whoever uses it; undefined if there is none that can be read. */
async function readNames(path: string): Promise<StoredNames | undefined> {
  try {
    await using device = await openFile(path, { readOnly: true })
    return namesOf(await readHeaderCluster(hostFile(device)))
  } catch {
    return undefined
  }
}
