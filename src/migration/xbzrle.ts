/**
 * XBZRLE, the delta form of a page: alternating lengths of unchanged and changed bytes, the changed
 * bytes themselves being the new content. What follows the last run is unchanged.
 *
 * ```
 * { unchanged (1 or 2 bytes, ULEB128), changed (1 or 2 bytes, ULEB128), changed bytes } …
 * ```
 */
import { streamError } from './format.ts'

const structure = 'XBZRLE delta'

/**
 * Applies a delta to the page it was made against.
 * @param offset Stream offset of the delta, for errors.
 * @throws FormatError (`ERR_STREAM`) if it does not fit the page; the page may be changed in part.
 */
export function applyXbzrle(delta: Uint8Array, page: Uint8Array, offset = 0): void {
  let at = 0
  let position = 0
  const run = (): number => {
    const first = delta[at++]
    if (first === undefined) throw streamError(structure, 'run', 'the delta ends within a run', offset + at - 1)
    if ((first & 0x80) === 0) return first
    const second = delta[at++]
    if (second === undefined || (second & 0x80) !== 0) throw streamError(structure, 'run', 'a run length has more than 14 bits', offset + at - 1)
    return (first & 0x7f) | (second << 7)
  }
  while (at < delta.length) {
    const begin = at
    const unchanged = run()
    if (unchanged === 0 && begin > 0) throw streamError(structure, 'run', 'an empty unchanged run', offset + begin)
    position += unchanged
    const changed = run()
    if (changed === 0) throw streamError(structure, 'run', 'an empty changed run', offset + begin)
    if (at + changed > delta.length) throw streamError(structure, 'run', `a run of ${changed} bytes reaches past the delta`, offset + begin)
    if (position + changed > page.length) throw streamError(structure, 'run', `a run ends at byte ${position + changed} of a page of ${page.length}`, offset + begin)
    page.set(delta.subarray(at, at + changed), position)
    at += changed
    position += changed
  }
}
