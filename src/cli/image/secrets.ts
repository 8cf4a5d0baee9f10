/** `--object secret,id=ID,data=TEXT` and `file=PATH`: passphrases for encrypted images. */
import { readFileSync } from 'node:fs'
import { ExitError, UsageError } from '../errors.ts'
import { keyValues } from './key-values.ts'

/** The secrets of a command line, by id. */
export type Secrets = ReadonlyMap<string, Uint8Array>

/**
 * Reads the objects a command line defines.
 * @throws UsageError for an object other than a plain secret
 */
export function parseSecrets(objects: readonly string[]): Secrets {
  const secrets = new Map<string, Uint8Array>()
  for (const text of objects) {
    const options = new Map(keyValues(text, 'qom-type'))
    const type = options.get('qom-type')
    if (type !== 'secret') throw new UsageError(`invalid object type: ${type ?? text}; only 'secret' is known`)
    const id = options.get('id')
    if (id === undefined) throw new UsageError("Parameter 'id' is missing")
    secrets.set(id, secretBytes(options))
  }
  return secrets
}

/** @throws ExitError for a secret that no object defines */
export function secretOf(secrets: Secrets | undefined, id: string): Uint8Array {
  const secret = secrets?.get(id)
  if (secret === undefined) throw new ExitError(1, `No secret with id '${id}'`)
  return secret
}

function secretBytes(options: ReadonlyMap<string, string>): Uint8Array {
  if (options.has('keyid')) throw new UsageError('secrets that are encrypted themselves (keyid) are not supported')
  const data = options.get('data')
  const file = options.get('file')
  if ((data === undefined) === (file === undefined)) throw new UsageError("a secret needs one of 'data' and 'file'")
  const bytes = data === undefined ? readFileSync(file!) : Buffer.from(data)
  return options.get('format') === 'base64' ? Buffer.from(bytes.toString(), 'base64') : bytes
}
