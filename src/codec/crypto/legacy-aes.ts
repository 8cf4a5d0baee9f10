/** crypt_method 1: the key is the password itself. The format has no way to recognise a wrong one. */
import { aesSectorCipher, type SectorCipher } from './sector-cipher.ts'

/**
 * AES-128-CBC keyed with the first 16 bytes of the password, zero padded; the IV is the number of
 * the **guest** sector. A wrong password gives garbage, not an error.
 */
export function legacyAesCipher(password: string | Uint8Array): SectorCipher {
  const bytes = typeof password === 'string' ? new TextEncoder().encode(password) : password
  const key = new Uint8Array(16)
  key.set(bytes.subarray(0, 16))
  return aesSectorCipher('cbc-plain64', key)
}
