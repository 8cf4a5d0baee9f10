/**
 * What an image from a stranger is and which other files it names, found out without opening any of them. Owns the words for why
 * a name is dangerous; what may be opened is the rule of `references.ts`.
 */
import type { CallOptions } from '../block/device.ts'
import { isAbsolutePath, isPlainPath, outsideTree, resolveReference } from '../block/file-path.ts'
import { lexicalPath } from '../block/file-tree.ts'
import { pathOf, withSource, type Source } from '../block/source.ts'
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { readImageInfo, type ImageInfo } from './info.ts'
import { probeFormat } from './probe.ts'

/** A file that an image names. */
export interface NamedFile {
  readonly kind: 'backing file' | 'data file'
  /** As stored; bytes that are no UTF-8 are lone surrogates, U+DC80 to U+DCFF. */
  readonly name: string
  /** Of a backing file, as stored. */
  readonly format: string | undefined
  /** What it does to whoever opens the image and follows the name; never empty. */
  readonly dangers: readonly string[]
}

/** What {@link inspectImage} finds. */
export interface Inspection {
  /** By the first bytes: `qcow2`, `luks`, `raw` (nothing that is recognised), or the name that QEMU has for a format which is not read here. */
  readonly format: string
  /** Bytes of the file. */
  readonly fileSize: number
  /** The facts of a qcow2 image; undefined for other formats, and where they cannot be read. */
  readonly info: ImageInfo | undefined
  /** Why the facts cannot be read. */
  readonly problem: string | undefined
  /** Files that the image names. */
  readonly names: readonly NamedFile[]
  /** What else whoever takes the image should know. */
  readonly notes: readonly string[]
}

/**
 * Looks at an image that is not trusted: format, sizes, the files it names and why each is dangerous. Opens the image, reads its
 * header and tables within the limits of the format, and opens nothing else; a damaged image is an answer, not an error. A device
 * given stays open. Paths are judged as they are written: symbolic links are not looked at.
 * @throws what `openSource` throws
 */
export function inspectImage(source: Source, { signal }: CallOptions = {}): Promise<Inspection> {
  return withSource(source, { readOnly: true, forceShare: true, signal }, async (device): Promise<Inspection> => {
    const format = await formatOf(device)
    const found = { format, fileSize: device.size, info: undefined, problem: undefined, names: [], notes: [] }
    if (format !== 'qcow2') return found
    try {
      const info = await readImageInfo(device, { signal })
      return { ...found, info, names: namesIn(info, pathOf(source)), notes: notesOf(info) }
    } catch (error) {
      if (!Qcow2Error.is(error)) throw error
      return { ...found, problem: error.message }
    }
  })
}

async function formatOf(device: Parameters<typeof probeFormat>[0]): Promise<string> {
  try {
    return await probeFormat(device)
  } catch (error) {
    if (error instanceof UnsupportedError && error.features.length === 1) return error.features[0]!
    throw error
  }
}

function namesIn({ backingFile, backingFormat, externalData, dataFile }: ImageInfo, path: string | undefined): NamedFile[] {
  const names: NamedFile[] = []
  if (backingFile !== undefined) names.push({ kind: 'backing file', name: backingFile, format: backingFormat, dangers: backingDangers(backingFile, backingFormat, path) })
  if (externalData || dataFile !== undefined) {
    const dangers = ['guest data is read from this file, and written to it by whoever opens the image for writing', ...placeDangers(dataFile ?? '', dataFile ?? '', path)]
    names.push({ kind: 'data file', name: dataFile ?? '', format: undefined, dangers: externalData ? dangers : ['the name is not used: the image says that it has no data file'] })
  }
  return names
}

function backingDangers(name: string, format: string | undefined, path: string | undefined): string[] {
  const dangers = ['its content is read as if it were the disk']
  if (format === undefined) dangers.push('its format is not recorded: a program that guesses lets whoever writes a raw disk choose further files')
  else if (format !== 'raw' && format !== 'qcow2') dangers.push(`its format is ${JSON.stringify(format)}, which is not read here`)
  else if (format === 'qcow2') dangers.push('it may name further files itself')
  if (!isPlainPath(name)) return [...dangers, `it is not a path: a program that follows it opens what the part before the colon says (${JSON.stringify(name.slice(0, name.indexOf(':')))})`]
  return [...dangers, ...placeDangers(name, resolveReference(path ?? '', name), path)]
}

function placeDangers(name: string, target: string, path: string | undefined): string[] {
  const dangers: string[] = []
  if (/[\u0000-\u001f\u007f-\u009f]/.test(name)) dangers.push('the name has control characters, which a terminal obeys')
  if (name === '') return [...dangers, 'the name is not told']
  if (/^\/(dev|proc|sys)\//.test(name)) dangers.push('it is a device of the host, or a file of its system')
  if (path === undefined) return isAbsolutePath(name) ? [...dangers, 'it is an absolute path'] : dangers
  const [image, file] = [lexicalPath(path), lexicalPath(target)]
  if (image === file) return [...dangers, 'it is the image itself']
  const why = outsideTree(lexicalPath(resolveReference(path, '.')), file)
  return why === undefined ? dangers : [...dangers, words[why]]
}

const words = {
  outside: 'it is outside the directory of the image',
  hidden: 'it is hidden: a part of its path begins with a dot',
  root: 'the directory of the image is the root of the file system',
} as const

function notesOf(info: ImageInfo): string[] {
  const notes: string[] = []
  if (info.encryption !== 'none') notes.push(`it is encrypted (${info.encryption}): what the disk holds cannot be looked at without its key`)
  if (info.corrupt) notes.push('it is marked corrupt: it opens for reading only')
  if (info.dirty) notes.push('its refcounts are not up to date: opening it for writing repairs them first')
  if (info.snapshots.some(({ vmStateSize }) => vmStateSize > 0)) notes.push('it holds the state of a virtual machine: loading that is running what is in it')
  return notes
}
