/** What the first bytes of an image file tell without opening its format. */
import type { BlockDevice } from '../../block/device.ts'
import { luksDiskSize, readLuksHeader } from '../../luks/luks-image.ts'
import { readImageInfo } from '../../qcow2/info.ts'
import type { ImageFormat } from './formats.ts'

/** By the magic numbers, and the version of LUKS; else `raw`. */
export async function probe(host: BlockDevice): Promise<ImageFormat> {
  const start = Buffer.from(await host.read(0, Math.min(8, host.size))).toString('latin1')
  if (start.startsWith('QFI\xfb')) return 'qcow2'
  return start === 'LUKS\xba\xbe\0\x01' ? 'luks' : 'raw'
}

/** Bytes of the disk in an encrypted image, without its key; undefined if it is not encrypted. */
export async function lockedSize(format: ImageFormat, host: BlockDevice): Promise<number | undefined> {
  if (format === 'luks') return luksDiskSize(host, await readLuksHeader(host))
  if (format === 'raw') return undefined
  const { encryption, virtualSize } = await readImageInfo(host)
  return encryption === 'none' ? undefined : virtualSize
}
