/** How a command ends early. */

/** Exits with a code after everything was said, for example a comparison that found a difference. */
export class ExitError extends Error {
  readonly exitCode: number

  /** @param message for stderr; empty says nothing */
  constructor(exitCode: number, message: string, options?: ErrorOptions) {
    super(message, options)
    this.exitCode = exitCode
  }
}

/** Output cannot be written. */
export class WriteError extends ExitError {
  /** The system's code, such as `ENOSPC`. */
  readonly code: string | undefined

  constructor(cause: NodeJS.ErrnoException) {
    const { code } = cause
    super(code === 'EPIPE' ? brokenPipe : 1, `write error: ${systemMessage(cause)}`, { cause })
    this.code = code
  }
}

/** A reader that has gone: the shell's own code for it. */
const brokenPipe = 141

/** `ENOSPC: no space left on device, write` as the C library says it: `No space left on device`. */
function systemMessage({ code, message }: NodeJS.ErrnoException): string {
  if (code === 'EIO') return 'Input/output error'
  const text = /^[A-Z0-9]+: (.*), \w+$/.exec(message)?.[1] ?? message
  return text.charAt(0).toUpperCase() + text.slice(1)
}

/** The user's command line makes no sense. */
export class UsageError extends Error {}
