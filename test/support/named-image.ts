/** An image whose header names other files, made byte by byte: also names that no library would store. */

/** What the header is to hold. */
export interface NamedImage {
  readonly backing?: string | Uint8Array
  readonly format?: string | Uint8Array
  readonly dataFile?: string | Uint8Array
  readonly size?: number
  readonly autoclear?: bigint
  /** Extensions by type. */
  readonly extensions?: readonly (readonly [type: number, data: Uint8Array])[]
}

const cluster = 65536

/** Version 3, clusters of 64 KiB, nothing allocated. */
export function namedImage({ backing, format, dataFile, size = cluster, autoclear = 0n, extensions = [] }: NamedImage): Buffer {
  const image = Buffer.alloc(4 * cluster)
  image.write('QFI\xfb', 0, 'latin1')
  image.writeUInt32BE(3, 4)
  image.writeUInt32BE(16, 20)
  image.writeBigUInt64BE(BigInt(size), 24)
  image.writeUInt32BE(Math.ceil(size / (cluster * (cluster / 8))), 36)
  image.writeBigUInt64BE(BigInt(3 * cluster), 40)
  image.writeBigUInt64BE(BigInt(cluster), 48)
  image.writeUInt32BE(1, 56)
  image.writeBigUInt64BE(dataFile === undefined ? 0n : 4n, 72)
  image.writeBigUInt64BE(autoclear, 88)
  image.writeUInt32BE(4, 96)
  image.writeUInt32BE(112, 100)
  let at = 112
  const add = (type: number, data: Uint8Array | string): void => {
    const bytes = Buffer.from(data as string)
    image.writeUInt32BE(type, at)
    image.writeUInt32BE(bytes.length, at + 4)
    bytes.copy(image, at + 8)
    at += 8 + Math.ceil(bytes.length / 8) * 8
  }
  if (format !== undefined) add(0xe2792aca, format)
  if (dataFile !== undefined) add(0x44415441, dataFile)
  for (const [type, data] of extensions) add(type, data)
  at += 8
  if (backing !== undefined) {
    const bytes = Buffer.from(backing as string)
    image.writeBigUInt64BE(BigInt(at), 8)
    image.writeUInt32BE(bytes.length, 16)
    bytes.copy(image, at)
  }
  image.writeBigUInt64BE(BigInt(2 * cluster), cluster)
  for (let index = 0; index < 4; index++) image.writeUInt16BE(1, 2 * cluster + index * 2)
  return image
}
