/**
 * The errors of the whole library. Their `code` is the contract: the ESM and CommonJS builds hold
 * different classes, so recognise errors with {@link Qcow2Error.is}, never with `instanceof`.
 *
 * A caller's own mistake (wrong type, negative length) is a plain `TypeError` or `RangeError`;
 * an aborted call rejects with `signal.reason`.
 */

/** What went wrong, in one word that programs can branch on. */
export type ErrorCode =
  | 'ERR_FORMAT'
  | 'ERR_CORRUPT'
  | 'ERR_UNSUPPORTED'
  | 'ERR_RANGE'
  | 'ERR_ALIGNMENT'
  | 'ERR_READ_ONLY'
  | 'ERR_CLOSED'
  | 'ERR_BUSY'
  | 'ERR_NO_SPACE'
  | 'ERR_NOT_FOUND'
  | 'ERR_EXISTS'
  | 'ERR_IO'
  | 'ERR_STREAM'
  | 'ERR_QMP'

const mark = Symbol.for('qcow2.error')

/** Base of every error this library throws on its own account. */
export class Qcow2Error extends Error {
  /** Stable, for programs; the message is for people and may change. */
  readonly code: ErrorCode

  constructor(code: ErrorCode, message: string, options?: ErrorOptions) {
    super(message, options)
    this.name = new.target.name
    this.code = code
    Object.defineProperty(this, mark, { value: true })
  }

  /** True for an error of this library, of either build; with `code`, only for that code. */
  static is(error: unknown, code?: ErrorCode): error is Qcow2Error {
    return (
      typeof error === 'object' &&
      error !== null &&
      mark in error &&
      (code === undefined || (error as { code?: unknown }).code === code)
    )
  }
}

/** Where in a format an error was found. */
export interface FormatLocation {
  /** The structure by its specification's name, for example `header` or `RAM section`. */
  readonly structure: string
  /** The field within the structure, by its specification's name. */
  readonly field?: string
  /** Byte offset, in the file or stream being read, of the field (or of the structure). */
  readonly offset?: number
}

/**
 * Bytes that break their format. `ERR_FORMAT`: not such a file or stream at all, or a malformed
 * one; `ERR_CORRUPT`: a well-formed image whose metadata contradict each other; `ERR_STREAM`: a
 * malformed or truncated migration stream.
 */
export class FormatError extends Qcow2Error implements FormatLocation {
  readonly structure: string
  readonly field?: string
  readonly offset?: number

  /** The message becomes `structure: detail (offset N)`. */
  constructor(
    detail: string,
    location: FormatLocation,
    code: 'ERR_FORMAT' | 'ERR_CORRUPT' | 'ERR_STREAM' = 'ERR_FORMAT',
    options?: ErrorOptions,
  ) {
    const where = location.offset === undefined ? '' : ` (offset ${location.offset})`
    super(code, `${location.structure}: ${detail}${where}`, options)
    this.structure = location.structure
    if (location.field !== undefined) this.field = location.field
    if (location.offset !== undefined) this.offset = location.offset
  }
}

/** A bit that is set in a qcow2 header's `incompatible_features` and that this library does not know. */
export interface UnknownFeature {
  /** 0 to 63; 0 is the least significant. */
  readonly bit: number
  /** What the image's own feature name table calls it; left out where that does not name it. */
  readonly name?: string
}

/** A valid request or file that needs something this library or this Node does not have. */
export class UnsupportedError extends Qcow2Error {
  /** The features that are missing, by the names their specification gives them. */
  readonly features: readonly string[]
  /** For an image with unknown incompatible features: these, by ascending bit. */
  readonly unknownFeatures?: readonly UnknownFeature[]

  constructor(message: string, features: readonly string[] = [], options: ErrorOptions & { unknownFeatures?: readonly UnknownFeature[] } = {}) {
    const { unknownFeatures, ...cause } = options
    super('ERR_UNSUPPORTED', message, cause)
    this.features = features
    if (unknownFeatures !== undefined) this.unknownFeatures = unknownFeatures
  }
}

/** What a device was asked to do when it failed. */
export type IoOperation =
  | 'open'
  | 'read'
  | 'write'
  | 'write zeroes'
  | 'discard'
  | 'flush'
  | 'resize'
  | 'map'
  | 'close'

/** A device failed; `cause` is the failure as the system reported it. */
export class IoError extends Qcow2Error {
  readonly operation: IoOperation
  /** Byte offset of the failed request, where it has one. */
  readonly offset?: number
  /** Length in bytes of the failed request, where it has one. */
  readonly length?: number

  constructor(
    operation: IoOperation,
    cause: unknown,
    request: { offset?: number; length?: number; code?: 'ERR_IO' | 'ERR_NO_SPACE'; name?: string } = {},
  ) {
    const { offset, length, name } = request
    const where = offset === undefined ? '' : ` of ${length ?? 0} byte${length === 1 ? '' : 's'} at offset ${offset}`
    const what = cause instanceof Error ? withoutCall(cause) : String(cause)
    super(request.code ?? 'ERR_IO', `${name === undefined ? '' : `${name}: `}${operation}${where} failed: ${what}`, {
      cause,
    })
    this.operation = operation
    if (offset !== undefined) this.offset = offset
    if (length !== undefined) this.length = length
  }
}

/** A system error's message without the call and path that Node appends: they are named already. */
function withoutCall(error: Error): string {
  const { syscall } = error as { syscall?: string }
  const end = syscall === undefined ? -1 : error.message.lastIndexOf(`, ${syscall}`)
  return end < 0 ? error.message : error.message.slice(0, end)
}
