/** Pages as zlib streams: flag COMPRESS_PAGE, written by QEMU up to 9.0. */
import { inflateZlib } from '../codec/inflate-stream.ts'
import { streamError } from './format.ts'

/**
 * Inflates a compressed page, which must fill `page` exactly.
 * @param offset Stream offset of the zlib stream, for errors.
 * @throws FormatError (`ERR_STREAM`)
 */
export function inflatePage(source: Uint8Array, page: Uint8Array, offset: number): void {
  const problem = inflateZlib(source, page)
  if (problem !== undefined) throw streamError('compressed page', 'zlib stream', problem, offset)
}
