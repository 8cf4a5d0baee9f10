/** What the first bytes of an image file tell without opening its format. */
import type { BlockDevice } from '../../block/device.ts'
import { luksDiskSize, readLuksHeader } from '../../luks/luks-image.ts'
import { readImageInfo } from '../../qcow2/info.ts'
import { probeFormat } from '../../qcow2/probe.ts'
import type { ImageFormat } from './formats.ts'

/**
 * By the magic numbers; else `raw`.
 * @throws UnsupportedError for a format that is recognised and not read
 */
export function probe(host: BlockDevice): Promise<ImageFormat> {
  return probeFormat(host)
}

/** Bytes of the disk in an encrypted image, without its key; undefined if it is not encrypted. */
export async function lockedSize(format: ImageFormat, host: BlockDevice): Promise<number | undefined> {
  if (format === 'luks') return luksDiskSize(host, await readLuksHeader(host))
  if (format === 'raw') return undefined
  const { encryption, virtualSize } = await readImageInfo(host)
  return encryption === 'none' ? undefined : virtualSize
}
