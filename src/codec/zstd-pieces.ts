/**
 * Cuts a zstd stream at its blocks, so that a decoder which empties each piece at once holds the content of one block (128
 * KiB) and not of everything that arrived. Owns the bounds of what frames and blocks may claim; decodes nothing.
 *
 *     magic | frame header | block header (3), block | … | checksum (4)     or     magic, u32 length, bytes to skip
 */

/** Bytes of history a frame may claim: what every decoder has to take. The bundled one moves all of it for each block. */
export const windowLimit: number = 8 << 20
/** Content of one block at most. */
const blockLimit = 128 << 10
const frameMagic = 0xfd2fb528
const skippableMagic = 0x184d2a50

/** Give it the stream as it arrives. */
export class ZstdPieces {
  #expected: 'frame' | 'block' | 'checksum' = 'frame'
  #head = new Uint8Array(0)
  /** Bytes to be passed on as they are. */
  #pass = 0
  #checksum = false

  /** Bytes of the header that comes next, as far as known. */
  #headLength(): number {
    if (this.#expected === 'block') return 3
    const head = this.#head
    if (head.length < 5) return 5
    if (isSkippable(head)) return 8
    const descriptor = head[4]!
    const single = (descriptor & 0x20) !== 0
    return 5 + (single ? 0 : 1) + [0, 1, 2, 4][descriptor & 3]! + [single ? 1 : 0, 2, 4, 8][descriptor >>> 6]!
  }

  /**
   * The pieces of a chunk, in order; each holds the end of one block at most.
   * @throws Error for what is not zstd, or claims more than the limits
   */
  *push(chunk: Uint8Array): Generator<Uint8Array, void, undefined> {
    for (let at = 0; at < chunk.length; ) {
      if (this.#pass > 0) {
        const piece = chunk.subarray(at, at + this.#pass)
        this.#pass -= piece.length
        at += piece.length
        yield piece
        continue
      }
      if (this.#expected === 'checksum') {
        this.#pass = 4
        this.#expected = 'frame'
        continue
      }
      const wanted = this.#headLength() - this.#head.length
      const more = chunk.subarray(at, at + wanted)
      at += more.length
      const head = new Uint8Array(this.#head.length + more.length)
      head.set(this.#head)
      head.set(more, this.#head.length)
      this.#head = head
      if (head.length < this.#headLength()) continue
      this.#take(head)
      this.#head = new Uint8Array(0)
      yield head
    }
  }

  #take(head: Uint8Array): void {
    if (this.#expected === 'block') this.#takeBlock(head)
    else if (isSkippable(head)) this.#pass = new DataView(head.buffer).getUint32(4, true)
    else this.#takeFrame(head)
  }

  #takeFrame(head: Uint8Array): void {
    const magic = new DataView(head.buffer).getUint32(0, true)
    if (magic !== frameMagic) throw new Error(`the frame magic is ${magic.toString(16)}, not ${frameMagic.toString(16)}`)
    const descriptor = head[4]!
    this.#checksum = (descriptor & 4) !== 0
    this.#expected = 'block'
    const window = (descriptor & 0x20) === 0 ? windowOf(head[5]!) : contentOf(head, descriptor)
    if (window > windowLimit) throw new Error(`a frame with a window of ${window} bytes; this Node reads up to ${windowLimit}: decompress the file first (zstd -d --long=31)`)
  }

  #takeBlock(head: Uint8Array): void {
    const header = head[0]! | (head[1]! << 8) | (head[2]! << 16)
    const length = header >>> 3
    if (length > blockLimit) throw new Error(`a block of ${length} bytes, allowed up to ${blockLimit}`)
    this.#pass = ((header >>> 1) & 3) === 1 ? 1 : length
    if ((header & 1) !== 0) this.#expected = this.#checksum ? 'checksum' : 'frame'
  }
}

function isSkippable(head: Uint8Array): boolean {
  return (new DataView(head.buffer).getUint32(0, true) & 0xfffffff0) >>> 0 === skippableMagic
}

function windowOf(descriptor: number): number {
  const base = 2 ** (10 + (descriptor >>> 3))
  return base + (base / 8) * (descriptor & 7)
}

/** Of a single segment, the content is the window. */
function contentOf(head: Uint8Array, descriptor: number): number {
  const view = new DataView(head.buffer)
  const at = 5 + [0, 1, 2, 4][descriptor & 3]!
  switch (descriptor >>> 6) {
    case 0:
      return view.getUint8(at)
    case 1:
      return view.getUint16(at, true) + 256
    case 2:
      return view.getUint32(at, true)
    default:
      return view.getUint32(at + 4, true) * 0x1_0000_0000 + view.getUint32(at, true)
  }
}
