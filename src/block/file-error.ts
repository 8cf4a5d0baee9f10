/** System errors of the file driver as errors of this library. */
import { IoError, Qcow2Error, UnsupportedError, type IoOperation } from '../core/errors.ts'

/** A failed call on an open file. */
export function fileError(
  operation: IoOperation,
  cause: unknown,
  request: { offset?: number | undefined; length?: number | undefined; name?: string | undefined } = {},
): IoError {
  const full = systemCode(cause) === 'ENOSPC' || systemCode(cause) === 'EDQUOT'
  const { offset, length, name } = request
  return new IoError(operation, cause, {
    code: full ? 'ERR_NO_SPACE' : 'ERR_IO',
    ...(offset === undefined ? {} : { offset }),
    ...(length === undefined ? {} : { length }),
    ...(name === undefined ? {} : { name }),
  })
}

/** A failed `open`. */
export function openError(cause: Error, path: string, direct: boolean): Qcow2Error {
  switch (systemCode(cause)) {
    case 'ENOENT':
      return new Qcow2Error('ERR_NOT_FOUND', `${path}: no such file`, { cause })
    case 'EEXIST':
      return new Qcow2Error('ERR_EXISTS', `${path}: exists already`, { cause })
    case 'EINVAL':
      if (direct) return directRefused(path, cause)
  }
  return fileError('open', cause, { name: path })
}

/** The filesystem takes no direct I/O, when the file is opened or at the first request. */
export function directRefused(path: string, cause: unknown): UnsupportedError {
  const message = `${path}: the filesystem refuses direct I/O (O_DIRECT); open with direct: false`
  return new UnsupportedError(message, ['O_DIRECT'], { cause })
}

/** The `code` of a system error, such as `ENOSPC`. */
export function systemCode(error: unknown): string | undefined {
  return (error as { code?: string } | null)?.code
}
