/**
 * File names as text and back. A name is bytes: those that are no UTF-8 become lone surrogates (U+DC80 to U+DCFF, one for
 * each byte), so that every name has exactly one text and every such text one name.
 */

const strict = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })
const escaped = /[\u{DC80}-\u{DCFF}]/u

/** The text of a name that is stored as a C string: a NUL ends it. */
export function decodeName(bytes: Uint8Array): string {
  const end = bytes.indexOf(0)
  const name = end < 0 ? bytes : bytes.subarray(0, end)
  return decodeValid(name) ?? decodeEach(name)
}

/** The bytes of a name. */
export function encodeName(name: string): Uint8Array {
  const text = new TextEncoder()
  if (!escaped.test(name)) return text.encode(name)
  const bytes = Array.from(name).flatMap((character) => {
    const code = character.codePointAt(0)!
    return code >= 0xdc80 && code <= 0xdcff ? [code - 0xdc00] : [...text.encode(character)]
  })
  return Uint8Array.from(bytes)
}

/** True for a name with bytes that are no UTF-8. */
export function hasEscapedBytes(name: string): boolean {
  return escaped.test(name)
}

function decodeValid(bytes: Uint8Array): string | undefined {
  try {
    return strict.decode(bytes)
  } catch {
    return undefined
  }
}

function decodeEach(bytes: Uint8Array): string {
  let name = ''
  for (let at = 0; at < bytes.length; ) {
    const lead = bytes[at]!
    const length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4
    const character = decodeValid(bytes.subarray(at, at + length))
    name += character ?? String.fromCharCode(0xdc00 + lead)
    at += character === undefined ? 1 : length
  }
  return name
}
