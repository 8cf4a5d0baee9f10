/** Why something failed, in the words scripts know. Owns the translation of typed errors; shows nothing. */
import { FormatError, IoError, Qcow2Error, UnsupportedError, type UnknownFeature } from '../../core/errors.ts'
import { redacted } from '../../core/redact.ts'
import { ExitError } from '../errors.ts'

/** The failure to open `name`; with `nameTwice` a file that cannot be opened is named for itself, as `file`, and for its driver. */
export function couldNotOpen(name: string, error: unknown, { nameTwice = false, file = name }: { readonly nameTwice?: boolean | undefined; readonly file?: string } = {}): ExitError {
  const reason = missingOption(error) ?? reasonAbout(name, error)
  const again = nameTwice && (reason === noSuchFile || reason === denied) ? `Could not open '${file}': ` : ''
  return new ExitError(1, redacted(`Could not open '${name}': ${again}${reason}`), { cause: error })
}

/** What must be said besides the name to open an image. */
function missingOption(error: unknown): string | undefined {
  if (!(error instanceof UnsupportedError)) return undefined
  if (error.features.includes('external data file')) return "'data-file' is required for this image"
  return needsKey(error) ? "Parameter 'encrypt.key-secret' is required for cipher" : undefined
}

/** True of an encrypted image that was opened without a passphrase. */
export function needsKey(error: unknown): boolean {
  return error instanceof UnsupportedError && error.features.some((feature) => feature.startsWith('encryption '))
}

/** The failure to make `name`. */
export function couldNotCreate(name: string, error: unknown): ExitError {
  const reason = reasonAbout(name, error)
  return new ExitError(1, Qcow2Error.is(error, 'ERR_BUSY') ? reason : `Could not create '${name}': ${reason}`, { cause: error })
}

function reasonAbout(name: string, error: unknown): string {
  const advice = Qcow2Error.is(error, 'ERR_BUSY') && /another process|running QEMU/.test(error.message) ? `\nIs another process using the image [${name}]?` : ''
  const reason = reasonOf(error)
  const named = `${name}: `
  return `${reason.startsWith(named) ? reason.slice(named.length) : reason}${advice}`
}

const noSuchFile = 'No such file or directory'
const denied = 'Permission denied'

/** Why something failed, as the system would say it. */
export function reasonOf(error: unknown): string {
  const cause = error instanceof Error ? (error.cause as NodeJS.ErrnoException | undefined)?.code : undefined
  if (cause === 'ENOENT') return noSuchFile
  if (cause === 'EACCES' || cause === 'EPERM') return denied
  if (cause === 'EISDIR') return 'Is a directory'
  if (cause === 'EIO') return 'Input/output error'
  if (cause === 'EDQUOT') return 'Disk quota exceeded'
  if (cause === 'ENOSPC' || isFull(error)) return 'No space left on device'
  if (error instanceof FormatError && error.field === 'crypt_method') return 'Missing CRYPTO header for crypt method 2'
  // a size is refused only for what no disk can have
  if (error instanceof FormatError && error.structure === 'header' && error.field === 'size') return 'Image is too big'
  if (error instanceof FormatError && error.structure === 'header' && error.field === 'nb_snapshots') return 'Snapshot table too large'
  if (error instanceof UnsupportedError && error.unknownFeatures !== undefined) return `Unsupported qcow2 feature(s): ${featureList(error.unknownFeatures)}`
  return error instanceof Error ? error.message : String(error)
}

/** Also what only has a fixed size, as a part of a file has. */
function isFull(error: unknown): boolean {
  return error instanceof IoError && error.code === 'ERR_NO_SPACE'
}

/** Incompatible features as QEMU lists them: the names the image has for them, then the other bits as one number. */
function featureList(features: readonly UnknownFeature[]): string {
  const named = features.flatMap(({ name }) => name ?? [])
  const mask = features.reduce((sum, { bit, name }) => (name === undefined ? sum | (1n << BigInt(bit)) : sum), 0n)
  return [...named, ...(mask === 0n ? [] : [`Unknown incompatible feature: ${mask.toString(16)}`])].join(', ')
}
