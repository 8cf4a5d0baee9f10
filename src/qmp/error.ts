/** Errors of the QEMU Machine Protocol. */
import { Qcow2Error } from '../core/errors.ts'

/** QEMU refused a command, answered out of turn, or went away; code `ERR_QMP`. */
export class QmpError extends Qcow2Error {
  /** The command that failed, where there was one. */
  readonly command?: string
  /** QEMU's error class, for example `GenericError` or `CommandNotFound`. */
  readonly qmpClass?: string
  /** QEMU's own words, meant for people. */
  readonly desc?: string

  constructor(
    message: string,
    details: { command?: string; qmpClass?: string; desc?: string; cause?: unknown } = {},
  ) {
    super('ERR_QMP', message, details.cause === undefined ? undefined : { cause: details.cause })
    if (details.command !== undefined) this.command = details.command
    if (details.qmpClass !== undefined) this.qmpClass = details.qmpClass
    if (details.desc !== undefined) this.desc = details.desc
  }
}
