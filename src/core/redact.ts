/** Addresses without what they should not tell: user names, passwords, the values of a query (tokens, signatures). */

/**
 * The text with the credentials of every web address in it, and the values of its query, replaced by `***`. For messages,
 * which end in logs; works on text that is no address, or holds several.
 */
export function redacted(text: string): string {
  return text.replace(/\bhttps?:\/\/[^\s"'<>]+/gi, (address) => {
    const [, scheme, authority, path, query, fragment] = /^(https?:\/\/)([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?$/is.exec(address)!
    const at = authority!.lastIndexOf('@')
    const host = at < 0 ? authority! : `***${authority!.slice(at)}`
    const values = (query ?? '').replace(/([?&][^=&]*)=[^&]*/g, '$1=***').replace(/([?&])[^=&]+(?=&|$)/g, '$1***')
    return `${scheme!}${host}${path!}${values}${fragment === undefined ? '' : '#***'}`
  })
}
