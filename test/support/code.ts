import { Qcow2Error } from '../../src/core/errors.ts'

/** How a task ended: the code of a typed error, the name of any other, or `no error`. */
export async function codeOf(task: Promise<unknown>): Promise<string> {
  try {
    await task
  } catch (error) {
    return Qcow2Error.is(error) ? error.code : (error as Error).name
  }
  return 'no error'
}
