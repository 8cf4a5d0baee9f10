/**
 * A structured read: ranges that the device knows to be zeroes travel as holes, the rest as data.
 * Owns the cut; the bytes come from the device in few large requests.
 */
import type { BlockDevice } from '../block/device.ts'
import { chunkDone, encodeDataChunk, encodeHoleChunk } from './protocol.ts'

/** Shorter zeroes are not worth a chunk of their own. */
const smallestHole = 4096

/** More pieces are read as data, so that the reply's length stays in proportion to the request's. */
const maxPieces = 64

interface Piece {
  offset: number
  length: number
  zero: boolean
}

/** What a read asks. `whole`: the client wants all bytes in one chunk. */
export interface ReadRequest {
  readonly cookie: Uint8Array
  readonly offset: number
  readonly length: number
  readonly whole: boolean
  readonly signal: AbortSignal
}

/** The parts of the whole reply, its last chunk marked as done. */
export async function readChunks(device: BlockDevice, request: ReadRequest): Promise<readonly Uint8Array[]> {
  const { cookie, offset, length, whole, signal } = request
  const pieces = whole || length < 2 * smallestHole ? [{ offset, length, zero: false }] : await cut(device, request)
  const parts = await Promise.all(
    pieces.map(async (piece, at) => {
      const flags = at === pieces.length - 1 ? chunkDone : 0
      if (piece.zero) return [encodeHoleChunk(cookie, flags, piece.offset, piece.length)]
      const bytes = await device.read(piece.offset, piece.length, { signal })
      return [encodeDataChunk(cookie, flags, piece.offset, piece.length), bytes]
    }),
  )
  return parts.flat()
}

async function cut(device: BlockDevice, { offset, length, signal }: ReadRequest): Promise<Piece[]> {
  const pieces: Piece[] = []
  const end = offset + length
  let at = offset
  for await (const extent of device.map({ offset, length, signal })) {
    const next = Math.min(extent.start + extent.length, end)
    append(pieces, { offset: at, length: next - at, zero: extent.zero && next - at >= smallestHole })
    at = next
    if (at >= end || pieces.length === maxPieces) break
  }
  if (at < end) append(pieces, { offset: at, length: end - at, zero: false })
  return pieces
}

function append(pieces: Piece[], piece: Piece): void {
  const last = pieces.at(-1)
  if (last?.zero === piece.zero) last.length += piece.length
  else pieces.push(piece)
}
