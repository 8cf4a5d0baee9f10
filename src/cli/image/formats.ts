/** The formats of images on the command line. */

/** A format images can be read and made in. */
export type ImageFormat = 'qcow2' | 'raw' | 'luks'

/** All of them, as messages list them. */
export const imageFormats: readonly ImageFormat[] = ['qcow2', 'raw', 'luks']

/** True for the name of a format. */
export function isImageFormat(name: string): name is ImageFormat {
  return imageFormats.some((known) => known === name)
}
