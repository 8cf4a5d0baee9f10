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

/** The user's command line makes no sense. */
export class UsageError extends Error {}
