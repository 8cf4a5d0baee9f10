/** Save images as libvirt lays them out, around a stream. */

/** libvirt's header before a stream; all integers little-endian unless told otherwise. */
export function libvirtImage(stream: Uint8Array, format: number, options: { magic?: string; little?: boolean; version?: number } = {}): Uint8Array {
  const data = Buffer.concat([Buffer.from('<domain/>\0<cookie/>\0'), Buffer.alloc(64)])
  const header = new Uint8Array(92)
  header.set(Buffer.from(options.magic ?? 'LibvirtQemudSave'))
  const view = new DataView(header.buffer)
  ;[options.version ?? 2, data.length, 1, format, 10].forEach((word, i) => view.setUint32(16 + 4 * i, word, options.little ?? true))
  return Buffer.concat([header, data, stream])
}

/** A zstd frame of raw blocks: valid without a compressor. */
export function zstdFrame(bytes: Uint8Array): Uint8Array {
  const pieces: Uint8Array[] = [Uint8Array.of(0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58)]
  for (let at = 0; at < bytes.length; at += 65_536) {
    const block = bytes.subarray(at, at + 65_536)
    const header = (block.length << 3) | (at + 65_536 >= bytes.length ? 1 : 0)
    pieces.push(Uint8Array.of(header & 0xff, (header >> 8) & 0xff, header >> 16), block)
  }
  return Buffer.concat(pieces)
}
