/** Names that a new image may not have: those that lead back to it. */
import { Qcow2Error } from '../../core/errors.ts'
import { refuseLoop } from '../../qcow2/chain-files.ts'
import { ExitError } from '../errors.ts'
import type { CreateValues } from './create-options.ts'
import { parsePlace } from './spec.ts'

/**
 * Refuses an image at `filename` that would stand on itself, before anything is made.
 * @throws ExitError
 */
export async function refuseLoops(filename: string, values: CreateValues): Promise<void> {
  const place = parsePlace(filename)
  const [file, format, dataFile] = ['backing_file', 'backing_fmt', 'data_file'].map((name) => values.get(name))
  if (place.kind !== 'file') return
  if (file === filename) throw new ExitError(1, 'Error: Trying to create an image with the same filename as the backing file')
  await refuseLoop(place.path, { backing: file === undefined ? undefined : { file, format }, dataFile: dataFile === undefined ? undefined : plain(dataFile) }).catch((error: unknown) => {
    throw Qcow2Error.is(error) ? new ExitError(1, error.message, { cause: error }) : error
  })
}

/** Without QEMU's prefix of plain files. */
function plain(name: string): string {
  return /^file:(?!\/\/)/.test(name) ? name.slice(5) : name
}
