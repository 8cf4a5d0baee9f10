/** What opening an image gives: the image itself with all that lies below it, or its file as bytes. */
import type { BlockDevice } from '../../block/device.ts'
import type { Qcow2Image } from '../../qcow2/image.ts'
import type { SnapshotDevice } from '../../qcow2/snapshot-device.ts'
import type { ImageFormat } from './formats.ts'
import type { ImageSpec, Place } from './spec.ts'

/** An open image and what lies below it. Closing it closes all. */
export interface OpenedImage {
  /** As the user, or the image above, names it. */
  readonly filename: string
  readonly format: ImageFormat
  readonly place: Place
  /** As it was opened. */
  readonly spec: ImageSpec
  /** What the guest sees: of the snapshot, where one was named. */
  readonly device: BlockDevice
  /** The bytes of the image file. They belong to the image. */
  readonly host: BlockDevice
  readonly image: Qcow2Image | undefined
  readonly snapshot: SnapshotDevice | undefined
  /** The backing file, opened read-only; it belongs to the image. */
  readonly backing: OpenedImage | undefined
  /** The external data file, as the image or the user names it. */
  readonly dataFilename?: string | undefined
  close(): Promise<void>
}

/** An image file as bytes. */
export interface ImageFile {
  readonly filename: string
  readonly place: Place
  readonly format: ImageFormat
  readonly host: BlockDevice
  /** Bytes of the image: of the part of the file that the options leave. */
  readonly size: number
}

/** An image file by its name. */
export interface NamedFile {
  readonly spec: ImageSpec
  readonly file: ImageFile
  /** The name or id of a snapshot, where the name goes on with one. */
  readonly snapshot: string | undefined
}

/** An image that another is made over. */
export interface Below {
  readonly format: ImageFormat
  /** Bytes of the disk. */
  readonly size: number
}

/** An image without tables of its own. */
export function openedFlat(spec: ImageSpec, format: ImageFormat, host: BlockDevice, device: BlockDevice): OpenedImage {
  const { shown: filename, place } = spec
  return { filename, format, place, spec, device, host, image: undefined, snapshot: undefined, backing: undefined, close: () => device.close() }
}

/** The images of a chain, the top first. */
export function chainOf(image: OpenedImage): OpenedImage[] {
  return image.backing === undefined ? [image] : [image, ...chainOf(image.backing)]
}

